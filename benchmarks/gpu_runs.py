"""The correctness parts (e) to (h) of benchmarks/gpu.py: what a run does on a device."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
import gc
import os
from pathlib import Path
import tempfile
import warnings

from gpu_work import (
    MISSED,
    SAME_SUMS,
    Check,
    Place,
    at_most,
    largest,
    largest_difference,
    losses_in,
    make_rows,
    make_run,
    make_task,
    mixed_lengths,
    train_in,
)
from safetensors.torch import load_file
import torch
from torch import Tensor

from lora.common.signals import StopSignal
from lora.data.batches import Batch
from lora.model.task import Task
from lora.training.gradients import GradientAccumulation
from lora.training.log import Log
from lora.training.memory_plan import plan_memory

MEMORY_TOLERANCE = 0.1
SYNCS_PER_STEP = 2  # the loss with its flags, and the norm of the gradients


def resumed_is_uninterrupted(place: Place) -> list[Check]:
    """(e) 10 steps = 5 steps and a resume"""
    with deterministic():
        differing, difference, losses = resume_difference(place)
    _, without, losses_without = resume_difference(place)
    return [
        at_most("tensors of the last checkpoint that differ, deterministic", differing, 0),
        at_most("... by", difference, 0),
        at_most("losses of steps 6 to 10, deterministic", losses, 0),
        Check("tensors without the deterministic mode", f"{without:.2g}"),
        Check("losses without the deterministic mode", f"{losses_without:.2g}"),
    ]


@contextmanager
def deterministic() -> Iterator[None]:
    """Let torch use deterministic algorithms alone in the block."""
    # cuBLAS reads it at a process's first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def resume_difference(place: Place) -> tuple[int, float, float]:
    """Compare a run of 10 steps with one that resumes its checkpoint of step 5.

    Returns:
        How many tensors of the last checkpoints differ, the largest difference of a value in them,
        and that of the losses of the steps after the resume.
    """
    settings = {"max_steps": 10, "eval_steps": 5, "save_steps": 5, "batch_size": 2}
    settings["gradient_accumulation_steps"] = 2
    shape = place.correctness_shape()
    rows = make_rows(mixed_lengths(place, count=64, longest=1024), shape["vocab_size"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_in(folder / "whole", make_run(place, make_task(place, shape), rows, settings))
        middle = folder / "whole" / "checkpoints" / "checkpoint_step_5"
        run = make_run(place, make_task(place, shape), rows, settings)
        train_in(folder / "resumed", run, str(middle))
        whole, resumed = (last_tensors(folder / part) for part in ("whole", "resumed"))
        whole_losses = losses_in(folder / "whole")[5:]
        resumed_losses = losses_in(folder / "resumed")
    assert whole.keys() == resumed.keys() and len(resumed_losses) == 5
    loss_differences = [abs(a - b) for a, b in zip(whole_losses, resumed_losses)]
    differences = []
    for key, tensor in whole.items():
        differences.append((resumed[key].float() - tensor.float()).abs().max().item())
    differing = sum(difference != 0 for difference in differences)
    return differing, largest(differences), largest(loss_differences)


def last_tensors(run_folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint of step 10: weights and optimizer."""
    checkpoint = run_folder / "checkpoints" / "checkpoint_step_10"
    tensors = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[f"{file.name} {name}"] = tensor
    return tensors


def out_of_memory_halves(place: Place) -> list[Check]:
    """(f) Where memory runs out, the step is halved and its gradients stay"""
    shape = place.correctness_shape()
    rows = make_rows([place.tokens(2048)] * 8, shape["vocab_size"])
    settings = {"batch_size": 8, "gradient_accumulation_steps": 1}
    run = make_run(place, make_task(place, shape), rows, settings)
    num_tokens = run.data.max_tokens
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder) / "run", run.config, max_steps=1)
        scaler = torch.amp.GradScaler(place.device_type, enabled=False)
        accumulation = GradientAccumulation(run, scaler, StopSignal(), log)
        loss, expected, whole_peak = one_step(accumulation)
        run.data.max_tokens = num_tokens // 2
        _, _, half_peak = one_step(accumulation)
        run.data.max_tokens = num_tokens
        with memory_between(run.task, num_tokens, half_peak, whole_peak):
            halved_loss, found, _ = one_step(accumulation)
        log.close()
    return [
        at_most(
            "tokens of a micro-batch, of the whole step", run.data.max_tokens / num_tokens, 0.5
        ),
        at_most("loss", abs(halved_loss / loss - 1), SAME_SUMS),
        at_most("gradients", largest_difference(found, expected), SAME_SUMS),
    ]


