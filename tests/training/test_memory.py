"""Running out of memory costs time and changes nothing: a step does not depend on how it is cut."""

import json
from pathlib import Path
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.llama.modeling_llama import LlamaMLP

from lora import inject
from lora.common.errors import (
    ResourceExhausted,
    UserError,
    is_out_of_memory,
    library_errors,
)
from lora.common.operating_system import available_memory_bytes
from lora.config.command_line import Command
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.data.token_cache import load_or_tokenise
from lora.model.device import autocast, choose_dtype
from lora.model.load import load_task
from lora.model.placement import prepare_layers
from lora.model.run import Run
from lora.model.task import Task
from lora.training import best_checkpoints
from lora.training.memory_limit import USABLE, memory_limit
from lora.training.memory_plan import (
    MemoryCounter,
    count_step,
    drop_gradient,
    needs_checkpointing,
    plan_memory,
)
from lora.training.startup import choose_checkpointing
from tests.conftest import run
import train_lora

WHOLE = {
    "task": "lm",
    "max_steps": 4,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length": 128,
    "learning_rate": 1e-3,
}


def short_of_memory(monkeypatch, tokens):
    """A device on which micro-batches of more than so many tokens do not fit; returns the sizes
    that were tried.
    """
    forward, tried = Task.forward, []

    def limited(self, batch):
        tried.append(batch.input_ids.numel())
        if batch.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, batch)

    monkeypatch.setattr(Task, "forward", limited)
    return tried


def lines(folder, *names):
    metrics = [
        json.loads(line)
        for line in (folder / "logs" / "train_metrics.jsonl").read_text().splitlines()
    ]
    found = [[line[name] for name in names] for line in metrics if names[0] in line]
    assert found
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("lora, tokens", [(True, 250), (True, 130), (False, 200)])
def test_a_step_that_did_not_fit_is_redone_in_smaller_micro_batches_with_the_same_gradients(
    configure, monkeypatch, lora, tokens
):
    whole = run(configure(lora, "whole", **WHOLE))
    tried = short_of_memory(monkeypatch, tokens)
    cut = run(configure(lora, "cut", **WHOLE))
    assert max(tried) > tokens
    names = ("train/loss", "train/grad_norm")
    torch.testing.assert_close(lines(cut, *names), lines(whole, *names), rtol=1e-6, atol=0)
    kept = json.loads((cut / "checkpoints/checkpoint_step_4/trainer_state.json").read_text())[
        "max_tokens"
    ]
    assert kept <= tokens < WHOLE["batch_size"] * WHOLE["max_length"]
    tried.clear()  # the step that a resumed run begins with is cut as before
    run(configure(lora, "cut", **WHOLE | {"max_steps": 5}), cut / "checkpoints/checkpoint_step_4")
    assert max(tried) <= tokens


def test_the_largest_micro_batch_of_the_run_is_tried_before_the_first_step(configure, monkeypatch):
    tried, sizes = [], []

    def record(name, step_of):
        original = getattr(TrainingData, name)

        def recorded(self, *arguments):
            batches = original(self, *arguments)
            tried.append(step_of(*arguments))
            sizes.append(max(sum(batch.seq_lens) for batch in batches))
            return batches

        monkeypatch.setattr(TrainingData, name, recorded)

    record("largest_batches", lambda: None)
    record("batch_at", lambda step: step)
    run(configure(True, **WHOLE))
    assert tried == [None, 0, 1, 2, 3] and sizes[0] == max(sizes)


def test_halved_micro_batches_are_those_of_a_resumed_run_and_none_is_larger_than_what_fits(
    configure,
):
    config = configure(True, train_data=["arithmetic:train:400"], gradient_accumulation_steps=3)
    data = planned_run(config, False).data
    for _ in range(3):
        data.halve_micro_batches(data.longest_rows)
        resumed = TrainingData(data.rows, data.held_out, config, True, 0, 1, data.layout)
        fits = data.largest_group(data.longest_rows)
        for step in range(40):
            rows = data.rows_at(step)
            batches = zip(data.local_batches(rows), resumed.local_batches(rows), strict=True)
            assert all(batch.rows == again.rows for batch, again in batches)
            assert data.largest_group(rows) <= fits


def test_a_single_example_that_does_not_fit_ends_the_run_in_one_line(configure, monkeypatch):
    short_of_memory(monkeypatch, 30)
    with pytest.raises(
        ResourceExhausted, match="out of memory on a single example of .* --gradient_checkpointing"
    ):
        run(configure(True, **WHOLE))


