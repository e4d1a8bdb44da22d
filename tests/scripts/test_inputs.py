"""The 48 bad inputs and faults: each has its one line, its exit status, and leaves nothing behind.

Those that need no model are answered by scripts for which torch cannot be imported. What is not
here by its number is elsewhere: 18 (overlap) in test_scripts.py, 19 in test_chat.py, 45 in
test_memory.py, and 38, 41, 44, 46, 47 in test_reliability.py and the harness that it runs.
"""

import gzip
import json
import os
from pathlib import Path
import re
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoTokenizer

from lora.common.checksums import write_checksums
from lora.common.exit_status import one_line_errors
from lora.common.paths import ROOT
from lora.data.readers import read
from lora.distributed import process_group
from tests.conftest import run, script, tiny_llama

CHAT = '{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}\n'
TEXT, CHAIN = '{"text": "a text"}\n', '{"prompt": "p", "steps": ["a", "b"], "labels": [1, 0]}\n'
WITHOUT_TORCH = (
    "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def chat(*turns):
    return (
        json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
        + "\n"
    )


# (number, name of the data file, its content, task, what the line says after "error: ...NAME")
DATA = [
    (
        1,
        "a.jsonl",
        TEXT + '{"text": "a",}\n',
        "lm",
        r":2: not JSON \((Illegal trailing comma|Expecting property name)",
    ),
    (2, "a.jsonl", TEXT + TEXT.strip() + TEXT, "lm", r":2: not JSON \(Extra data, column 19\)"),
    (
        2,
        "a.jsonl",
        "\n" + TEXT + '[{"text": "a"}]\n',
        "lm",
        ":3: expected a JSON object, found list",
    ),
    (
        3,
        "a.jsonl",
        TEXT + '{"prompt": "p", "reply": "r"}\n',
        "lm",
        r":2: keys found: prompt \(text\), reply \(text\); expected one of: completion, prompt; "
        ".*; add --columns completion=reply",
    ),
    (
        4,
        "a.jsonl",
        TEXT + '{"text": "a", "text": "b"}\n',
        "lm",
        ":2: not JSON that can be read .'text' is given twice",
    ),
    (5, "a.jsonl", "", "lm", ": no examples"),
    (5, "a.jsonl.gz", gzip.compress(b"\n\n"), "lm", ": no examples"),
    (
        6,
        "a.jsonl",
        CHAT + chat(("bot", "x")),
        "lm",
        ":2: message 1 has role 'bot'; expected one of system",
    ),
    (6, "a.jsonl", CHAT + chat(("user", "x")), "lm", ":2: no message has role assistant"),
    (
        7,
        "a.jsonl",
        CHAT + chat(("user", 7), ("assistant", "x")),
        "lm",
        ":2: content of message 1 is 7; expected a text",
    ),
    (
        7,
        "a.jsonl",
        CHAT + chat(("user", ""), ("assistant", "x")),
        "lm",
        ":2: 1 of 2 rows have a blank message; expected at most 1%",
    ),
    (
        9,
        "a.jsonl",
        CHAIN + CHAIN.replace("[1, 0]", "[NaN, 0]"),
        "score",
        r":2: label nan; expected 0..1",
    ),
    (
        9,
        "a.jsonl",
        CHAIN + CHAIN.replace("[1, 0]", "[1e999, 0]"),
        "score",
        r":2: label inf; expected 0..1",
    ),
    (
        10,
        "a.jsonl",
        CHAIN + CHAIN.replace("[1, 0]", "[7, 0]"),
        "score",
        r":2: label 7; expected 0..1",
    ),
    (
        10,
        "a.jsonl",
        CHAIN + CHAIN.replace("[1, 0]", '["1", 0]'),
        "score",
        r":2: label '1'; expected 0..1",
    ),
    (
        11,
        "a.jsonl",
        CHAIN + CHAIN.replace("[1, 0]", "[1]"),
        "score",
        ":2: 2 steps and 1 labels; expected a label for each",
    ),
    (
        12,
        "a.jsonl",
        TEXT.encode() + '{"text": "é"}\n'.encode("latin-1"),
        "lm",
        ":2: byte 0xe9 is not UTF-8; .*iconv",
    ),
    (12, "a.jsonl", TEXT.encode("utf-16"), "lm", ":1: byte 0xff is not UTF-8"),
    (
        16,
        "a.jsonl",
        TEXT + r'{"text": "\ud800"}' + "\n",
        "lm",
        ":2: text contains half of a surrogate pair",
    ),
    (
        17,
        "a.jsonl",
        TEXT + '{"text": ' + "[" * 200_000 + "\n",
        "lm",
        ":2: not JSON that can be read .*recursion",
    ),
    (
        17,
        "a.jsonl",
        TEXT + '{"text": ' + "1" * 5000 + "}\n",
        "lm",
        ":2: not JSON that can be read .*5000 digits",
    ),
]
# (number, flags, content of config.toml, the whole line)
FLAGS = [
    (
        20,
        [],
        "[training]\nlearning_rate 1e-4\n",
        r"config.toml: cannot be read .Expected .=. after a key .*line 2, column 15...",
    ),
    (
        21,
        [],
        "[training]\nlearning_rat = 1e-4\n",
        "config.toml: training.learning_rat: no such key. Did you mean learning_rate.",
    ),
    (22, [], "[lora]\nlora_r = 2.5\n", "config.toml: lora.lora_r = 2.5: expected an integer."),
    (22, [], "[lora]\nlora_r = true\n", "config.toml: lora.lora_r = True: expected an integer."),
    (
        22,
        [],
        '[training]\nlearning_rate = "fast"\n',
        "config.toml: training.learning_rate = 'fast': expected a number.",
    ),
    (23, ["--learning_rate=nan"], "", "--learning_rate = nan: expected a number."),
    (23, ["--learning_rate=-1"], "", "--learning_rate = -1.0: expected a number > 0."),
    (
        23,
        [],
        "[training]\nlearning_rate = inf\n",
        "config.toml: training.learning_rate = inf: expected a number.",
    ),
    (24, ["--learning_rat=1"], "", "--learning_rat: no such key. Did you mean learning_rate."),
    (25, ["--bf16", "--fp16"], "", "flags: bf16 and fp16 both choose the dtype; give one of them."),
    (27, ["--lora_r=-1"], "", "--lora_r = -1: expected an integer >= 0."),
    (27, ["--lora_alpha=0"], "", "--lora_alpha = 0.0: expected a number > 0."),
    (
        28,
        ["--base_model=/no/such"],
        "",
        r"base_model /no/such: no such folder \(and no Hub name OWNER/NAME\).",
    ),
    (
        37,
        ["--resume_from=/no/such"],
        "",
        "--resume_from /no/such: no checkpoint; expected RUN/checkpoints/checkpoint_step_N.",
    ),
    (
        42,
        ["--output_dir={file}/x"],
        "",
        "output_dir .*/file/x: .*/file cannot be written to; name another folder.",
    ),
    ("long", [f"--output_dir={'a' * 300}"], "", "a{200}: File name too long."),
    (
        "NUL",
        [],
        '[output]\nexperiment_name = "a\\u0000b"\n',
        r"config.toml: output.experiment_name = 'a\\x00b': a NUL character; take it out.",
    ),
    (
        "count",
        ["--train_data=arithmetic:train:99999999999"],
        "",
        "arithmetic:train:99999999999: expected arithmetic:SPLIT:COUNT .* COUNT 1..1000000.",
    ),
]


def answer(folder, *flags, code=WITHOUT_TORCH):
    command = [
        sys.executable,
        "-c",
        code,
        "train_lora.py",
        "--output_dir",
        str(folder / "out"),
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert not (folder / "out").exists()
    return done.returncode, done.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    "number, name, content, task, message", DATA, ids=[f"{case[0]}" for case in DATA]
)
def test_bad_data_is_one_line_before_torch(tmp_path, number, name, content, task, message):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    status, line = answer(
        tmp_path, "--base_model=embedded", "--train_data", str(path), "--task", task
    )
    assert status == 2 and re.match(re.escape(str(path)) + message, line), line


@pytest.mark.parametrize(
    "number, flags, toml, message", FLAGS, ids=[f"{case[0]}" for case in FLAGS]
)
def test_bad_flags_are_one_line_before_torch(tmp_path, number, flags, toml, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "config.toml").write_text(toml)
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    named = [
        "--base_model=embedded",
        "--train_data=arithmetic:train:9",
        f"--config={tmp_path}/config.toml",
    ]
    status, line = answer(tmp_path, *named, *flags)
    assert status == 2 and re.fullmatch(message, line.removeprefix(f"{tmp_path}/")), line


def test_a_problem_of_many_rows_is_said_once_with_their_number_and_three_of_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((TEXT + '{"text": 1}\n' + "{,}\n") * 6)
    _, line = answer(tmp_path, "--base_model=embedded", "--train_data", str(path))
    text = "2, 5, 8 and 3 more: text is 1; expected a text that is not empty"
    assert line.startswith(f"{path}: 12 bad rows: {text}; 3, 6, 9 and 3 more: not JSON (")
    assert line.count("not JSON") == 1

    # Of different problems the first ten are listed.
    path.write_text("".join(f'{{"text": {i}}}\n' for i in range(12)))
    _, line = answer(tmp_path, "--base_model=embedded", "--train_data", str(path))
    assert re.findall(r"(\d+): text is (\d+);", line) == [(str(i + 1), str(i)) for i in range(10)]
    assert line.endswith("; ...")


# 13, 14, 15
def test_a_bom_line_ends_of_windows_and_a_line_separator_in_a_text_are_no_faults(tmp_path):
    text = '{"text": "one\u2028two"}\n{"text": "three"}\n'
    forms = {
        "plain": text.encode(),
        "bom": text.encode("utf-8-sig"),
        "crlf": text.replace("\n", "\r\n").encode(),
    }
    found = {}
    for name, content in forms.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        found[name] = [example.text for example in read([str(tmp_path / f"{name}.jsonl")], "lm")]
    assert (
        found["plain"] == ["one\u2028two", "three"]
        and found["bom"] == found["crlf"] == found["plain"]
    )


# ------------------------------------------------------------------------------- what needs a model


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """train_lora.py as a program: (exit status, its line on stderr, what it printed); an error
    leaves nothing behind.
    """

    def call(*flags, name="train_lora.py"):
        status, out, err = script(
            monkeypatch, capsys, ROOT / name, "--output_dir", tmp_path / "out", *flags
        )
        if status:
            assert err.count("\n") == 1 and err.startswith("error: "), err
        return status, err.removeprefix("error: ").strip(), out

    return call


@pytest.fixture
def base(tiny_base, tmp_path):
    """The flags of a run on a base of one's own; its folder is tmp_path / "base"."""
    shutil.copytree(tiny_base, tmp_path / "base")
    return [
        f"--base_model={tmp_path}/base",
        "--train_data=arithmetic:train:20",
        "--max_length=100",
        "--max_steps=1",
    ]


def refused(train, tmp_path, message, *flags):
    status, line, _ = train(*flags)
    assert status == 2 and re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_8_rows_whose_targets_are_cut_off_are_counted_and_an_error_where_none_is_left(
    train, base, tmp_path
):
    long = chat(("user", "1+1 " * 300), ("assistant", "2"))
    (tmp_path / "long.jsonl").write_text(long)
    (tmp_path / "some.jsonl").write_text(CHAT * 30 + long)
    flags = [base[0], "--max_length=100", "--max_steps=1", f"--eval_data={tmp_path}/some.jsonl"]
    message = "no train example has a target within max_length = 100; raise it"
    refused(train, tmp_path, message, *flags, f"--train_data={tmp_path}/long.jsonl")
    status, _, out = train(*flags, f"--train_data={tmp_path}/some.jsonl")
    assert status == 0 and "1 examples (3.2%) left out, without a target" in out
    assert "warning: 29 training examples repeat an earlier one word for word" in out  # 18


def test_rows_whose_steps_have_no_label_are_not_said_to_be_too_long(train, base, tmp_path):
    row = '{"prompt": "1+%d", "steps": ["2"], "labels": [null]}\n'
    (tmp_path / "steps.jsonl").write_text("".join(row % i for i in range(30)))
    message = (
        "no train example has a step with a label; a step scorer learns from labels, so give some"
    )
    flags = [base[0], "--task=score", f"--train_data={tmp_path}/steps.jsonl", "--max_steps=1"]
    refused(train, tmp_path, message, *flags)


@pytest.mark.parametrize("targets", [["nope_proj"], ["q_proj", "nope_proj"]])
def test_26_a_target_that_matches_nothing_is_refused_and_named(train, base, tmp_path, targets):
    message = "target_modules: 'nope_proj' matches no layer that LoRA adapts; there are .*q_proj"
    refused(train, tmp_path, message, *base, "--target_modules", *targets)


def test_27_a_rank_that_no_layer_has_room_for_is_refused(train, base, tmp_path):
    refused(train, tmp_path, r"lora_r = 999: expected 1\.\.", *base, "--lora_r=999")
    (tmp_path / "c.toml").write_text("[lora]\nrank_pattern = {q_proj = 999999}\n")
    message = r"rank_pattern = 999999: expected 1\.\.32, for which the largest layer has room"
    refused(train, tmp_path, message, *base, f"--config={tmp_path}/c.toml")


@pytest.mark.parametrize(
    "flag", ["--batch_size=1000000000", "--gradient_accumulation_steps=10000000"]
)
def test_a_step_of_more_than_a_hundred_passes_is_refused(train, base, tmp_path, flag):
    message = r"a step of \d+0000000 examples is \d+ passes over the data; expected 100 at most"
    refused(train, tmp_path, message, *base, flag)


def test_a_step_of_more_than_one_pass_says_so(train, base):
    status, _, out = train(*base, "--batch_size=9", "--max_steps=1", "--experiment_name=wide")
    assert status == 0 and "one step is 1.8 passes over the training data" in out


def test_29_a_base_with_a_weight_that_is_not_finite_is_refused(train, base, tmp_path):
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    refused(train, tmp_path, "base_model .*: not finite .*: model.norm.weight", *base)


def test_30_a_base_of_pickles_is_refused(train, base, tmp_path):
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "base" / "pytorch_model.bin")
    refused(
        train,
        tmp_path,
        "no weights in safetensors: pytorch_model.bin may run code when it is read",
        *base,
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (
            lambda whole: whole[: len(whole) // 2],
            r"model.safetensors: [\d,]+ of [\d,]+ bytes; copy it again",
        ),
        (lambda whole: whole + b"x", r"model.safetensors: [\d,]+ of [\d,]+ bytes; copy it again"),
        (lambda whole: b"", "model.safetensors: damaged: 0 bytes"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (lambda whole: b"<html>" * 100, "damaged: 600 bytes that are no safetensors"),
    ],
    ids=["cut", "longer", "empty", "LFS", "HTML"],
)
def test_31_a_damaged_weight_file_is_refused(train, base, tmp_path, content, message):
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    refused(train, tmp_path, message, *base)


def test_32_33_an_adapter_for_another_base_or_without_a_tensor(train, configure, base, tmp_path):
    artifact = run(configure(True, name="first", task="lm", max_steps=1)) / "final_artifact"
    for step, changed in enumerate((False, True)):
        if changed:
            tiny_llama(tie_word_embeddings=True, initializer_range=0.5).save_pretrained(
                tmp_path / "base"
            )
        flags = [f"--init_from={artifact}", f"--experiment_name={step}", "--task=lm"]
        status, _, out = train(*base, *flags)
        assert status == 0 and ("does not hold the weights that" in out) == changed
    path = artifact / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "layers.1.mlp" not in name}, path)
    (artifact / "checksums.json").unlink()
    write_checksums(artifact)
    status, line, _ = train(*base, f"--init_from={artifact}", "--task=lm", "--experiment_name=x")
    assert (
        status == 2
        and "the adapter has no tensors for " in line
        and not (tmp_path / "out" / "x").exists()
    )


