"""What a run says, where it is written to a file and in a terminal; and what Ctrl-C does."""

import io
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora.common import exit_status
from lora.common.errors import Interrupted, UserError
from lora.common.exit_status import one_line_errors
from lora.common.known_errors import as_known_error, resume_command
from lora.common.paths import ROOT
from lora.common.signals import begin_loading_torch, leave_at_once
from lora.config.command_line import read_command_line
from lora.config.schema import Config
from lora.data.sampler import TrainingData
from lora.export.final_artifact import log_doubts
from lora.training import cached_features, log
from tests.conftest import run, script
from tests.scripts.test_reliability import at_call, signals


def test_a_file_gets_a_line_for_every_logged_step_evaluation_and_checkpoint(configure, capsys):
    folder = run(configure(True, max_steps=12, logging_steps=2, eval_steps=6))
    out = capsys.readouterr().out
    training = r"loss \d\.\d{4}, lr \d\.\d\de-\d\d, \d+ tokens/s"
    assert re.search(rf"^Step 8/12 \(66\.7%\) {training}$", out, re.M)  # before ten steps
    assert re.search(rf"^Step 10/12 \(83\.3%\) {training}, \d\d:\d\d left$", out, re.M)
    assert re.search(rf"^Step 12/12 \(100\.0%\) {training}$", out, re.M)
    numbers = r"\d\.\d{6}, r2 -?\d+\.\d{4}"
    assert re.search(rf"^Step 0/12 \(0\.0%\) validation loss: {numbers}$", out, re.M)
    assert re.search(rf"^Step 6/12 \(50\.0%\) New best validation loss: {numbers} \*$", out, re.M)
    saved = re.escape(f"{folder}/checkpoints/checkpoint_step_12")
    assert re.search(rf"^Saved {saved}: \d\.\d MB in \d\.\d s$", out, re.M)

    # The text log has the same lines, each with its time.
    (path,) = folder.glob("logs/train_*.log")
    text = path.read_text()
    for line in re.findall(r"^(?:Step|Saved) .*$", out, re.M):
        assert re.search(rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {re.escape(line)}$", text, re.M), line


def test_an_evaluation_that_is_no_better_has_no_star(configure, capsys):
    run(configure(True, "lm", task="lm", learning_rate=1.0, max_steps=6, eval_steps=3))
    lines = re.findall(r"^Step [36]/6 .*loss: .*$", capsys.readouterr().out, re.M)
    assert len(lines) == 2 and all(", perplexity " in line for line in lines)
    first, second = [float(re.search(r"loss: ([\d.]+)", line)[1]) for line in lines]
    assert lines[0].endswith(" *") and lines[1].endswith(" *") == (second < first)


@pytest.mark.parametrize("learning_rate, is_worse", [(3.0, True), (1e-3, False)])
def test_a_run_that_is_worse_than_its_beginning_says_so(configure, capsys, learning_rate, is_worse):
    run(configure(True, learning_rate=learning_rate, max_steps=4, eval_steps=2))
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"validation loss: ([\d.]+), r2", out)]
    assert is_worse == (losses[0] < min(losses[1:]))
    before = f"its value before training ({losses[0]:.4f}); try a lower --learning_rate"
    warning = f"warning: the validation loss never fell below {before}"
    assert (warning in out) == is_worse


