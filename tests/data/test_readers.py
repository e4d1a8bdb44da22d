"""Rows in, examples out; a bad row is one line that names file and line. The arithmetic is right
where it says so.
"""

import gzip
import json
import re

import pytest

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data import arithmetic
from lora.data.readers import READERS, iterate, read, reader_for
from lora.data.readers.published import PUBLISHED


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def examples(path, task="score", label_max=1.0):
    return [
        (e.prompt or e.text, e.steps, e.labels)
        for e in read([path], task, DataConfig(label_max=label_max))
    ]


def chat(*answers, **more):
    """A row of a chat whose answers are messages, and what else it holds."""
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": "q"}, {"role": "assistant"} | answer]
    return {"messages": messages} | more


def read_rows(tmp_path, *rows, task="lm"):
    path = write(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return read([path], task)


# --------------------------------------------------------------------------------------- arithmetic


def judge(prompt, steps):
    """Labels worked out from the text alone: the operation asked for, the value carried, the
    result.
    """
    start, asked = re.fullmatch(r"From left to right: (\d+)((?:[-+*]\d)+)", prompt).groups()
    value, labels = int(start), []
    for operation, step in zip(re.findall(r"[-+*]\d", asked), steps, strict=True):
        left, result = step.split("=")
        labels.append(float(left == f"{value}{operation}" and eval(left) == int(result)))
        value = int(result)
    return labels


def test_labels_agree_with_the_arithmetic_and_every_kind_of_slip_is_there():
    kinds = {"digit or carry": 0, "operator": 0, "carried": 0, "right": 0}
    for example in arithmetic.read("arithmetic:train:2000", "score"):
        assert example.labels == judge(example.prompt, example.steps)
        assert 3 <= len(example.steps) <= 6 and all(
            0 <= int(step.split("=")[1]) <= 99 for step in example.steps
        )
        before = re.search(r"\d+", example.prompt)[0]
        for step, label in zip(example.steps, example.labels):
            left, result = step.split("=")
            kind = (
                "right"
                if label
                else "carried"
                if re.match(r"\d+", left)[0] != before
                else "digit or carry"
            )
            kinds[
                "operator" if kind == "digit or carry" and eval(left) == int(result) else kind
            ] += 1
            before = result
    assert min(kinds.values()) > 400 and 0.5 < kinds["right"] / sum(kinds.values()) < 0.6


def test_pretraining_texts_mend_every_slip():
    for example in arithmetic.read("arithmetic:train:300", "lm"):
        prompt, *lines = example.text.strip().split("\n")
        steps = [
            line.removeprefix("No, ")
            for i, line in enumerate(lines)
            if not lines[i + 1 : i + 2] or "No, " not in lines[i + 1]
        ]
        assert set(judge(prompt, steps)) == {1.0}
    assert "No, " in example.text


def test_no_problem_is_in_two_splits_and_the_same_ones_come_every_time():
    sets = {
        split: [e.prompt for e in arithmetic.read(f"arithmetic:{split}:800", "score")]
        for split in arithmetic.SPLITS
    }
    assert sum(map(len, sets.values())) == len(set().union(*sets.values())) == 2400
    # Pretraining reads training problems only, so a held-out problem is new to the base as well.
    pretraining = {e.text.split("\n")[0] for e in arithmetic.read("arithmetic:train:5000", "lm")}
    assert not pretraining & {*sets["validation"], *sets["test"]}
    assert [e.prompt for e in arithmetic.read("arithmetic:train:800", "score")] == sets["train"]


@pytest.mark.parametrize(
    "path", ["arithmetic:trian:5", "arithmetic:train", "arithmetic:train:0", "arithmetic:train:x"]
)
def test_a_misspelt_arithmetic_path_is_an_error(path):
    with pytest.raises(UserError, match="expected arithmetic:SPLIT:COUNT"):
        read([path], "score")


# -------------------------------------------------------------------------------------------- files


def test_steps_in_jsonl_and_json_with_soft_boolean_and_null_labels(tmp_path):
    row = {
        "prompt": "p",
        "steps": ["a", "b", "c", "d"],
        "labels": [0.3, True, None, 0],
        "source": "ignored",
    }
    completions = {"prompt": "p", "completions": ["a"], "labels": [False]}
    expected = [("p", ["a", "b", "c", "d"], [0.3, 1.0, None, 0.0]), ("p", ["a"], [0.0])]
    # BOM, CRLF, a blank line
    lines = "\ufeff" + json.dumps(row) + "\r\n\r\n" + json.dumps(completions) + "\r\n"
    assert examples(write(tmp_path, "a.jsonl", lines)) == expected
    assert examples(write(tmp_path, "a.json", json.dumps([row, completions]))) == expected
    row["labels"] = [0.3, True, None, 0]
    (found,) = examples(write(tmp_path, "b.jsonl", json.dumps(row)), label_max=0.5)
    assert found[2] == [0.6, 1.0, None, 0.0]


def test_pairs_in_csv_with_and_without_header_tsv_and_jsonl_scaled_by_label_max(tmp_path):
    expected = [("one, two", ["three"], [0.5]), ("four", ["five\u2028six"], [1.0])]
    table = '"one, two",three,2.5\n\nfour,five\u2028six,5\n'
    assert examples(write(tmp_path, "a.csv", table), label_max=5) == expected
    assert (
        examples(write(tmp_path, "b.csv", "sentence1,sentence2,score\n" + table), label_max=5)
        == expected
    )
    tabs = "score\tsentence1\tsentence2\n2.5\tone, two\tthree\n5\tfour\tfive\u2028six\n"
    assert examples(write(tmp_path, "c.tsv", tabs), label_max=5) == expected
    row = {"sentence1": "one, two", "sentence2": "three", "label": 2.5}
    assert examples(write(tmp_path, "d.jsonl", json.dumps(row)), label_max=5) == expected[:1]


def test_a_row_of_text_is_read_as_its_text(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "hello"}')
    assert examples(path, "lm") == [("hello", [], [])]


GOOD = '{"prompt": "p", "steps": ["s"], "labels": [1]}\n'
BAD = [  # and those of tests/scripts/test_inputs.py
    (
        "a.jsonl",
        GOOD + '{"question": 1, "reply": 2}',
        "a.jsonl:2: keys found: question (number), reply (number); expected one of: ",
    ),
    (
        "a.jsonl",
        '{"prompt": "p", "steps": ["s", 5], "labels": [1, 1]}',
        "a.jsonl:1: step 2 is 5; expected a text that is not empty",
    ),
    (
        "a.jsonl",
        '{"prompt": "", "steps": ["s"], "labels": [1]}',
        "a.jsonl:1: prompt is ''; expected a text that is not empty",
    ),
    ("a.jsonl", '{"text": "t"}', "a.jsonl:1: keys text in a run of --task score; add --task lm"),
    (
        "a.jsonl",
        '{"prompt": "\\ud800", "steps": ["s"], "labels": [1]}',
        "a.jsonl:1: prompt contains half of a surrogate pair",
    ),
    ("a.json", '[1, {"a": 2}]', "a.json: 2 bad rows: row 1: expected a JSON object, found int"),
    ("a.json", '[{"a": 1},\n{"b" 2}]', "a.json:2: not JSON (Expecting ':' delimiter, column 6)"),
    ("a.csv", "a,b,0.5\na,b\n", "a.csv:2: 2 columns, expected 3 (sentence1, sentence2, score)"),
    ("a.csv", "a,b,0.5\na,b,high\n", "a.csv:2: label 'high'; expected 0..1"),
    ("a.csv", "text,text\none,two\n", "a.csv:1: the column 'text' is there twice"),
    ("a.parquet", "", "a.parquet: its first bytes are not those of a Parquet"),
    ("a.xyz", "one", "a.xyz: expected a file named .jsonl, .json, .ndjson, .csv, .tsv, .txt"),
]


@pytest.mark.parametrize("name, text, message", BAD, ids=[message for _, _, message in BAD])
def test_a_bad_row_is_one_line_that_names_file_and_line(tmp_path, name, text, message):
    with pytest.raises(UserError) as error:
        read([write(tmp_path, name, text)], "score")
    assert str(error.value).startswith(f"{tmp_path}/{message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "calls", ['["f"]', '{"name": "f"}', '[{"function": {"name": null}}]', '[{"function": "f"}]']
)
def test_a_tool_call_is_an_object_with_a_name(tmp_path, calls):
    path = write(
        tmp_path, "a.jsonl", f'{{"messages": [{{"role": "assistant", "tool_calls": {calls}}}]}}'
    )
    with pytest.raises(
        UserError, match="a.jsonl:1: tool_calls of message 1: expected a list of objects"
    ):
        read([path], "lm")


def test_half_a_character_in_a_call_is_an_error(tmp_path):
    call = '{"name": "f", "arguments": {"x": "\\ud800"}}'
    path = write(
        tmp_path, "a.jsonl", f'{{"messages": [{{"role": "assistant", "tool_calls": [{call}]}}]}}'
    )
    with pytest.raises(UserError, match="a.jsonl:1: the chat contains half of a surrogate pair"):
        read([path], "lm")


def test_a_damaged_gz_file_is_an_error(tmp_path):
    packed = bytearray(
        gzip.compress("".join(f'{{"text": "{i * 7919 % 1000}"}}\n' for i in range(3000)).encode())
    )
    for name, damage in {
        "bits": packed[:200] + bytes(60) + packed[260:],
        "end": packed[:-9],
        "start": packed[:2] + b"text",
    }.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(damage)
        with pytest.raises(UserError, match=f"{name}.jsonl.gz: "):
            read([str(tmp_path / f"{name}.jsonl.gz")], "lm")


# ------------------------------------------------------------------------------------------- forms

CODES = {
    "c": "chat",
    "q": "questions",
    "s": "steps",
    "p": "pairs",
    "t": "text",
    "8": "prm800k",
    "m": "math_shepherd",
    "f": "first_error",
    "b": "prmbench",
    "e": "eqasc",
    "o": "eobqa",
    "r": "reveal",
    "u": "outcomes",
    "g": "glaive",
    "-": "none: the row belongs to the other task",
}
# The keys of a form; then, for a row that has them and those of each form from this one on, the
# reader in a run of --task lm, and in one of --task score.
PAIRS_OF_FORMS = [
    ("messages", "ccccccccccccccccccccccccccccc", "------------sspp-8mfffbeoruu-"),
    ("conversations", "cccccccccccccccccccccccccccc", "-----------sspp-8mfffbeoruu-"),
    ("conversation", "ccccccccccccccccccccccccccc", "----------sspp-8mfffbeoruu-"),
    ("completion prompt", "qqqqqqqqqqqqqqqqqqqqqqqqqq", "---------sspp-8mfffbeoruu-"),
    ("answer question", "qqqqqqqqqqqqqqqqqqqqqqqqq", "--------sspp-8mfffbeoruu-"),
    ("instruction output", "qqqqqqqqqqqqqqqqqqqqqqqq", "-------sspp-8mfffbeoruu-"),
    ("instruction response", "qqqqqqqqqqqqqqqqqqqqqqq", "------sspp-8mfffbeoruu-"),
    ("question response", "qqqqqqqqqqqqqqqqqqqqqq", "-----sspp-8mfffbeoruu-"),
    ("query response", "qqqqqqqqqqqqqqqqqqqqq", "----sspp-8mfffbeoruu-"),
    ("prompt response", "qqqqqqqqqqqqqqqqqqqq", "---sspp-8mfffbeoruu-"),
    ("problem solution", "qqqqqqqqqqqqqqqqqqq", "--sspp-8mfffbeoruu-"),
    ("input output", "qqqqqqqqqqqqqqqqqq", "-sspp-8mfffbeoruu-"),
    ("labels prompt steps", "----t-----------g", "sssssssssssssssss"),
    ("completions labels prompt", "---t-----------g", "ssssssssssssssss"),
    ("score sentence1 sentence2", "--t-----------g", "ppppppppppppppp"),
    ("label sentence1 sentence2", "-t-----------g", "pppppppppppppp"),
    ("text", "ttttttttttttt", "-8mfffbeoruu-"),
    ("label labeler question", "-----------g", "888888888888"),
    ("input label task", "----------g", "mmmmmmmmmmm"),
    ("input mistake_index steps", "---------g", "ffffffffff"),
    ("label problem steps", "--------g", "fffffffff"),
    ("Model_Solution_First_Error_Step Model_Solution_Steps Question", "-------g", "ffffffff"),
    ("error_steps modified_process modified_question", "------g", "bbbbbbb"),
    ("answerKey fact1 fact2 question", "-----g", "eeeeee"),
    ("Answer DF Fact1 Fact2 QID Question Turks", "----g", "ooooo"),
    ("answer_id full_answer", "---g", "rrrr"),
    ("is_correct prompt steps", "--g", "uuu"),
    ("ground_truth question", "-g", "uu"),
    ("chat system", "g", "-"),
]


@pytest.mark.parametrize("task", ["lm", "score"])
def test_of_two_forms_that_a_row_has_the_order_of_the_readers_decides(task):
    forms = [set(keys.split()) for keys, _, _ in PAIRS_OF_FORMS]
    assert forms == [form for reader in (*READERS, *PUBLISHED) for form in reader.FORMS]
    for i, (_, *codes_of_tasks) in enumerate(PAIRS_OF_FORMS):
        codes = dict(zip(("lm", "score"), codes_of_tasks))[task]
        for other, code in zip(forms[i:], codes, strict=True):
            row = dict.fromkeys(sorted(forms[i] | other))
            if code == "-":
                with pytest.raises(UserError, match=f"in a run of --task {task}; add --task"):
                    reader_for("a.jsonl:1", row, task)
            else:
                reader = reader_for("a.jsonl:1", row, task)
                assert reader.__name__.rpartition(".")[2] == CODES[code], row


# ------------------------------------------------------------------------------ nothing in silence


@pytest.mark.parametrize(
    "switch, weight",
    [
        ({"weight": 0}, 0.0),
        ({"weight": 1}, 1.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"train": False}, 0.0),
        ({"training": False, "weight": 0}, 0.0),
        ({"train": True, "weight": 2}, 2.0),
    ],
    ids=str,
)
def test_a_message_says_how_much_it_is_learned(tmp_path, switch, weight):
    (example,) = read_rows(tmp_path, chat({"content": "a"}, {"content": "b"} | switch))
    assert example.message_weights == ([1.0, 1.0, 1.0, weight] if weight != 1 else [])
    assert example.messages[3] == {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "row, problem",
    [
        (chat({"content": "a", "weight": 0, "train": True}), "weight and train of message 2 disag"),
        (chat({"content": "a", "weight": 1, "loss_weight": 2}), "of message 2 disagree"),
        (chat({"content": "a", "weight": -1}), "weight -1; expected a number from 0"),
        (chat({"content": "a", "weight": float("nan")}), "weight nan; expected a number from 0"),
        (chat({"content": "a", "train": "no"}), "train of message 2 is 'no'; expected true or"),
        ({"messages": [{"role": "user", "content": "q", "train": True}]}, "no message has role as"),
        (chat({"content": "a"}, label=True), r"a label beside a conversation \(as for KTO\)"),
        ({"prompt": "q", "completion": "a", "label": False}, "a label beside a conversation"),
        (chat({"content": "a"}, kto_tag=False), "a kto_tag beside a conversation"),
        (
            {"messages": [*chat({"content": "a"})["messages"], {"role": "user", "content": "r"}]}
            | {"chosen": {"content": "b"}, "rejected": {"content": "c"}},
            "chosen and rejected answers beside a conversation",
        ),
        (chat({"content": "a"}, images=["a.png"]), "images: only text is read"),
        (chat({"content": "a"}, image="a.png"), "image: only text is read"),
        (
            chat({"content": [{"type": "reasoning", "text": "b"}, {"type": "text", "text": "a"}]}),
            "content of message 2 has the part {'type': 'reasoning', 'text': 'b'}; only text is",
        ),
        (
            chat({"content": [{"type": "image", "text": ""}, "a"]}),
            "content of message 2 has the part {'type': 'image', 'text': ''}; only text is read",
        ),
        ({"question": "q", "answer": "a", "audio": {"path": "a.wav"}}, "audio: only text is read"),
        ({"prompt": "q", "completion": "a", "history": ["x"]}, "expected a list of .instruction"),
    ],
    ids=str,
)
def test_what_would_train_otherwise_than_meant_is_refused(tmp_path, row, problem):
    with pytest.raises(UserError, match=rf"rows.jsonl:1: .*{problem}"):
        read_rows(tmp_path, row)