def test_34_without_a_template_it_is_chatml_and_said(train, base, tmp_path):
    (tmp_path / "chat.jsonl").write_text(CHAT * 9)
    for path in (tmp_path / "base").glob("chat_template*"):
        path.unlink()
    data = [f"--{name}={tmp_path}/chat.jsonl" for name in ("train_data", "eval_data")]
    status, _, out = train(base[0], *data, "--max_length=100", "--max_steps=1")
    assert status == 0 and "the tokenizer has no chat template: using ChatML" in out


def test_35_a_token_beyond_the_embeddings_is_refused(train, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "a.jsonl").write_text('{"text": "some <more> text"}\n' * 9)
    data = [f"--{name}={tmp_path}/a.jsonl" for name in ("train_data", "eval_data")]
    message = "its tokenizer writes '<more>' as 2048, and its embeddings have 2048 rows"
    refused(train, tmp_path, message, base[0], *data, "--max_length=100")


def test_36_more_positions_than_the_model_has_are_refused(train, base, tmp_path):
    refused(
        train,
        tmp_path,
        "max_length = 4096: .* has 512 positions; add --max_length 512",
        *base,
        "--max_length=4096",
    )


def test_37_39_what_the_checkpoint_was_made_with_must_be_there_again(train, base, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(TEXT * 9)
    flags = [
        base[0],
        f"--train_data={data}",
        f"--eval_data={data}",
        "--max_length=100",
        "--experiment_name=a",
        "--resume_from=auto",
    ]
    assert train(*flags, "--max_steps=2", "--save_steps=1")[0] == 0

    def tells(message, *more):
        before = {
            path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
        }
        status, line, _ = train(*flags, "--max_steps=4", *more)
        assert status == 2 and re.search(message, line), line
        assert before == {
            path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
        }

    tells(r"seed \(42 -> 7\); --allow_change seed allows it", "--seed=7")
    message = (
        r"learning_rate \(0.0001 -> 0.1\), weight_decay \(0.0 -> 1.0\); --allow_change "
        r"learning_rate,weight_decay"
    )
    tells(message, "--learning_rate=0.1", "--weight_decay=1")
    tells("--allow_change seeed: no such key. Did you mean seed?", "--allow_change=seeed")
    tells(r"dtype \(auto -> bfloat16\)", "--dtype=bfloat16")
    data.write_text(TEXT * 8 + TEXT.replace("a text", "another"))
    tells(
        r"train_data \(data.jsonl \w{8} -> data.jsonl \w{8}\), eval_data .*; --allow_change "
        r"train_data,eval_data allows it"
    )
    allowed = ["--allow_change", "train_data", "eval_data"]
    tells("eval_data changed: .* compared; name a new --experiment_name", *allowed)
    checkpoint = tmp_path / "out" / "a" / "checkpoints" / "checkpoint_step_2"
    flags += [f"--resume_from={checkpoint}", "--experiment_name=with_other_data"]
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, weights, {"format": "pt"})
    tells(r"base_model \(model.safetensors \w{8} -> model.safetensors \w{8}\)", *allowed)
    assert train(*flags, "--max_steps=3", *allowed, "base_model")[0] == 0