@pytest.mark.parametrize(
    "before, r2, best_step, last_step, expected",
    [
        (0.1, 0.0, 30, 30, "warning: the validation loss never fell below its value before"),
        (1.0, 0.0, 30, 30, "warning: r2 is 0.0000, no better than if every step had the mean"),
        (1.0, 0.5, 30, 30, "note: the loss was lowest after the last of only 30 steps; more"),
        (1.0, None, 30, 30, "note: the loss was lowest after the last of only 30 steps; more"),
        (1.0, 0.5, 20, 30, ""),
        (1.0, 0.5, 50, 50, ""),
    ],
)
def test_a_run_says_where_it_may_have_learned_too_little(
    tmp_path, before, r2, best_step, last_step, expected
):
    metrics = tmp_path / "logs" / "train_metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text(json.dumps({"step": 0, "val/loss": before}) + "\n")
    lines = []
    log = SimpleNamespace(run_dir=tmp_path, say=lines.append)
    log_doubts({"step": best_step, "val": {"loss": 0.5, "r2": r2}}, last_step, log)
    assert len(lines) == bool(expected) and "".join(lines).startswith(expected)


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_says_that_its_whole_model_is_rounded(configure, tiny_base, tmp_path, capsys, lora):
    base = tmp_path / "bfloat16"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    folder = run(configure(lora, task="lm", base_model=str(base), max_steps=2))
    note = "note: the artifact is rounded to the base's bfloat16; these numbers are of float32"
    assert (note in capsys.readouterr().out) != lora
    card = (folder / "final_artifact" / "README.md").read_text()
    assert ("weights here are rounded to bfloat16, the base's" in card) != lora
    tensors = load_file(next((folder / "final_artifact").glob("*model.safetensors")))
    assert {tensor.dtype for tensor in tensors.values()} == {
        torch.float32 if lora else torch.bfloat16
    }


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_after_the_first_evaluation_and_a_time_after_ten_steps(
    configure, monkeypatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    run(configure(True, max_steps=14, logging_steps=2, eval_steps=7))
    shown = terminal.getvalue()
    assert shown.index("Step 0/14") < shown.index("0/14 [")
    assert not re.search(r"^Step 2/14", shown, re.M)  # the bar has it
    postfix = [line for line in shown.split("\r") if "tokens/s" in line]
    with_time = [line for line in postfix if " left]" in line]
    assert with_time and all(re.search(r"1[0-4]/14 \[", line) for line in with_time)
    assert not re.search(r"/14 \[[^\]]*[<?]", shown)  # tqdm's own time


def test_the_pass_over_a_frozen_base_says_how_far_it_is(configure, monkeypatch, capsys):
    monkeypatch.setattr(cached_features, "BATCHES_AT_ONCE", 1)
    run(configure(True, lora_r=0, batch_size=1, max_length=64, max_steps=12))
    lines = re.findall(r"^features of train: .*$", capsys.readouterr().out, re.M)
    total = len(lines)
    assert total > 10
    for number, line in enumerate(lines, 1):
        left = r", \d\d:\d\d left" if 10 <= number < total else ""
        place = rf"{number}/{total} \({number / total:.1%}\)"
        assert re.fullmatch(f"features of train: micro-batch {place}{left}", line), line


def test_a_run_of_many_epochs_over_a_frozen_base_lists_one(configure, monkeypatch):
    asked = []
    rows_at = TrainingData.rows_at

    def counted(data, step):
        asked.append(step)
        return rows_at(data, step)

    class Ended(Exception):
        pass

    def end(*_):
        raise Ended

    monkeypatch.setattr(TrainingData, "rows_at", counted)
    monkeypatch.setattr(cached_features, "with_features", end)
    with pytest.raises(Ended):
        run(configure(True, lora_r=0, max_steps=10**15))
    assert max(asked) < 100


def test_the_end_names_the_next_commands_and_they_work(configure, monkeypatch, capsys, tmp_path):
    run(configure(True, "its run", max_steps=1))
    out = capsys.readouterr().out
    for start, name in (("try it:", "eval.py"), ("merge it:", "merge.py")):
        (line,) = re.findall(rf"^{start} +python (.*)$", out, re.M)
        shell = ["bash", "-c", f"printf '%s\\0' {line}"]
        words = subprocess.run(shell, capture_output=True, text=True).stdout.split("\0")[:-1]
        assert words[0] == name
        words = [str(tmp_path / word) if word == "merged" else word for word in words]
        status, _, error = script(monkeypatch, capsys, ROOT / name, *words[1:])
        assert status == 0, error


# ------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_says_at_once_what_happens_and_at_the_end_what_happened(
    configure, monkeypatch, capfd
):
    config = configure(True, max_steps=12)
    monkeypatch.setattr(log.Log, "say", lambda self, line: print(line, file=sys.stderr))
    with pytest.raises(SystemExit) as end, one_line_errors(), monkeypatch.context() as patch:
        at_call(patch, TrainingData, "batch_at", 6, signals(signal.SIGINT))
        run(config)
    lines = capfd.readouterr().err.splitlines()
    said = lines.index("finishing this step and saving; again to leave without saving")
    (saved,) = [i for i, line in enumerate(lines) if line.startswith("Saved ") and "step_6" in line]
    assert end.value.code == 130 and said < saved
    assert lines[-1].startswith("stopped by SIGINT after step 6, which is saved.")