def test_a_user_message_that_is_to_be_trained_is_refused(tmp_path):
    row = chat({"content": "a"})
    row["messages"][0]["train"] = True
    with pytest.raises(UserError, match=r"message 1 .user. is to be trained, but .* remove train"):
        read_rows(tmp_path, row)


def test_a_system_prompt_beside_the_messages_comes_first(tmp_path):
    (example,) = read_rows(tmp_path, chat({"content": "a"}, system="s"))
    assert example.messages[0] == {"role": "system", "content": "s"} and len(example.messages) == 3
    same = chat({"content": "a"}, system="s")
    same["messages"].insert(0, {"role": "system", "content": "s"})
    assert read_rows(tmp_path, same)[0].messages == example.messages
    with pytest.raises(UserError, match="system and the first message, of role system, differ"):
        read_rows(tmp_path, same | {"system": "other"})


def test_system_history_input_and_context_of_a_question_are_read(tmp_path, capsys):
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["p", "b"]]}
    context = {"question": "q", "context": "c", "answer": "a"}
    examples = read_rows(tmp_path, row, context)
    contents = [[message["content"] for message in example.messages] for example in examples]
    assert contents == [["s", "p", "b", "q\n\ni", "a"], ["q\n\nc", "a"]]
    assert capsys.readouterr().out == ""


