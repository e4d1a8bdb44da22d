"""`--dry_run`: the memory of a run by part, and its time, without training."""

from collections.abc import Callable
import math
import time

import numpy as np
import torch

from lora.common.errors import ResourceExhausted
from lora.common.operating_system import physical_memory_bytes
from lora.data.batches import Batch
from lora.distributed.collectives import broadcast_from_rank_zero
from lora.distributed.process_group import processes_on_this_machine, world_size
from lora.evaluation.predict import predict
from lora.model.placement import place_on_device
from lora.model.run import Run
from lora.training.checkpoint import trainable_parameters
from lora.training.gradients import backward
from lora.training.memory_limit import USABLE
from lora.training.memory_plan import fits, plan_memory
from lora.training.optimizer import make_optimizer
from lora.training.schedule import total_steps

ENOUGH_SECONDS = 4.0  # that a part of a step or of an evaluation takes, at least


def dry_run(run: Run) -> None:
    """Print the memory that the run would take and, if that fits, the time."""
    # Where weights are to be sharded, only the first process has them.
    if not broadcast_from_rank_zero(print_memory, run):
        return
    place_on_device(run.task, run.config, run.device, run.dtype)
    print(describe_time(run))


def print_memory(run: Run) -> bool:
    """Print the memory that the run would take; return whether the device has it."""
    parts = plan_memory(run, run.data.largest_batches())
    needed = sum(parts.values())
    if run.device.type == "cuda":
        available = torch.cuda.get_device_properties(run.device).total_memory
    else:
        available = (physical_memory_bytes() or 0) // processes_on_this_machine()
    print("peak memory, at a step of the longest examples:")
    for name, size in parts.items():
        print(f"  {name:12}{size / 1e9:9.3f} GB")
    total = f"  {'total':12}{needed / 1e9:9.3f} GB"
    if available:
        total += f" of {available / 1e9:.0f} GB on this {run.device.type}"
        if world_size() > 1:
            total += " for each process"
        if not fits(needed, available):
            then = ""
            if run.config.lora or world_size() == 1:
                then = "; training would try smaller micro-batches"
            print(f"{total}: it does not fit in {USABLE:.0%} of that{then}")
            return False
    print(total, flush=True)
    return True


def describe_time(run: Run) -> str:
    """Time a part of a step and of an evaluation, and say how long the whole run takes."""
    data, settings = run.data, run.config.training
    steps = total_steps(settings, data.steps_per_epoch)
    evaluations = 1 + math.ceil(steps / settings.eval_steps)
    if run.task.frozen:  # a frozen base reads each row only once
        steps = min(steps, math.ceil(data.steps_per_epoch))
        evaluations = 1

    def train(batches: list[Batch]) -> None:
        scaler = torch.amp.GradScaler(enabled=False)
        _, out_of_memory = backward(run, batches, data.num_targets_at(0), 0, scaler)
        if out_of_memory:
            raise ResourceExhausted("out of memory in a part of a step; lower --batch_size.")

    def evaluation_batches(rows: np.ndarray) -> list[Batch]:
        return data.held_out.batches(rows, data.max_tokens, data.packed)

    def evaluate(batches: list[Batch]) -> None:
        predict(run.task, batches, run.device, run.dtype)

    run.task.train()
    step_seconds = time_part(data.rows_at(0), data.local_batches, train, stride=1)
    # A new optimizer's learning rate is 0: the weights stay as they are.
    optimizer = make_optimizer(trainable_parameters(run.task), run.config, run.device)
    optimizer.step()  # makes its state
    step_seconds += seconds_of(optimizer.step)
    rows = data.evaluation_rows()
    evaluation_seconds = time_part(rows, evaluation_batches, evaluate, stride=world_size())
    seconds = steps * step_seconds + evaluations * evaluation_seconds
    plural = "s" if evaluations > 1 else ""
    each = f"{steps} steps of {step_seconds:.2f} s and {evaluations} evaluation{plural} of"
    return f"time: about {seconds:.0f} s: {each} {evaluation_seconds:.2f} s"


def time_part(rows: np.ndarray, make_batches: Callable, work: Callable, stride: int) -> float:
    """Return the seconds that `work` takes for all rows, from a part of them.

    A part is the first rows; it is doubled until it takes ENOUGH_SECONDS. The time is scaled by the
    tokens of the first process, which has every `stride`-th micro-batch.
    """
    count = world_size()
    part = make_batches(rows[:count])
    work(part)  # the first pass is slower
    while True:
        # All processes must run a sharded model equally often: the first one's clock decides.
        seconds = broadcast_from_rank_zero(float, seconds_of(work, part))
        if seconds >= ENOUGH_SECONDS or count >= len(rows):
            break
        count *= 2
        part = make_batches(rows[:count])
    share = num_tokens(part[::stride]) / num_tokens(make_batches(rows)[::stride])
    return seconds / share


def seconds_of(work: Callable, *arguments: list[Batch]) -> float:
    started = time.monotonic()
    work(*arguments)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.monotonic() - started


def num_tokens(batches: list[Batch]) -> int:
    return sum(sum(batch.seq_lens) for batch in batches)
