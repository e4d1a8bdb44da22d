"""Every line of the tables of docs/data.md: what is learned of a row, what becomes of a file, and
how a row that is refused can be read.
"""

import datetime
from decimal import Decimal
import json
import re
import shlex
import sys

import pytest
from transformers import AutoTokenizer

from benchmarks import data_shapes
from benchmarks.data_shapes import CHAT, FILES, HUB_PATHS, SHAPES, A, Q
from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import UserError
from lora.config.flags import Parser, add_flags, apply_flags
from lora.config.schema import Config, DataConfig
from lora.config.set_keys import from_file
from lora.data import files, hub_files
from lora.data.raw_data import content_sha256
from lora.data.readers import read
from lora.data.row_display import row_as_text
from lora.data.tokenise import tokenise
from lora.evaluation import eval_arguments


@pytest.fixture(scope="module")
def tokenizer():
    return data_shapes.load_tokenizer()


@pytest.fixture(scope="module")
def hub_answers():
    return data_shapes.answers_of_hub()


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_a_row_is_read_as_its_owner_means_it_or_refused(shape, tokenizer):
    said, targets = data_shapes.becomes(shape, tokenizer)
    if shape.refused:
        assert targets == [] and shape.refused in said
    else:
        # Labels are float32 there.
        assert targets == (pytest.approx(shape.learned) if shape.task == "score" else shape.learned)


@pytest.mark.parametrize("file", FILES, ids=[f"{file.name}: {file.path}" for file in FILES])
def test_a_file_gives_its_rows_or_the_command_that_converts_it(file):
    said = data_shapes.rows_of(file)
    assert file.refused in said if file.refused else said == "2 rows"


@pytest.mark.parametrize("path", HUB_PATHS)
def test_a_path_of_the_hub_gives_its_rows_and_its_revision(path, hub_answers):
    said, commit = hub_answers[path]
    expected, first_digit = HUB_PATHS[path]
    assert expected in said and commit[:1] == first_digit