def test_keys_that_nothing_reads_are_named_once_for_the_file(tmp_path, capsys):
    rows = [{"text": "a", "source": "web", "id": i, "none": None} for i in range(2)]
    read_rows(tmp_path, *rows, {"text": "b", "source": "web"})
    path = tmp_path / "rows.jsonl"
    assert capsys.readouterr().out == f"note: {path}: keys not read: source (3 rows), id (2 rows)\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"content": "b"}]},
    ],
    ids=lambda row: next(iter(row)),
)
def test_keys_of_messages_that_nothing_reads_are_named(tmp_path, capsys, row):
    *_, last = row.values()
    known = {"name": "n", "weight": 1, "thinking": "t", "none": None, "role": "assistant"}
    last[-1].update(known if "from" not in last[-1] else {"name": "n"}, surprise=-1)
    read_rows(tmp_path, row, row)
    out = capsys.readouterr().out
    path = tmp_path / "rows.jsonl"
    assert out.startswith(f"note: {path}: keys not read: messages.surprise, unless ")
    assert out.endswith("(2 rows)\n") and out.count("messages.") == 1


@pytest.mark.parametrize(
    "row, problem",
    [
        (
            {"prompt": "p", "steps": ["a"], "completions": ["b"], "labels": [1]},
            "steps and completions differ",
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": 1, "label": 0},
            "score and label disagree",
        ),
    ],
)
def test_two_names_of_one_thing_that_disagree_are_an_error(tmp_path, row, problem):
    with pytest.raises(UserError, match=problem):
        read_rows(tmp_path, row, task="score")