def test_40_a_folder_that_is_there_or_in_use_is_left_alone(train, base, tmp_path):
    folder = tmp_path / "out" / "a"
    folder.mkdir(parents=True)
    status, line, _ = train(*base, "--experiment_name=a")
    assert (
        status == 2
        and f"{folder} exists; choose another --experiment_name" in line
        and not any(folder.iterdir())
    )
    code = (
        "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print(flush=True); input()"
    )
    (folder / "logs").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", code, folder / "logs" / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    (folder / "logs" / "train_metrics.jsonl").write_text("kept")
    status, line, _ = train(*base, "--experiment_name=a", "--resume_from=auto")
    holder.kill()  # its lock file stays, and is no lock
    holder.communicate()
    assert status == 2 and f"{folder}: another process is training there" in line
    assert (folder / "logs" / "train_metrics.jsonl").read_text() == "kept" and not (
        folder / "status.json"
    ).exists()
    assert (folder / "logs" / "lock").exists()
    assert train(*base, "--experiment_name=a", "--resume_from=auto")[0] == 0


def test_43_a_port_that_is_taken_is_one_line(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in dict(
            RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        ).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end, one_line_errors():
            process_group.join(torch.device("cpu"))
    assert end.value.code == 4 and capsys.readouterr().err.startswith(
        f"error: port {port} is taken"
    )


# -------------------------------------------------------------------------- 48: what would run code


class Canary:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile_pickle_base(base, canary):
    (base / "model.safetensors").unlink()
    torch.save({"a": Canary(canary)}, base / "pytorch_model.bin")


def hostile_index(name):
    def make(base, canary):
        elsewhere = (base / "model.safetensors").rename(base.parent / "elsewhere.safetensors")
        files = {key: name.format(elsewhere) for key in load_file(elsewhere)}
        (base / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files})
        )
        shutil.copy(elsewhere, base / "other.safetensors")

    return make