def test_what_the_cache_holds_is_not_taken_for_all_there_is(tmp_path):
    part, card, star = (f"{data_shapes.OWN}/{name}" for name in ("parquet", "card", "all"))
    shard = f"{part}/data/train-00000-of-00002.parquet"
    with data_shapes.hub(data_shapes.repositories()) as (address, _):
        paths = [shard, card, f"{part}:test", star]
        printed = data_shapes.read_by_hub(paths, address, str(tmp_path))
    assert [line for line in printed if line.startswith("note")] == [
        f"note: {star}: not read: chart.pdf"
    ]
    paths = [part, f"{part}/data/train-00000*", f"{part}:test", card]
    printed = data_shapes.read_by_hub(paths, "", str(tmp_path))
    notes = [line for line in printed if line.startswith("note: ")]
    cannot = "the list of files cannot be fetched; the 1 in the cache that it names are read"
    assert notes == [f"note: {path}: {cannot}" for path in paths[1:]]
    said = [json.loads(line)[0] for line in printed if line.startswith("[")]
    missing = "not in the cache, and the Hub cannot be reached: data/train-00001-of-00002.parquet"
    assert said == [f"{part}: {missing}; download it first.", "one", "three", "english"]


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("*.jsonl", ["a.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]),
        ("**", ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl", "b/x.csv"]),
        ("b/**", ["b/c.jsonl", "b/d/e.jsonl", "b/x.csv"]),
        ("*/[cx].*", ["b/c.jsonl", "b/x.csv"]),
        ("b/x.csv", ["b/x.csv"]),
    ],
)
def test_a_glob_of_the_hub_crosses_folders_by_two_stars_alone(pattern, names):
    files_there = ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl", "b/x.csv"]
    assert [name for name in files_there if hub_files.matches(name, [pattern])] == names


def test_shards_may_be_counted_from_one():
    both = ["train-00001-of-00002.parquet", "train-00002-of-00002.parquet"]
    hub_files.require_all_shards("hf://x", both, "**")
    with pytest.raises(UserError, match="reached: train-00001-of-00002.parquet; download"):
        hub_files.require_all_shards("hf://x", both[1:], "**")


def test_the_page_has_these_tables():
    text = data_shapes.PAGE.read_text(encoding="utf-8")
    assert data_shapes.page(text) == text, "run python benchmarks/data_shapes.py"


# ------------------------------------------------------------------------------------- --columns


def test_columns_is_a_flag_and_a_table(tmp_path):
    config = Config()
    parser = Parser("")
    add_flags(parser, config.data, ["columns"])
    flags = ["--columns", "prompt=ask", "completion=answers.0", "--columns", "system=sys"]
    apply_flags(config, parser.parse_args(flags), ["columns"])
    table = {"prompt": "ask", "completion": "answers.0", "system": "sys"}
    assert config.data.columns == table
    pairs = ", ".join(f'{ours} = "{theirs}"' for ours, theirs in table.items())
    lines = pairs.replace(", ", "\n")
    for text in (f"[data]\ncolumns = {{{pairs}}}", f"columns = {{{pairs}}}", f"[columns]\n{lines}"):
        path = tmp_path / "run.toml"
        path.write_text(text)
        assert from_file(str(path)).data.columns == table
    for wrong in (["prompt"], ["prompt="], ["=x"], ["prompt=a", "prompt=b"]):
        with pytest.raises(UserError, match="--columns .*: (expected OURS=THEIRS|is given twice)"):
            apply_flags(config, parser.parse_args(["--columns", *wrong]), ["columns"])


def test_columns_are_of_all_files_and_may_be_swapped_or_lie_deeper(tmp_path, capsys):
    theirs = write(tmp_path / "a.jsonl", {"ask": Q, "answers": [{"text": A}], "id": 7})
    ours = write(tmp_path / "b.jsonl", {"prompt": Q, "completion": A})
    columns = {"prompt": "ask", "completion": "answers.0.text"}
    examples = read([theirs, ours], "lm", DataConfig(columns=columns))
    assert [example.messages for example in examples] == [CHAT, CHAT]
    assert capsys.readouterr().out == (
        f"note: {theirs}: keys not read: id (1 rows)\n"
        f"note: {ours}: --columns prompt=ask: none of its 1 rows has it\n"
        f"note: {ours}: --columns completion=answers.0.text: none of its 1 rows has it\n"
    )
    swapped = write(tmp_path / "c.jsonl", {"prompt": A, "completion": Q})
    columns = {"prompt": "completion", "completion": "prompt"}
    assert read([swapped], "lm", DataConfig(columns=columns))[0].messages == CHAT


def test_columns_that_are_given_come_before_the_chat_that_a_row_has(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"messages": [*CHAT, *CHAT], "ask": "q", "reply": "a"})
    columns = {"prompt": "ask", "completion": "messages.1.content"}
    (example,) = read([path], "lm", DataConfig(columns=columns))
    assert [message["content"] for message in example.messages] == ["q", A]
    assert capsys.readouterr().out == f"note: {path}: keys not read: reply (1 rows)\n"
    assert len(read([path], "lm", DataConfig(columns={"system": "ask"}))[0].messages) == 5


def test_a_rejected_answer_is_never_advised(tmp_path):
    path = write(tmp_path / "a.jsonl", {"chosen": A, "rejected": "Milk."})
    with pytest.raises(UserError) as error:
        read([path], "lm", DataConfig(columns={"completion": "chosen"}))
    assert "=rejected" not in str(error.value)


def test_eval_reads_its_files_by_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", {"ask": Q, "reply": A})
    flags = ["--base_model", "embedded", "--test_set", path, "--columns", "prompt=ask"]
    arguments = eval_arguments.make_parser().parse_args([*flags, "completion=reply"])
    config = Config()
    apply_flags(config, arguments, eval_arguments.KEYS)
    (question,) = eval_arguments.read_request(arguments, config).test_set
    assert (question.messages, question.reference) == (CHAT[:1], A)