def test_a_few_chats_with_a_blank_message_are_left_out(tmp_path, capsys):
    good, blank = chat({"content": "a"}), chat({"content": " "})
    assert len(read_rows(tmp_path, *[good] * 99, blank)) == 99
    assert "left out: 1 rows (a blank message)" in capsys.readouterr().out
    with pytest.raises(UserError, match="rows.jsonl:99: 2 of 100 rows have a blank message"):
        read_rows(tmp_path, *[good] * 98, blank, {"prompt": "", "completion": "a"})
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, [blank] + [good] * 99)))
    assert len(list(iterate([(0, path)], "lm", DataConfig(), limit=5))) == 5


def test_a_tsv_is_not_quoted_and_numbers_are_those_of_json(tmp_path):
    text = 'text\tweight\n"one\t2\nit\'s 5" wide\t1\n'
    path = write(tmp_path, "a.tsv", text)
    assert [(e.text, e.weight) for e in read([path], "lm")] == [('"one', 2), ("it's 5\" wide", 1)]
    path = write(tmp_path, "a.tsv.gz", 'text\n"one, two\n')  # a single column
    assert [e.text for e in read([path], "lm")] == ['"one, two']
    for number in ("1_6", "0_1", "\u0661", "nan", "inf"):
        path = write(tmp_path, "b.csv", f"sentence1,sentence2,score\na,b,{number}\n")
        with pytest.raises(UserError, match="b.csv:2: label"):
            examples(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", '{"data": [{"text": "a"}, {"text": "b"}], "version": "1.1"}'),
        ("a.json", '{"data": [{"text": "a"}, {"text": "b"}]}\n\n \n'),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n'),
        ("a.jsonl", '\n{"text": "a"}\n\n{"text": "b"}\n'),
    ],
)
def test_an_object_on_one_line_holds_rows_as_over_several_lines(tmp_path, name, text):
    assert [e.text for e in read([write(tmp_path, name, text)], "lm")] == ["a", "b"]


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "Test"), ("train_set", "test set")])
def test_splits_in_one_object_are_refused(tmp_path, names):
    text = json.dumps({name: [{"text": name}] for name in names})
    path = write(tmp_path, "a.json", text)
    with pytest.raises(UserError, match="the splits test, train in one object; write each"):
        read([path], "lm")


