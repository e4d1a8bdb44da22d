"""Every command of the README runs for two steps on the sample rows; or it is named below, with a
reason.
"""

import glob
import json
from pathlib import Path
import re
import runpy
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer

from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.paths import ROOT
from lora.config.schema import get_lora_config
from lora.config.set_keys import DTYPE_SWITCHES, fields_by_key
from tests.conftest import tiny_llama
from tests.data.test_step_readers import prm800k_row, prm800k_step, rating

README = (ROOT / "README.md").read_text()
SAMPLES = ROOT / "assets" / "samples"
NOT_RUN = {  # how a command begins -> why it is not run here
    "pip install": "the first of the two commands; .ci/run starts from a bare environment with it",
    "pytest": "this suite",
    "python benchmarks/": "minutes each; their results are in benchmarks/results/",
    "python train_lora.py --lora_r 16": "the default run: tests/scripts/test_slow.py",
    "python train.py --config configs/tiny_base.toml": "pretraining of a quarter of an hour",
    "torchrun --nnodes=2": "two machines; tests/distributed/test_distributed.py has two processes",
    "srun torchrun": "Slurm",
    "vllm serve": "vLLM needs a GPU; tests/export/test_merge.py holds the folder to transformers",
    "llama-server": "tests/export/test_gguf.py reads the file with llama.cpp's library",
}
NOT_RUN_SECTIONS = {
    "Measured": "runs of minutes, which tests/scripts/test_slow.py and benchmarks/ repeat"
}
# The task of outputs/RUN
RUN = {"Recipes": "lm", "Process reward models": "score", "What it looks like": "score"}
SHORT = [
    "--max_steps=2",
    "--eval_steps=2",
    "--save_steps=1",
    "--batch_size=2",
    "--gradient_accumulation_steps=1",
]
# Each is followed by the path that is written
WRITES = ("--output", "--html", "--gguf", "--plot", "--reliability")
# Qwen's base has that token
MARKED = ["--add_special_tokens", "<extra_0>", "--modules_to_save", "embed_tokens"]
PROGRAMS = ("python", "torchrun", "srun", "pip", "pytest", "vllm", "llama-server")
# Each program prints its arguments instead of running, so that the shell reads quotes and loops,
# and not this file.
PRINTED = "".join(f"{p}() {{ printf '%s\\0' {p} \"$@\"; printf '\\1'; }}\n" for p in PROGRAMS)


def sections():
    """{title: its text} of the README."""
    return dict(part.split("\n", 1) for part in re.split(r"^## ", README, flags=re.M)[1:])


