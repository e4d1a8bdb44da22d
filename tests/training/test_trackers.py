"""--report_to: the metrics arrive, and nothing that goes wrong there stops a run."""

import signal
import sys
from types import SimpleNamespace

import pytest

from lora.common.errors import Interrupted, Stopped, UserError
from lora.config import cross_checks
from lora.config.command_line import read_command_line
from lora.config.schema import get_lora_config
from lora.tools.finished_run import FinishedRun
from lora.training import trackers
from tests.conftest import run

FLAGS = ["--base_model", "embedded", "--train_data", "arithmetic:train:9", "--report_to"]


def test_a_package_that_is_not_there_is_one_line_before_torch(monkeypatch):
    monkeypatch.setattr(cross_checks, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"report_to wandb: the package is not there: pip install 'plainlora\[wandb\]'",
    ):
        read_command_line([*FLAGS, "wandb"], get_lora_config(), None, "")
    with pytest.raises(UserError, match="mlflow': expected one of tensorboard, wandb"):
        read_command_line([*FLAGS, "mlflow"], get_lora_config(), None, "")


def test_wandb_gets_what_the_runs_own_file_has(configure, monkeypatch):
    """Against a stand-in for the package: its service is not for tests."""
    got, ended, asked = [], [], {}
    session = SimpleNamespace(
        log=lambda values, step: got.append((step, dict(values))),
        finish=lambda exit_code: ended.append(exit_code),
    )
    package = SimpleNamespace(init=lambda **given: asked.update(given) or session, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", package)
    folder = run(configure(True, report_to=["wandb"], max_steps=3))
    lines = [
        {k: v for k, v in line.items() if k not in ("step", "timestamp")}
        for line in FinishedRun.of(folder).lines
    ]
    assert [values for _, values in got] == lines and [step for step, _ in got] == [0, 1, 2, 3, 3]
    assert (
        asked["name"] == folder.name
        and asked["config"]["lora"]["lora_r"] == 16
        and asked["resume"] == "allow"
    )
    # A run of the caller's stays as it is, and ours has ended, as its status there says.
    assert asked["reinit"] == "create_new" and ended == [0]
    with pytest.raises(Stopped):
        run(configure(True, "stopped", report_to=["wandb"], max_steps=3, learning_rate=1e30))
    assert ended == [0, 1]


def test_wandb_being_down_is_said_once_and_stops_nothing(configure, monkeypatch):
    def init(**_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    folder = run(configure(True, report_to=["wandb"]))
    (log,) = (folder / "logs").glob("train_*.log")
    assert (
        log.read_text().count(
            "report_to wandb: ConnectionError: no route to host; the run goes on without it"
        )
        == 1
    )
    assert (folder / "final_artifact").is_dir()


def test_tensorboard_has_the_curve(configure):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure(True, report_to=["tensorboard"], max_steps=6, save_steps=3)
    folder = run(config)
    run(
        configure(True, report_to=["tensorboard"], max_steps=9),
        folder / "checkpoints" / "checkpoint_step_6",
    )
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    curve = {event.step: event.value for event in found.Scalars("val/loss")}
    assert curve == pytest.approx(
        dict(FinishedRun.of(folder).curve()), rel=1e-6
    )  # they are kept in fp32


def test_a_tracker_that_breaks_midway_is_left(tmp_path, monkeypatch):
    said, calls = [], []

    def track(step, values):
        calls.append(step)
        raise OSError("gone")

    monkeypatch.setattr(trackers, "wandb", lambda *_: (track, calls.append))
    tracker = trackers.Tracker("wandb", tmp_path, None, 0, said.append)
    tracker.metrics(0, {})
    tracker.metrics(1, {})
    tracker.finish(0)
    assert calls == [0] and len(said) == 1


def test_a_signal_while_a_tracker_ends_ends_the_run(tmp_path, monkeypatch):
    def stop(*_):
        raise Interrupted("stopped", signal.SIGTERM)

    monkeypatch.setattr(trackers, "wandb", lambda *_: (lambda *_: None, stop))
    tracker = trackers.Tracker("wandb", tmp_path, None, 0, print)
    tracker.metrics(0, {})
    with pytest.raises(Interrupted):
        tracker.finish(0)