def test_columns_of_a_table_that_are_renamed_are_numbers_too(tmp_path):
    path = write(tmp_path, "a.csv", "a,b,similarity\nx,y,0.5\nx,z,\nx,u,True\n")
    columns = {"sentence1": "a", "sentence2": "b", "score": "similarity"}
    found = read([path], "score", DataConfig(columns=columns))
    assert [e.labels for e in found] == [[0.5], [None], [1.0]]
    path = write(tmp_path, "b.csv", "text,label\nx,1\n")
    (found,) = read([path], "lm", DataConfig(columns={"prompt": "text", "completion": "label"}))
    assert found.messages[1]["content"] == "1"


def test_an_answer_that_is_null_is_blank_whatever_else_the_row_has(tmp_path):
    row = {"question": "q", "answer": None, "text": "a passage"}
    with pytest.raises(UserError, match="1 of 1 rows have a blank message"):
        read([write(tmp_path, "a.jsonl", json.dumps(row))], "lm")


def test_topics_in_one_object_are_read(tmp_path):
    text = json.dumps({name: [{"text": name}] for name in ("web dev", "unit test", "testing")})
    assert examples(write(tmp_path, "a.json", text), "lm")[2][0] == "testing"


def test_blank_columns_of_other_data_sets_do_not_choose_the_reading(tmp_path):
    row = {"prompt": None, "completion": None, "question": "q", "answer": "a"}
    (found,) = read([write(tmp_path, "a.jsonl", json.dumps(row))], "lm")
    assert [message["content"] for message in found.messages] == ["q", "a"]
    row = {"prompt": "p", "steps": None, "completions": ["s"], "labels": [1]}
    (found,) = read([write(tmp_path, "b.jsonl", json.dumps(row))], "score")
    assert found.steps == ["s"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None, "prompt": "q", "completion": "a"},
        {"messages": None, "conversations": chat({"content": "a"})["messages"]},
        {"question": None, "answer": None, "conversation": chat({"content": "a"})["messages"]},
        {"messages": "", "prompt": "q", "completion": "a"},
        {"prompt": "", "completion": "", "question": "q", "answer": "a"},
    ],
)
def test_keys_of_another_form_that_are_blank_do_not_choose_the_reader(tmp_path, capsys, row):
    (found,) = read_rows(tmp_path, row)
    assert capsys.readouterr().out == ""
    assert [message["content"] for message in found.messages] == ["q", "a"]