def commands(text):
    """The commands in blocks and between backticks, each a list of words."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```$", "", text, flags=re.M | re.S))
    lines = [*blocks, *(line for line in inline if line.split()[0] in PROGRAMS)]
    shell = PRINTED + "\n".join(re.sub(r"^\$ ", "", line, flags=re.M) for line in lines)
    out = subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout
    return [command.split("\0")[:-1] for command in out.split("\1")[:-1]]


def runs(words):
    return not any(" ".join(words).startswith(start) for start in NOT_RUN)


def eqasc_row(n):
    chain = [{"text": "f"}, {"text": "g"}, {"turk_label": {"label": "yes"}}]
    choices = [{"label": "A", "text": "wind", "df": None, "chains": [chain]}]
    question = {"stem": f"What is {n}?", "choices": choices}
    return {"id": str(n), "fact1": "f", "fact2": "g", "answerKey": "A", "question": question}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with all that the README's commands name: scripts, configurations, a base M, files
    of data.
    """
    for name in ("train.py", "train_lora.py", "eval.py", "merge.py", "configs", "assets", "lora"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, sample in {
        "chats.jsonl": "chat.jsonl",
        "other.jsonl": "chat.jsonl",
        "few.jsonl": "critical.jsonl",
        "questions.jsonl": "questions.jsonl",
        "corpus.jsonl": "corpus.jsonl",
        "text.txt": "text.txt",
    }.items():
        (tmp_path / name).symlink_to(SAMPLES / sample)
    tiny_llama(tie_word_embeddings=True, max_position_embeddings=4096).save_pretrained(
        tmp_path / "M"
    )
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(tmp_path / "M")
    steps = [
        {"prompt": f"{n}+{n}+1", "steps": [f"{n}+{n}={2 * n}", "wrong"], "labels": [1, 0]}
        for n in range(30)
    ]
    for name, rows in {
        "steps.jsonl": steps,
        "gsm8k.json": steps[:9],
        "math.json": steps[9:18],
        "prm800k.jsonl": [
            prm800k_row([prm800k_step([rating("right", 1)], chosen=0)], f"problem {n}")
            for n in range(30)
        ],
        "eqasc.json": map(eqasc_row, range(30)),
        "queries.jsonl": [{"query": "When is it open?", "relevant": ["opening-hours"]}],
    }.items():
        text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps([*rows])
        (tmp_path / name).write_text(text)
    (tmp_path / "my.toml").write_text(
        "[model]\nbase_model = 'M'\n[data]\ntrain_data = ['chats.jsonl']\n"
    )
    monkeypatch.chdir(tmp_path)


def run(words, monkeypatch):
    """The exit status of a command of Python, in this process; torchrun's is one process."""
    words = [word for word in words if not word.startswith(("--nproc_per_node", "--max_restarts"))][
        1:
    ]
    words = [
        found
        for word in words
        for found in (sorted(glob.glob(word)) if word.startswith("outputs/r*") else [word])
    ]
    module = words[0] == "-m"
    words = words[1:] if module else words
    monkeypatch.setattr(sys, "argv", words)
    try:
        (runpy.run_module if module else runpy.run_path)(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def shortened(words):
    """The command with as few steps as will show that it runs."""
    if words[1] == "eval.py" and "--test_set" in words:
        return [*words, "--max_new_tokens=4"]
    if "train" not in words[1] and words[0] != "torchrun" or "--help" in words:
        return words
    if "--resume_from" in words and "auto" not in words:
        return [*(word.replace("step_500", "step_2") for word in words), "--max_steps=3"]
    return [*words, *SHORT, *(MARKED if "configs/qwen_math_prm.toml" in words else [])]


def written(words):
    """What a command has to leave, by its own words: the files it names, or the run it makes."""
    found = [Path(name) for flag, name in zip(words, words[1:]) if flag in WRITES]
    if (
        words[0] == "torchrun"
        or words[1].startswith("train")
        and not {"--help", "--dry_run", "--check"} & {*words}
    ):
        ended = Path("outputs").glob("*/final_artifact/training_metrics.json")
        found.append(max(ended, key=lambda path: path.stat().st_mtime))
        assert json.loads(found[-1].read_text())["best"]["loss"] > 0
    if "report" in words:
        found.append(Path(words[-1]) / "report.html")
    return found


TITLES = [
    title
    for title, text in sections().items()
    if title not in NOT_RUN_SECTIONS and any(map(runs, commands(text)))
]


@pytest.mark.parametrize("title", TITLES)
def test_every_command_of_a_section_runs_and_leaves_what_it_names(
    title, place, monkeypatch, capsys
):
    kind = RUN.get(title)
    data = "chats.jsonl" if kind == "lm" else "steps.jsonl"
    first = (
        f"python train_lora.py --base_model M --task {kind} --train_data {data} "
        f"--experiment_name RUN"
    )
    first = [*first.split(), "--learning_rate=1e-2"]  # an adapter that does something
    for words in [first] * bool(kind) + [*filter(runs, commands(sections()[title]))]:
        began = time.time()
        status = run(shortened(words), monkeypatch)
        out, err = capsys.readouterr()
        assert status == 0 and out, (" ".join(words), err)
        for path in written(words):
            # A file's clock ticks more slowly
            assert path.stat().st_mtime > began - 0.1, (" ".join(words), path)


def test_every_exception_stands_in_the_readme():
    found = [" ".join(words) for text in sections().values() for words in commands(text)]
    assert NOT_RUN_SECTIONS.keys() <= sections().keys()
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in found), start


def test_every_flag_in_the_readme_is_one_of_ours():
    known = {*fields_by_key(get_lora_config())}
    flags_of = (
        "lora/config/command_line.py",
        "lora/evaluation/eval_arguments.py",
        "lora/tools/compare.py",
    )
    for program in ("train_lora.py", "eval.py", "merge.py", *flags_of):
        known |= set(re.findall(r"--([a-z0-9_]+)", (ROOT / program).read_text()))
    # Torchrun's
    assert set(re.findall(r"`--(\w+)(?!-)\b", README)) <= known | {*DTYPE_SWITCHES, "max_restarts"}
