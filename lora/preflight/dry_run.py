"""`--dry_run`: the memory of a run by part, and its time, without training."""

import math
import time

import torch

from lora.common.operating_system import physical_memory_bytes
from lora.distributed.collectives import broadcast_from_rank_zero
from lora.evaluation.predict import evaluate
from lora.model.placement import place_on_device
from lora.model.run import Run
from lora.training.gradients import backward
from lora.training.memory_plan import plan_memory
from lora.training.schedule import total_steps


def dry_run(run: Run) -> None:
    """Print the memory that the run would take and, if that fits, the time."""
    # Where weights are to be sharded, only the first process has them.
    if not broadcast_from_rank_zero(print_memory, run):
        return
    place_on_device(run.task, run.config, run.device, run.dtype)
    steps = total_steps(run.config.training, run.data.steps_per_epoch)
    if run.task.frozen:  # a frozen base reads each row only once
        steps = min(steps, math.ceil(run.data.steps_per_epoch))
    print(describe_time(run, steps))


def print_memory(run: Run) -> bool:
    """Print the memory that the run would take; return whether the device has it."""
    parts = plan_memory(run)
    needed = sum(parts.values())
    if run.device.type == "cuda":
        available = torch.cuda.get_device_properties(run.device).total_memory
    else:
        available = physical_memory_bytes()
    print("peak memory, at a step of the longest examples:")
    for name, size in parts.items():
        print(f"  {name:12}{size / 1e9:9.3f} GB")
    total = f"  {'total':12}{needed / 1e9:9.3f} GB"
    if available:
        total += f" of {available / 1e9:.0f} GB on this {run.device.type}"
        if needed >= available:
            print(f"{total}: it does not fit")
            return False
    print(total)
    return True


def describe_time(run: Run, steps: int) -> str:
    """Time a step and an evaluation, and say how long `steps` steps with their evaluations take."""
    train_step(run)  # the first one is slower
    started = time.monotonic()
    train_step(run)
    step_seconds = time.monotonic() - started
    started = time.monotonic()
    evaluate(run)
    evaluation_seconds = time.monotonic() - started
    evaluations = 1 + math.ceil(steps / run.config.training.eval_steps)
    seconds = steps * step_seconds + evaluations * evaluation_seconds
    each = f"{steps} steps of {step_seconds:.2f} s and {evaluations} evaluations of"
    return f"time: about {seconds:.0f} s: {each} {evaluation_seconds:.2f} s"


def train_step(run: Run) -> None:
    batches, num_targets = run.data.batch_at(0), run.data.num_targets_at(0)
    loss, _ = backward(run, batches, num_targets, 0, torch.amp.GradScaler(enabled=False))
    loss.item()  # waits for the device