QUESTION = [{"role": "user", "content": "q"}]
ANSWER = [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": json.dumps(QUESTION), "completion": "a"},
        {"prompt": json.dumps(QUESTION), "completion": json.dumps(ANSWER)},
        {"input": QUESTION, "output": "a"},
        {"input": json.dumps(QUESTION), "output": "a"},
        {"messages": [QUESTION[0], {**ANSWER[0], "from": None, "value": None}]},
        {"messages": [QUESTION[0], {"from": "gpt", "value": "a", "role": None, "content": None}]},
        chat({"content": "a", "tool_calls": []}),
        chat({"content": "a", "tool_calls": "[]", "name": None}),
        chat({"content": ["a", {"type": "output_text", "text": ""}, {"text": ""}]}),
    ],
)
def test_other_ways_to_write_a_chat_are_that_chat(tmp_path, row):
    (found,) = read_rows(tmp_path, row)
    assert found.messages == QUESTION + ANSWER


def test_an_answer_that_is_a_list_in_json_is_no_chat(tmp_path):
    for answer in ('[{"name": "f"}]', "[]", '["role"]'):
        (found,) = read_rows(tmp_path, {"prompt": "q", "completion": answer})
        assert found.messages[1]["content"] == answer


def test_a_column_without_a_name_is_named_so(tmp_path, capsys):
    path = write(tmp_path, "a.csv", ",prompt,completion\n7,q,a\n")
    assert read([path], "lm")[0].messages == QUESTION + ANSWER
    told = capsys.readouterr().out
    assert told == f"note: {path}: keys not read: a column without a name (1 rows)\n"


