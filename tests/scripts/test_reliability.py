"""What a run survives. The slow tests are benchmarks/reliability.py, which kills its own runs."""

import json
import math
import os
from pathlib import Path
import signal
import subprocess
import sys

import pytest

from lora.common import atomic_files
from lora.common.checksums import find_damage
from lora.common.errors import Interrupted, UserError
from lora.common.exit_status import one_line_errors
from lora.common.paths import ROOT
from lora.config.command_line import Command, read_command_line
from lora.config.schema import get_lora_config
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.model.task import Task
from lora.training import best_checkpoints, cached_features
from lora.training.best_checkpoints import saved_states
from lora.training.log import SPIKE_WINDOW
from tests.conftest import run, script
from tests.training.test_resume import files, metrics
import train_lora


def at_call(monkeypatch, owner, method, number, what):
    """Have `what` done in the number-th call of a method; it is given what the method returns, and
    may return another.
    """
    undisturbed, called = getattr(owner, method), []

    def counted(*arguments, **named):
        called.append(1)
        result = undisturbed(*arguments, **named)
        return what(result) if len(called) == number else result

    monkeypatch.setattr(owner, method, counted)


def signals(number):
    def send(result):
        os.kill(os.getpid(), number)
        return result

    return send


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_and_the_resumed_one_equals_the_undisturbed(
    configure, monkeypatch, number
):
    settings = dict(lora_dropout=0.3, max_steps=8)
    whole = run(configure(True, "whole", **settings))
    config = configure(True, "cut", **settings)
    before = signal.getsignal(number)
    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match="after step 6, which is saved") as end,
    ):
        # The sixth call is that of step 5
        at_call(patch, TrainingData, "batch_at", 6, signals(number))
        run(config)
    assert end.value.status == 128 + number and signal.getsignal(number) is before
    states = saved_states(Path(config.output.output_dir) / "cut" / "checkpoints")
    assert states[-1]["step"] == 6 and states[-1]["val"]  # an evaluation that is due is made
    cut = run(config, states[-1]["path"])
    last = "checkpoints/checkpoint_step_8"
    assert files(cut / last) == files(whole / last) and metrics(cut) == metrics(whole)


@pytest.mark.parametrize(
    "owner, method, lora_r",
    [(cached_features, "outputs_at_targets", 0), (Task, "save_artifact", 16)],
    ids=["before", "after"],
)
def test_sigterm_outside_of_the_steps_is_recorded(
    configure, tmp_path, monkeypatch, owner, method, lora_r
):
    """In linear probing's features before them, and while the artifact is written after them."""
    config = configure(True, lora_r=lora_r, max_steps=2)
    command = Command(config, tmp_path / "run", "", False)
    before = signal.getsignal(signal.SIGTERM)
    at_call(monkeypatch, owner, method, 1, signals(signal.SIGTERM))
    with pytest.raises(SystemExit) as end, one_line_errors(command.status):
        train_lora.main(command, RawData(config))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert end.value.code == status["exit"] == 143 and signal.getsignal(signal.SIGTERM) is before
    assert status["error"].startswith("ended by SIGTERM.")
    assert not (tmp_path / "run" / "final_artifact").exists()
    last = status["error"].partition(" --resume_from ")[2]
    assert bool(last) == (method == "save_artifact")
    if last:
        assert (run(config, last) / "final_artifact" / "adapter_model.safetensors").is_file()