def test_a_process_without_rows_does_not_keep_the_others_from_reporting_it(configure):
    config = configure(True, batch_size=1, gradient_accumulation_steps=1)
    data = planned_run(config, False).data
    of_two = TrainingData(data.rows, data.held_out, config, True, 0, 2, data.layout)
    with pytest.raises(ResourceExhausted, match="on a single example"):
        of_two.halve_micro_batches(of_two.rows_at(0))


def test_an_error_that_is_not_for_want_of_memory_stays_one(configure, monkeypatch):
    monkeypatch.setattr(Task, "forward", lambda self, batch: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run(configure(True, **WHOLE))


def test_batch_size_auto_is_the_default_batch_size_in_one_micro_batch_where_it_fits(
    configure, monkeypatch
):
    fixed = run(
        configure(True, "fixed", **WHOLE | {"batch_size": 4, "gradient_accumulation_steps": 3})
    )
    tried = short_of_memory(monkeypatch, 10**9)
    auto = run(
        configure(True, "auto", **WHOLE | {"batch_size": "auto", "gradient_accumulation_steps": 3})
    )
    assert len(tried) == 1 + WHOLE["max_steps"]
    torch.testing.assert_close(
        lines(auto, "train/loss"), lines(fixed, "train/loss"), rtol=1e-6, atol=0
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not kill for memory")
def test_on_a_cpu_an_allocation_beyond_the_available_memory_fails_and_can_be_handled(monkeypatch):
    size = 500_000_000  # bytes: more than a 10,000th of a machine's memory
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
    with memory_limit(torch.device("cpu")):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(size, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    torch.empty(size, dtype=torch.int8)
    with memory_limit(torch.device("cuda")):
        torch.empty(size, dtype=torch.int8)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not kill for memory")
def test_the_largest_step_of_a_run_on_a_cpu_is_tried_under_that_limit(configure, monkeypatch):
    import resource

    forward, limits = Task.forward, []

    def recorded(self, batch):
        limits.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
        return forward(self, batch)

    before = resource.getrlimit(resource.RLIMIT_DATA)[0]
    monkeypatch.setattr(Task, "forward", recorded)
    run(configure(True, **WHOLE))
    assert limits[0] not in (before, resource.RLIM_INFINITY)
    assert set(limits[1:]) == {before}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not kill for memory")
def test_what_the_optimizer_will_take_counts_against_that_limit(configure, monkeypatch):
    available = available_memory_bytes()
    # Linux would grant as much as the machine has.
    monkeypatch.setattr("train.optimizer_bytes", lambda *arguments: int(0.97 * available))
    with pytest.raises(RuntimeError) as caught:
        run(configure(True, **WHOLE))
    assert is_out_of_memory(caught.value)


def planned_run(config, checkpointing):
    cpu = torch.device("cpu")
    task = load_task(config, torch.float32).train()
    if config.lora:
        inject(task.model, r=4)
    prepare_layers(task.model, config.training, checkpointing)
    rows, held_out, _ = load_or_tokenise(RawData(config), task)
    return Run(task, config, TrainingData(rows, held_out, config), cpu, torch.float32)


def planned_bytes(run):
    return sum(plan_memory(run, run.data.largest_batches()).values())


def test_layers_are_checkpointed_where_memory_would_not_do_without(configure, monkeypatch):
    # What this process holds already is not the step's.
    monkeypatch.setattr("lora.training.memory_plan.resident_bytes", lambda: None)
    config = configure(True, **WHOLE)
    without = planned_bytes(planned_run(config, False))
    with_checkpointing = planned_bytes(planned_run(config, True))
    assert with_checkpointing < without
    run_without = planned_run(config, False)
    assert not needs_checkpointing(run_without, int(without / USABLE) + 1)
    assert needs_checkpointing(run_without, int(without / USABLE) - 1)
    assert needs_checkpointing(run_without, int(with_checkpointing / USABLE))


def test_a_step_that_may_be_cut_is_not_checkpointed_before_a_single_example_asks_for_it(
    configure, monkeypatch
):
    monkeypatch.setattr("lora.training.memory_plan.resident_bytes", lambda: None)
    planned = planned_run(configure(True, **WHOLE | {"batch_size": "auto"}), False)
    just_too_little = int(planned_bytes(planned) / USABLE) - 1
    assert not needs_checkpointing(planned, just_too_little)
    assert needs_checkpointing(planned, 0)


def test_layers_that_are_computed_again_are_counted_with_weights_without_contents(
    configure, monkeypatch
):
    """The real ones lie on another device in a dry run on a GPU."""
    plain_forward, is_fake = LlamaMLP.forward, []

    def forward(mlp, x):
        is_fake.append(isinstance(mlp.up_proj.weight, FakeTensor))
        return plain_forward(mlp, x)

    planned = planned_run(configure(False, **WHOLE), True)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    count_step(planned, planned.data.largest_batches()[:1])
    assert is_fake == [True] * 4  # two layers, twice


def test_the_gradients_of_sharded_weights_do_not_stay(configure, monkeypatch):
    planned = planned_run(configure(False, **WHOLE), False)
    batches = planned.data.largest_batches()[:1]
    monkeypatch.setattr("lora.training.memory_plan.num_shards", lambda run: 8)
    parts = plan_memory(planned, batches)
    parameters = list(planned.task.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    with MemoryCounter("cpu") as counting:
        loss, _ = planned.task(batches[0])
        loss.backward()
    # The batch's few numbers are counted in one of the two
    assert abs((parts["activations"] + parts["head"]) / counting.peak - 1) < 0.02
    assert parts["gradients"] == sum(parameter.nbytes for parameter in parameters) // 8


def test_the_choice_is_in_the_checkpoint_and_a_resumed_run_keeps_it(configure, monkeypatch, capsys):
    assert not choose_checkpointing(planned_run(configure(True), False), None)  # on a CPU
    with monkeypatch.context() as patch:
        patch.setattr("lora.training.startup.choose_checkpointing", lambda run, state: True)
        folder = run(configure(True, **WHOLE))
    saved = folder / "checkpoints" / "checkpoint_step_4"
    state = best_checkpoints.trainer_state(saved)
    assert state["facts"]["gradient_checkpointing"]
    assert state["config"]["training"]["gradient_checkpointing"] == "auto"
    choices = []

    def recorded(run, state):
        choices.append(choose_checkpointing(run, state))
        return choices[-1]

    monkeypatch.setattr("lora.training.startup.choose_checkpointing", recorded)
    run(configure(True, **WHOLE | {"max_steps": 5}), saved)
    assert choices == [True]


def test_a_checkpoint_from_before_the_choice_says_in_its_configuration_what_it_did(configure):
    for before in (True, False):
        state = {"facts": {}, "config": {"training": {"gradient_checkpointing": before}}}
        assert choose_checkpointing(planned_run(configure(True), False), state) == before


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("asked", [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_what_is_foreseen_without_contents_is_what_a_step_holds(configure, lora, asked):
    config, cpu = configure(lora, **WHOLE | asked), torch.device("cpu")
    dtype = choose_dtype(config, cpu)
    task = load_task(config, dtype if lora else torch.float32).train()
    if lora:
        inject(task.model, r=4)
    prepare_layers(task.model, config.training, config.training.gradient_checkpointing is True)
    rows, held_out, _ = load_or_tokenise(RawData(config), task)
    data = TrainingData(rows, held_out, config)
    parts = plan_memory(Run(task, config, data, cpu, dtype), data.largest_batches())
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert parts["gradients"] == 4 * trained and parts["optimizer"] == 8 * trained
    assert parts["weights"] == sum(
        {p.data_ptr(): p.nbytes for p in (*task.parameters(), *task.buffers())}.values()
    )
    with MemoryCounter("cpu") as counting:
        for batch in data.largest_batches():
            with autocast(cpu, dtype):
                loss, _ = task(batch)
            loss.backward()
    held = parts["gradients"] + parts["activations"] + parts["head"]
    # The batch's few numbers are counted in one of the two
    assert abs(held / counting.peak - 1) < 0.02


def test_a_dry_run_says_what_would_be_and_leaves_nothing(configure, capsys):
    config = configure(True, **WHOLE)
    train_lora.main(
        Command(config, Path(config.output.output_dir) / "run", dry_run=True), RawData(config)
    )
    out = capsys.readouterr().out
    assert "4 steps of 8 examples" in out and "total  " in out and "time: " in out
    assert not (Path(config.output.output_dir) / "run").exists()


def test_what_cannot_be_counted_is_said_in_one_line(configure, tmp_path, monkeypatch):
    """A model that computes with the values of its tensors, which are not there."""
    plain_forward = LlamaMLP.forward

    def forward(mlp, x):
        x.sum().item()
        return plain_forward(mlp, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    config = configure(True, **WHOLE | {"dtype": "float32"})
    with pytest.raises(UserError, match="--dry_run: this model cannot be counted in torch.float32"):
        train_lora.main(Command(config, tmp_path / "run", dry_run=True), RawData(config))


def test_memory_that_runs_out_while_weights_are_read_is_no_mistake_of_the_user():
    for error, kept in (
        (RuntimeError("can't allocate memory"), RuntimeError),
        (RuntimeError("size mismatch"), UserError),
    ):
        with pytest.raises(kept), library_errors("weights"):
            raise error