def hostile_code(base, canary):
    (base / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
    config = json.loads((base / "config.json").read_text())
    maps = {
        "AutoConfig": "modeling_x.X",
        "AutoModel": "modeling_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
    }
    (base / "config.json").write_text(json.dumps(config | {"model_type": "x", "auto_map": maps}))


def hostile_tokenizer(base, canary):
    (base / "tokenization_x.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
    path = base / "tokenizer_config.json"
    maps = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "X", "auto_map": maps})
    )
    (base / "tokenizer.json").unlink()


def hostile_template(template):
    def make(base, canary):
        (base / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))

    return make


OUT = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% "
    "endfor %}{% endfor %}{% endfor %}"
)
HOSTILE = {
    "base of pickles": (hostile_pickle_base, "no weights in safetensors"),
    "index with ..": (
        hostile_index("../elsewhere.safetensors"),
        "is not the name of a file beside it",
    ),
    "index with a whole path": (hostile_index("{}"), "is not the name of a file beside it"),
    "model of its own code": (hostile_code, "base_model .*"),
    "tokenizer of its own code": (hostile_tokenizer, "base_model .*"),
    "template that opens files": (
        hostile_template("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"),
        "the chat template of .* refuses it",
    ),
    "template without an end": (
        hostile_template(OUT),
        r"the chat template of .* does not come to an end \(TimeoutError\)",
    ),
    "template that divides by nothing": (
        hostile_template("{{ 1 / 0 }}"),
        "the chat template of .* refuses it: division by zero",
    ),
    "template of two million letters": (
        hostile_template("{{ 'a' * 2 * 10**6 }}"),
        "makes 2,000,000 characters",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_48_a_hostile_base_is_refused_and_runs_nothing(train, base, tmp_path, monkeypatch, name):
    make, message = HOSTILE[name]
    canary = tmp_path / "canary"
    monkeypatch.setattr("lora.data.chat_template.RENDER_TIMEOUT", 0.2)
    make(tmp_path / "base", canary)
    (tmp_path / "chat.jsonl").write_text(CHAT * 9)
    data = [f"--{name}={tmp_path}/chat.jsonl" for name in ("train_data", "eval_data")]
    refused(train, tmp_path, message, base[0], *data, "--max_length=100", "--max_steps=1")
    assert not canary.exists()


def adapter_with(**values):
    def make(folder, canary):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return make


def pickled_adapter(folder, canary):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Canary(canary)}, folder / "adapter_model.bin")