def test_a_second_signal_leaves_at_once():
    code = (
        "import time; from lora.common.signals import catch_signals\n"
        "with catch_signals():\n    print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_nothing_is_renamed_before_all_of_it_is_durable(tmp_path, monkeypatch):
    """A SIGKILL cannot show this, since what was written is in the machine's memory: so the order
    of the calls.
    """
    calls = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(path, target):
        calls.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with atomic_files.atomic_folder(tmp_path / "final") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
        (folder / "b").write_text("b")
    temporary = tmp_path / ".tmp_final"
    durable_before = {
        str(path)
        for path in (temporary, temporary / "inner", temporary / "inner" / "a", temporary / "b")
    }
    assert set(calls[:4]) == durable_before and calls[4:] == [
        "rename",
        str(tmp_path),
        str(tmp_path.parent),
    ]


def test_a_start_clears_what_a_killed_run_left_and_sets_damaged_checkpoints_aside(configure):
    config = configure(True, max_steps=12, eval_steps=3, save_steps=2)
    folder = run(config) / "checkpoints"
    steps = [state["step"] for state in saved_states(folder)]
    newest, second = (
        folder / f"checkpoint_step_{step}" for step in sorted(steps, reverse=True)[:2]
    )
    for name in (".tmp_checkpoint_step_13", ".del_checkpoint_step_1"):
        (folder / name).mkdir()
    (folder / "checkpoint_step_2_mine").mkdir()  # somebody's copy, which is nobody else's business
    # A run was killed when it put another in its place
    second.rename(folder / f".old_{second.name}")
    (newest / "trainer_state.json").write_text("{}")
    flags = [
        f"--base_model={config.model.base_model}",
        "--train_data=arithmetic:train:60",
        "--resume_from",
    ]
    with pytest.raises(
        UserError,
        match="checkpoint_step_12: damaged: 'trainer_state.json': changed; --resume_from auto "
        "takes",
    ):
        read_command_line([*flags, str(newest)], get_lora_config(), "", "")
    said = best_checkpoints.recover(folder.parent, 12)
    assert len(said) == 1 and said[0].startswith(
        f"warning: {newest}: damaged ('trainer_state.json': changed); set aside as"
    )
    names = {path.name for path in folder.iterdir()}
    assert names == {f"checkpoint_step_{step}" for step in steps if step != 12} | {
        "damaged_checkpoint_step_12",
        "checkpoint_step_2_mine",
    }
    assert not find_damage(second, "trainer_state.json")


def test_a_step_that_is_not_finite_may_be_left_out(configure, monkeypatch, capsys):
    at_call(monkeypatch, Task, "forward", 6, lambda result: (result[0] * float("nan"), result[1]))
    folder = run(configure(True, batch_size=8, gradient_accumulation_steps=1, skip_nonfinite=1))
    assert (
        "step 4: loss nan, gradient norm nan; the update is skipped (1 of at most 1)"
        in capsys.readouterr().out
    )
    assert saved_states(folder / "checkpoints")[-1]["skipped"] == 1
    losses = {line["step"]: line["train/loss"] for line in metrics(folder) if "train/loss" in line}
    assert losses.pop(5) is None and None not in losses.values() and len(losses) == 11


def test_a_loss_far_above_the_others_is_said_also_after_one_that_is_no_number(
    configure, monkeypatch, capsys
):
    for call, factor in ((4, math.nan), (SPIKE_WINDOW + 7, 1000)):
        at_call(
            monkeypatch, Task, "forward", call, lambda result, f=factor: (result[0] * f, result[1])
        )
    settings = dict(batch_size=8, gradient_accumulation_steps=1, max_grad_norm=1e-3)
    run(configure(True, max_steps=SPIKE_WINDOW + 10, skip_nonfinite=1, **settings))
    said = [line for line in capsys.readouterr().out.splitlines() if "loss spike" in line]
    assert len(said) == 1 and said[0].startswith(f"step {SPIKE_WINDOW + 6}: loss spike: ")


def test_status_json_says_how_a_run_ended(tiny_base, tmp_path, monkeypatch, capsys):
    def call(name, *flags):
        command = [
            ROOT / "train_lora.py",
            "--output_dir",
            tmp_path,
            "--experiment_name",
            name,
            "--base_model",
            tiny_base,
        ]
        command += ["--task=score", "--train_data=arithmetic:train:20", "--max_length=100", *flags]
        exit_status, _, err = script(monkeypatch, capsys, *command)
        return exit_status, err, json.loads((tmp_path / name / "status.json").read_text())

    assert call("good", "--max_steps=1")[::2] == (0, {"exit": 0, "error": None})
    exit_status, err, status = call(
        "bad", "--max_steps=9", "--learning_rate=1e30", "--warmup_steps=0", "--save_steps=1"
    )
    assert exit_status == status["exit"] == 3 and err.endswith(f"error: {status['error']}\n")
    assert "Stopped: step" in (tmp_path / "bad" / "error.log").read_text()


# -------------------------------------------------------------------------------------- the harness


# A tenth of what benchmarks/results/reliability.md counts.
PARTS = {
    "kills crash_points": ["--kills=12", "--stride=17"],
    "resumes": ["--stride=7"],  # of the 48 pairs of kind and place
    "signals lost_process damaged_checkpoints full_disk not_finite": ["--stride=5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
def test_every_run_that_is_killed_or_damaged_ends_as_promised(parts):
    command = [sys.executable, "benchmarks/reliability.py", *PARTS[parts], "--only", *parts.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