ADVISED = [
    ("lm", {"ask": Q, "reply": A}),
    ("lm", {"Question": Q, "Answer": A, "Topic": "bees"}),
    ("lm", {"user_input": Q, "ideal_response": A}),
    ("lm", {"one": Q, "two": A}),
    ("lm", {"dialog": CHAT}),
    ("lm", {"data": {"messages": CHAT}, "id": 1}),
    ("lm", {"question": Q, "answers": {"text": [A], "start": [0]}}),
    ("lm", {"document": "Bees fly.", "url_id": 3}),
    ("lm", {"prompt": Q, "chosen": A, "rejected": "Milk."}),
    ("lm", {"chosen": CHAT, "rejected": CHAT}),
    ("lm", {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}),
    ("lm", {"system": "", "question": Q, "chosen": A, "rejected": "Milk."}),
    ("lm", {"question": Q, "chosen": CHAT[1:], "rejected": CHAT[1:]}),
    ("lm", {"chosen": "Bees fly.", "rejected": "Bees swim."}),
    ("score", {"problem": Q, "solution_steps": [A], "step_labels": [True]}),
    ("score", {"a": Q, "b": A, "similarity": 0.5}),
]


@pytest.mark.parametrize("task, row", ADVISED, ids=[", ".join(row) for _, row in ADVISED])
def test_the_columns_that_a_refusal_names_make_the_row_readable(task, row, tmp_path):
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(UserError) as error:
        read([path], task)
    pairs = re.search(r"--columns ((?:\S+=\S+ ?)+)", str(error.value))[1].rstrip(".").split()
    columns = dict(pair.split("=", 1) for pair in pairs)
    (example,) = read([path], task, DataConfig(columns=columns))
    assert example.text in ("", "Bees fly.") and example.messages in ([], CHAT)
    assert example.text or example.messages or (example.prompt, example.steps) == (Q, [A])


def test_the_columns_that_a_refusal_names_are_those_of_a_table_too(tmp_path):
    (tmp_path / "a.csv").write_text(f"ask,reply,id\n{Q},{A},7\n")
    with pytest.raises(
        UserError,
        match="keys found: ask .text., reply .text., id .number.; .*"
        "add --columns prompt=ask completion=reply",
    ):
        read([str(tmp_path / "a.csv")], "lm")


def test_the_command_that_a_refusal_names_converts_the_turns(tmp_path, capsys):
    path = tmp_path / "FILE"
    write(path, {"data": [Q, A]})
    with pytest.raises(UserError) as error:
        read([str(path)], "lm")
    command = re.search(r"python -c .*(?= > chats.jsonl)", str(error.value))[0]
    program = shlex.split(command)[2].replace('"FILE"', repr(str(path)))
    exec(compile(program, "command", "exec"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"messages": CHAT}


def test_a_repeated_problem_is_said_once_with_its_first_places(tmp_path):
    rows = [{"ask": Q, "reply": A}] * 5000 + [{"text": ""}]
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError) as error:
        read([path], "lm")
    said = str(error.value)
    assert said.startswith(f"{path}: 5,001 bad rows: 1, 2, 3 and 4,997 more: keys found: ask")
    assert said.endswith("; 5001: text is ''; expected a text that is not empty.")


# ------------------------------------------------------------------------------------------- files


def test_rows_of_parquet_and_saved_data_sets_are_those_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [CHAT[0], {**CHAT[1], "tool_calls": None}], "id": 1, "none": None},
        {"messages": CHAT, "id": 2, "none": None},
    ]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict(test=data, train=data).save_to_disk(tmp_path / "splits")
    for path in ("saved", "a.parquet", "splits/train"):
        examples = read([str(tmp_path / path)], "lm")
        assert [example.messages for example in examples] == [CHAT, CHAT]
    with pytest.raises(UserError, match="name the folder of one: test, train"):
        read([str(tmp_path / "splits")], "lm")


