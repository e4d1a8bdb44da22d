"""`--dry_run` measures a part, and says how long all of it takes."""

from contextlib import redirect_stdout
import math
from pathlib import Path
import re
from types import SimpleNamespace

import pytest

from lora.config.command_line import Command
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.model.task import Task
from lora.preflight import dry_run
from tests.distributed.test_distributed import run_of
import train
import train_lora

ENDLESS = math.inf  # seconds that nothing takes


def call(config, resume_from=""):
    script = train_lora if config.lora else train
    script.main(Command(config, Path(), dry_run=True), RawData(config))


def count_tokens(monkeypatch, enough):
    """Replace the clock by one that a token moves by a second; return it, and the data it saw."""
    clock, seen = [0], []
    hidden_states, init = Task.hidden_states, TrainingData.__init__

    def counted(self, batch):
        clock[0] += sum(batch.seq_lens)
        return hidden_states(self, batch)

    def recorded(self, *arguments, **more):
        init(self, *arguments, **more)
        seen.append(self)

    monkeypatch.setattr(Task, "hidden_states", counted)
    monkeypatch.setattr(TrainingData, "__init__", recorded)
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(dry_run, "ENOUGH_SECONDS", enough)
    return clock, seen


def printed_seconds(out):
    """(seconds of a step, of an evaluation)."""
    found = re.search(r"steps of ([\d.]+) s and \d+ evaluations? of ([\d.]+) s", out)
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("enough", [0, 100, ENDLESS])
@pytest.mark.parametrize(
    "lora, settings",
    [
        (True, {"task": "lm", "batch_size": 32, "gradient_accumulation_steps": 1}),
        (True, {"batch_size": 1, "gradient_accumulation_steps": 20, "max_length": 64}),
        (True, {"lora_r": 0}),
        (False, {"batch_size": 1, "gradient_accumulation_steps": 1}),
    ],
    ids=["one micro-batch", "many micro-batches", "frozen base", "one example"],
)
def test_the_time_of_a_part_is_scaled_by_its_tokens(
    configure, monkeypatch, capsys, lora, settings, enough
):
    clock, seen = count_tokens(monkeypatch, enough)
    call(configure(lora, **settings))
    (data,) = seen
    of_step = data.size_at(0)
    of_evaluation = sum(sum(batch.seq_lens) for batch in data.evaluation())
    printed = printed_seconds(capsys.readouterr().out)
    assert printed == pytest.approx((of_step, of_evaluation), abs=0.01)


def test_a_slow_machine_computes_a_few_examples_only(configure, monkeypatch):
    clock, seen = count_tokens(monkeypatch, enough=0)
    monkeypatch.setattr(dry_run, "print_memory", lambda run: True)
    call(configure(True, batch_size=8, gradient_accumulation_steps=4))
    (data,) = seen
    longest = data.rows.seq_lens(data.longest_rows).max()
    # The first example of a step and of an evaluation, twice each; and the model's own check
    assert clock[0] < data.size_at(0) / 2 and clock[0] <= 8 * longest


def test_the_memory_is_written_out_before_anything_is_timed(configure, monkeypatch, tmp_path):
    path, before = tmp_path / "out.txt", []
    timed = dry_run.seconds_of

    def recorded(*arguments):
        before.append(path.read_text())
        return timed(*arguments)

    monkeypatch.setattr(dry_run, "seconds_of", recorded)
    with open(path, "w") as file, redirect_stdout(file):
        call(configure(True))
    assert "  total  " in before[0] and "time:" not in before[0]


def test_processes_whose_clocks_differ_time_the_same_part(configure, monkeypatch, tmp_path):
    config = configure(False, task="lm", gradient_accumulation_steps=2, batch_size=1)  # sharded

    def prepare(rank):
        count_tokens(monkeypatch, enough=1)
        if rank == 1:  # for this one no time passes
            monkeypatch.setattr(dry_run, "time", SimpleNamespace(monotonic=lambda: 0))

    out = run_of(2, config, tmp_path, prepare=prepare, start=call)
    # A step of two examples for each process; the first one has the longest.
    step_seconds, _ = printed_seconds(out)
    tokens = int(re.search(r"steps of 4 examples \((\d+) tokens", out)[1])
    assert tokens / 4 < step_seconds < tokens