def test_texts_beside_null_chats_are_read(tmp_path):
    (found,) = read_rows(tmp_path, {"messages": None, "prompt": None, "text": "t"})
    assert found.text == "t"


def test_a_null_under_a_renamed_column_is_a_blank_as_under_our_own_name(tmp_path, capsys):
    rows = [{"q": "x", "a": "y"}] * 200 + [{"q": "x", "a": None}]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    columns = DataConfig(columns={"prompt": "q", "completion": "a"})
    assert len(read([path], "lm", columns)) == 200
    assert "1 rows (a blank message)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, task, problem",
    [
        (chat({"content": "a"}, tools=True), "lm", "tools is 'True'; expected a list"),
        ({"system": 5, "chat": "USER: a ASSISTANT: b"}, "lm", "system is 5; expected a text"),
        (
            {
                "modified_question": "q",
                "modified_process": ["s"],
                "error_steps": [],
                "classification": "redundency",
                "original_question": "q",
                "original_process": 5,
            },
            "score",
            "steps is '5'; expected a list",
        ),
    ],
)
def test_odd_values_are_one_line(tmp_path, row, task, problem):
    with pytest.raises(UserError, match=problem):
        read_rows(tmp_path, row, task=task)


def test_half_a_character_in_a_category_is_written_as_a_question_mark(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a", "category": "\\ud83d"}')
    assert read([path], "lm")[0].category == "?"


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.csv",
            'prompt,completion\nQ1,A1\nQ2,"Honey\nQ3,A3\nQ4,A4\n',
            'a.csv:3: .* begins with "',
        ),
        ("a.csv", 'prompt,completion\n"Honey" is?,A1\nQ2,A2\n', 'a.csv:2: .* begins with "'),
        ("a.csv", "prompt;completion\nQ1;A1\n", "a.csv:1: columns are separated by ';'"),
        ("a.csv", "sep=;\nprompt;completion\nQ1;A1\n", "a.csv:1: columns are separated by ';'"),
        ("a.tsv", 'prompt\tcompletion\nQ1\t"""Hi"", she said"\n', "a.tsv:2: a cell in quotes"),
        (
            "a.jsonl",
            '{"prompt": "q", "completion": [{"role": "user", "content": "q"}]}',
            "a.jsonl:1: the answer is a list that begins with the question",
        ),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.txt", "A\0 \0t\0e\0x\0t\0", "a.txt: NUL characters, as in UTF-16 that is read as"),
        ("a.json", '{"data": [{"text": "a"}], "rest": [{"text": "b"}], "n": 1}', "keys found"),
    ],
)
def test_what_would_be_read_otherwise_in_part_or_twice_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read([str(path)], "lm")