def linked_adapter(folder, canary):
    moved = (folder / "adapter_model.safetensors").rename(canary.with_name("moved"))
    (folder / "adapter_model.safetensors").symlink_to(moved)


HOSTILE_ADAPTERS = {
    "of pickles": (
        pickled_adapter,
        "only safetensors adapters are read; convert it there: python -c",
    ),
    "a link": (linked_adapter, "a link that leads out of its folder"),
    "with an endless regex": (
        adapter_with(rank_pattern={"(a+)+$": 4}),
        "invalid values: rank_pattern",
    ),
    "with many options": (
        adapter_with(alpha_pattern={".?" * 30 + "b": 4}),
        "invalid values: alpha_pattern",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_ADAPTERS)
def test_48_a_hostile_adapter_is_refused_and_runs_nothing(train, configure, base, tmp_path, name):
    make, message = HOSTILE_ADAPTERS[name]
    folder = run(configure(True, name="first", max_steps=1))
    part = folder / "checkpoints" / "checkpoint_step_1" / "lora_adapter"
    adapter = shutil.copytree(part, tmp_path / "adapter")
    make(adapter, tmp_path / "canary")
    refused(train, tmp_path, message, *base, "--task=score", f"--init_from={adapter}")
    assert not (tmp_path / "canary").exists()


def test_48_an_adapter_names_a_base_that_is_never_looked_up(train, configure, base, tmp_path):
    folder = run(configure(True, name="first", max_steps=1))
    part = folder / "checkpoints" / "checkpoint_step_1" / "lora_adapter"
    adapter = shutil.copytree(part, tmp_path / "adapter")
    adapter_with(base_model_name_or_path="/etc", target_modules="(a+)+$")(adapter, None)
    assert train(*base, "--task=score", f"--init_from={adapter}")[0] == 0


def test_the_source_reads_no_pickle():
    for path in [*ROOT.glob("*.py"), *(ROOT / "lora").rglob("*.py")]:
        text = path.read_text()
        assert not re.search(
            r"\bimport pickle|pickle\.load|weights_only=False|trust_remote_code=True|"
            r"(?<![.\w])eval\(|yaml\.(load|full_load|unsafe_load)",
            text,
        ), path
        # There in the hint to convert
        assert "torch.load(" not in text or path.name == "adapter_format.py", path


def test_files_have_the_mode_that_umask_gives(configure):
    before = os.umask(0o027)
    try:
        folder = run(configure(True, max_steps=1))
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o640}