def test_dates_and_bytes_beside_the_words_of_a_message_are_not_in_the_way(tmp_path):
    """WildChat's messages have a timestamp."""
    pa = pytest.importorskip("pyarrow")
    now = datetime.datetime(2026, 11, 30)
    chat = [{**message, "timestamp": now, "id": b"\xff"} for message in CHAT]
    table = pa.Table.from_pylist([{"conversation": chat, "cost": Decimal("0.1")}])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    (example,) = read([str(tmp_path / "a.parquet")], "lm")
    assert example.messages == [{**message, "timestamp": str(now)} for message in CHAT]
    text = pa.Table.from_pylist([{"text": b"words"}])
    pa.parquet.write_table(text, tmp_path / "b.parquet")
    with pytest.raises(UserError, match="expected a text that is not empty"):
        read([str(tmp_path / "b.parquet")], "lm")


def test_a_map_of_parquet_is_an_object(tmp_path):
    pa = pytest.importorskip("pyarrow")
    arguments = pa.array([[("city", "Oslo")], []], pa.map_(pa.string(), pa.string()))
    table = pa.table({"text": ["a", "b"], "arguments": arguments})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in files.read_rows(str(tmp_path / "a.parquet"))]
    assert [row["arguments"] for row in rows] == [{"city": "Oslo"}, []]


def test_without_pyarrow_a_parquet_file_names_the_extra(tmp_path, monkeypatch):
    data_shapes.parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet: .*: pip install 'plainlora\[data\]'"):
        read([str(tmp_path / "a.parquet")], "lm")


def test_the_hash_of_a_folder_is_that_of_its_files_their_kinds_and_order(tmp_path):
    def hash_of(folder, **contents):
        (tmp_path / folder).mkdir()
        for name, text in contents.items():
            (tmp_path / folder / name.replace("_", ".")).write_text(text)
        path = str(tmp_path / folder)
        return content_sha256(path)

    first = hash_of("1", a_txt="x", b_txt="y")
    assert first == hash_of("2", c_txt="x", d_txt="y")
    others = [dict(a_txt="y", b_txt="x"), dict(a_md="x", b_md="y"), dict(a_txt="x")]
    assert first not in [hash_of(f"3{i}", **contents) for i, contents in enumerate(others)]


def test_the_files_of_a_folder_are_named_in_order(tmp_path):
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".hidden.txt", "LICENSE.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a text")
    found = [name.removeprefix(f"{tmp_path}/") for name in files.local_files(str(tmp_path))]
    assert found == ["a.txt", "b/1.txt", "b/2.txt"]
    rows = list(files.read_rows(f"{tmp_path}/b/*.txt"))
    assert [where.removeprefix(f"{tmp_path}/") for where, _ in rows] == found[1:]


@pytest.mark.parametrize(
    "names, note",
    [
        (["b.pdf"], "b.pdf"),
        (["b.pdf", "c/part-00000", "d.tar.gz"], "b.pdf, c/part-00000, d.tar.gz"),
        (["b.pdf", "c.html", "d.docx", "e.jsonl.zst", "f.xlsx"], "b.pdf, c.html and 3 more"),
    ],
)
def test_what_is_not_read_of_a_folder_is_named(tmp_path, capsys, names, note):
    (tmp_path / "c").mkdir()
    for name in ("a.JSONL", "README.md", "LICENSE", ".hidden.pdf", *names):
        (tmp_path / name).write_text('{"text": "a"}')
    assert [example.text for example in read([str(tmp_path)], "lm")] == ["a"]
    files.local_files(str(tmp_path))  # again
    assert capsys.readouterr().out == f"note: {tmp_path}: not read: {note}\n"


def test_the_ending_of_a_parquet_file_may_be_in_upper_case(tmp_path):
    data_shapes.parquet(tmp_path / "a.PARQUET")
    assert len(read([str(tmp_path)], "lm")) == 2


def test_a_glob_leaves_out_what_a_folder_leaves_out(tmp_path):
    for name in ("README.md", "a.md"):
        (tmp_path / name).write_text(name)
    assert [example.text for example in read([f"{tmp_path}/*.md"], "lm")] == ["a.md"]