def test_a_run_on_several_machines_goes_on_by_the_command_that_began_it(configure, monkeypatch):
    folder = run(configure(True, max_steps=1))
    checkpoint = folder / "checkpoints" / "checkpoint_step_1"
    monkeypatch.setattr(sys, "argv", ["train_lora.py"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for processes, command in [
        ("2", "torchrun --nproc_per_node=2 train_lora.py"),
        ("4", "the same command for every process, with"),
    ]:
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert resume_command(folder) == f"{command} --resume_from {checkpoint}"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped.", signal.SIGINT)])
def test_an_interruption_is_no_error(error, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == 130
    assert re.fullmatch(r"(interrupted|stopped)\.\n", capsys.readouterr().err)


@pytest.fixture
def slow_torch(tmp_path):
    """The environment of a process in which importing torch is interrupted by Ctrl-C."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "except BaseException:\n"  # as some modules do
        "    raise ImportError\n"
    )
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize(
    "words",
    [
        ["train_lora.py", "--max_steps=1"],
        ["train.py", "--max_steps=1"],
        ["merge.py", "--adapter=.", "--output=b"],
    ],
    ids=lambda words: words[0],
)
def test_before_torch_a_line_is_printed_and_ctrl_c_ends_it_in_one(slow_torch, tmp_path, words):
    command = [sys.executable, ROOT / words[0], *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=slow_torch)
    assert done.stdout == "loading torch ...\n"
    assert done.stderr == "interrupted.\n" and done.returncode == 130


def test_ctrl_c_is_awaited_before_the_line_is_printed(monkeypatch):
    handlers = []

    class Output(io.StringIO):
        def write(self, text):
            handlers.append(signal.getsignal(signal.SIGINT))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "torch")
            patch.setattr(sys, "stdout", Output())
            begin_loading_torch()
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(handlers) == {leave_at_once}


def test_help_does_not_load_torch(slow_torch):
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=slow_torch)
    assert done.returncode == 0 and "loading" not in done.stdout and not done.stderr


# ------------------------------------------------------------------------ what were tracebacks once


@pytest.mark.parametrize(
    "fails",
    [
        lambda folder: (folder / ("a" * 300)).mkdir(),
        lambda folder: (folder / ("a/" * 3000)).mkdir(parents=True),
        lambda folder: open(folder / "none" / "file"),
        lambda folder: (folder / "file").touch() or os.listdir(folder / "file"),
        lambda folder: os.symlink("loop", folder / "loop") or open(folder / "loop"),
        lambda folder: save_file({}, folder / "none" / "file"),
    ],
    ids=["name", "path", "missing", "no folder", "loop", "safetensors"],
)
def test_what_the_system_refuses_is_one_line(fails, tmp_path, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        fails(tmp_path)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert line.startswith("error: ") and len(line) < 400


def test_a_folder_that_is_deleted_while_it_trains_is_one_line(configure, monkeypatch):
    config = configure(True, max_steps=12)
    folder = Path(config.output.output_dir) / config.output.experiment_name

    def delete(result):
        shutil.rmtree(folder)
        return result

    with pytest.raises(Exception) as end:
        at_call(monkeypatch, TrainingData, "batch_at", 5, delete)
        run(config)
    error = as_known_error(end.value)
    assert isinstance(error, UserError) and str(folder) in str(error)


def test_a_step_may_take_no_time_by_a_coarse_clock(configure, monkeypatch):
    """As Windows' time.monotonic, which goes on by 16 ms, before Python 3.13."""
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    run(configure(True, max_steps=1))


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "2"}, {"RANK": "abc"}, {"WORLD_SIZE": "two"}, {"RANK": "3"}, {"RANK": ""}],
    ids=str,
)
def test_variables_of_torchrun_without_it_are_one_line(variables, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(exit_status, "PATIENCE", 0)  # nobody ends the others here
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise AssertionError("this is not reached")
    line = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch("error: environment: RANK=.*torchrun.*\n", line)


def test_an_output_that_nobody_reads_to_its_end_is_no_error():
    code = "from lora.common.exit_status import one_line_errors\n"
    code += "with one_line_errors():\n    for i in range(100_000): print(i)"
    shell = f"{sys.executable} -c '{code}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


def test_runs_without_a_name_that_start_in_one_second_have_two(monkeypatch):
    folders = set()
    monkeypatch.setattr("time.strftime", lambda format: "20261129-154200")
    for process in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        folders.add(read_command_line([], Config(), "tiny_full.toml", "").run_dir)
    assert len(folders) == 2