def test_rows_whose_questions_differ_in_other_keys_alone_have_one_subject(tmp_path):
    question = [{"role": "user", "content": "Why?"}, {"content": "Why?", "role": "user"}]
    question += [{**question[0], "timestamp": 7}, {**question[0], "tool_calls": None}]
    rows = [
        {"messages": [m, {"role": "assistant", "content": str(i)}]} for i, m in enumerate(question)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    subjects = {example.subject for example in read([str(path)], "lm")}
    assert subjects == {json.dumps([{"role": "user", "content": "Why?"}])}


def test_hidden_files_of_a_folder_are_left_out_and_links_that_lead_nowhere_refused(tmp_path):
    folder = tmp_path / "data"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "a"}')
    (folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl").write_text('{"text": "old"}')
    assert [example.text for example in read([str(folder)], "lm")] == ["a"]
    for target in (tmp_path / "nothing", tmp_path):
        (folder / "b.jsonl").symlink_to(target)
        with pytest.raises(UserError, match="b.jsonl: a link to a folder, or a broken one"):
            read([str(folder)], "lm")
        (folder / "b.jsonl").unlink()


@pytest.mark.parametrize(
    "answer", [[{"from": "A", "to": "B"}], [{"role": "assistant", "content": "hello"}]]
)
def test_an_answer_in_json_to_a_prompt_in_text_is_learned_as_it_stands(tmp_path, answer):
    path = tmp_path / "data.jsonl"
    row = {"prompt": "Extract the edges.", "completion": json.dumps(answer)}
    path.write_text(json.dumps(row) + "\n")
    (example,) = read([str(path)], "lm")
    assert example.messages[-1]["content"] == row["completion"]


def test_a_renamed_key_that_is_null_gives_way_to_one_that_is_filled(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conv": None, "text": "whole"}) + "\n")
    data = DataConfig()
    data.columns = {"messages": "conv"}
    (example,) = read([str(path)], "lm", data)
    assert example.text == "whole"


def test_a_row_with_an_image_of_which_only_the_place_is_left_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    row = {"prompt": "What is it?", "completion": "A cat.", "image": {}}  # Arrow's, without bytes
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="image: only text is read"):
        read([str(path)], "lm")


def test_a_glob_that_asks_for_names_like_those_of_notes_reads_them(tmp_path):
    (tmp_path / "_train.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    assert len(read([str(tmp_path / "_train*.jsonl")], "lm")) == 1