@pytest.mark.parametrize("other", ["testing", "test", "held_out", "held-out", "heldout", "holdout"])
def test_training_data_are_not_read_with_held_out_ones(tmp_path, other):
    for folder in ("training", other):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r"its files are of several splits \(\S+, \S+\); name the"):
        read([str(tmp_path)], "lm")
    assert len(read([str(tmp_path / "training")], "lm")) == 1
    (tmp_path / "a.json").write_text(json.dumps({"training": [{"text": "a"}], other: [{}]}))
    with pytest.raises(UserError, match="a.json: the splits .* in one object"):
        read([str(tmp_path / "a.json")], "lm")


# ------------------------------------------------------------------------------- calls of functions

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y's"}}}
PRINTED = {
    "as JSON": "{{ call.function.name ~ ' ' }}{{ call.function.arguments | tojson }}",
    "added to a text": "{{ call.function.name + ' ' + call.function.arguments }}",
    "as it stands": "{{ call.function.name }} {{ call.function.arguments }}",
}


@pytest.mark.parametrize("printed", PRINTED)
@pytest.mark.parametrize("written", ["an object", "a text"])
def test_arguments_are_printed_as_json_whatever_the_template_asks_for(tmp_path, printed, written):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    tokenizer.chat_template = data_shapes.TEMPLATE.replace(
        "{{ (call.function or call) | tojson }}", PRINTED[printed]
    )
    call = json.loads(json.dumps(CALL))
    if written == "a text":
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    messages = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    examples = read([write(tmp_path / "a.jsonl", {"messages": messages})], "lm")
    (result,) = tokenise(examples, tokenizer, "lm", DataConfig(max_length=512), causal=True)
    text = row_as_text(result.rows[0], tokenizer, colour=False)
    assert '⟦f {"x": "y\\u0027s"}<|im_end|>⟧' in text or '⟦f {"x": "y\'s"}<|im_end|>⟧' in text


def test_a_null_function_of_a_call_is_none(tmp_path):
    call = CALL["function"]
    rows = [
        {"messages": data_shapes.call(tool_calls=[each])}
        for each in (call, {**call, "function": None})
    ]
    plain, with_null = read([write(tmp_path / "a.jsonl", *rows)], "lm")
    assert with_null.messages == plain.messages
    assert with_null.messages[1]["tool_calls"] == [call]


def test_functions_without_a_wrapping_are_wrapped(tmp_path):
    function = {"name": "f", "parameters": {}}
    wrapped = {"type": "function", "function": function}
    flat = {"type": "function", **function}  # of OpenAI's Responses
    for name, tool in (
        ("tools", wrapped),
        ("tools", function),
        ("tools", flat),
        ("functions", function),
    ):
        (example,) = read([write(tmp_path / "a.jsonl", {"messages": CHAT, name: [tool]})], "lm")
        assert example.tools == [wrapped]
    hosted = {"type": "search", "name": "web"}
    (example,) = read([write(tmp_path / "a.jsonl", {"messages": CHAT, "tools": [hosted]})], "lm")
    assert example.tools == [hosted]


def test_parts_and_keys_that_disagree_are_refused(tmp_path):
    both = [{"role": "user", "from": "gpt", "content": Q}, CHAT[1]]
    cases = {
        "message 1 has two of role, which differ": {"messages": both},
        "tools is 'f'; expected a list of objects": {"messages": CHAT, "tools": "f"},
        "system and system_prompt differ": {"messages": CHAT, "system": "a", "system_prompt": "b"},
        "input beside a list of messages": {"prompt": CHAT[:1], "completion": A, "input": "x"},
        "tool_calls of message 1: expected a list of objects": {
            "conversations": [{"from": "function_call", "value": "rain"}]
        },
    }
    for problem, row in cases.items():
        with pytest.raises(UserError, match=problem):
            read([write(tmp_path / "a.jsonl", row)], "lm")