def one_step(accumulation: GradientAccumulation) -> tuple[float, dict[str, Tensor], int]:
    """Return the loss of step 0, its gradients, and the most memory that CUDA had reserved."""
    task = accumulation.run.task
    task.zero_grad()
    start_counting_memory()
    loss, _ = accumulation.of_step(0)
    found = {}
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return loss, found, torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0


@contextmanager
def memory_between(task: Task, num_tokens: int, half_peak: int, whole_peak: int) -> Iterator[None]:
    """Give the block memory (bytes) for more than half the step, and not for all of it.

    On a CPU, which has no such limit, an error is raised for `num_tokens` in a micro-batch.
    """
    if task.model.device.type == "cuda":
        start_counting_memory()
        total = torch.cuda.get_device_properties(task.model.device).total_memory
        torch.cuda.set_per_process_memory_fraction((half_peak + whole_peak) / 2 / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def refuse(module: Task, inputs: tuple[Batch]) -> None:
        if inputs[0].input_ids.numel() >= num_tokens:
            raise torch.OutOfMemoryError("out of memory, as if")

    hook = task.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def start_counting_memory() -> None:
    """Give back what is not used, and forget CUDA's peak."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def planned_memory_is_taken(place: Place) -> list[Check]:
    """(g) The memory that --dry_run foresees = CUDA's peak"""
    ways = {
        "LoRA": (True, {}),
        "LoRA, checkpointed": (True, {"gradient_checkpointing": True}),
        "full": (False, {}),
    }
    checks = []
    for name, (lora, settings) in ways.items():
        foreseen, taken = memory_of(place, lora, settings)
        what = f"{name}: {foreseen / 1e9:.2f} GB foreseen"
        if taken is None:
            checks.append(Check(what, MISSED))
            continue
        what += f", {taken / 1e9:.2f} GB taken; off by"
        checks.append(at_most(what, abs(foreseen / taken - 1), MEMORY_TOLERANCE))
    return checks


def memory_of(place: Place, lora: bool, settings: dict) -> tuple[int, int | None]:
    """Return the bytes that are foreseen for a run, and CUDA's peak in it."""
    start_counting_memory()
    before = torch.cuda.memory_allocated() if place.is_cuda else 0
    shape = place.correctness_shape()
    rows = make_rows([place.tokens(2048)] * 8, shape["vocab_size"])
    sizes = {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    run = make_run(place, make_task(place, shape, lora), rows, settings | sizes)
    foreseen = sum(plan_memory(run, run.data.largest_batches()).values())
    start_counting_memory()
    with tempfile.TemporaryDirectory() as folder:
        train_in(Path(folder) / "run", run)
    taken = torch.cuda.max_memory_allocated() - before if place.is_cuda else None
    return foreseen, taken


def synchronisations(place: Place) -> list[Check]:
    """(h) A step waits for the device twice, a micro-batch never"""
    what = "waits in a step of 4 micro-batches"
    few, many = waits(place, 2), waits(place, 6)
    if not place.is_cuda:
        return [Check(what, MISSED)]
    per_step = {}
    for line, count in (many - few).items():
        per_step[line] = count / 4
    found = sum(per_step.values())
    passed = found == SYNCS_PER_STEP  # fewer would mean that they are not counted
    checks = [Check(what, f"{found:g}", str(SYNCS_PER_STEP), passed)]
    return checks + [Check(f"... at {line}", f"{count:g}") for line, count in per_step.items()]


def waits(place: Place, steps: int) -> Counter[str]:
    """Return how often a run waits for CUDA, by file and line; without one, nothing."""
    shape = place.correctness_shape()
    settings = {"max_steps": steps, "batch_size": 1, "gradient_accumulation_steps": 4}
    rows = make_rows([place.tokens(512)] * 24, shape["vocab_size"])
    run = make_run(place, make_task(place, shape), rows, settings)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if place.is_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            train_in(Path(folder) / "run", run)
        finally:
            if place.is_cuda:
                torch.cuda.set_sync_debug_mode("default")
    found: Counter[str] = Counter()
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    return found
