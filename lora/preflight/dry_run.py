"""`--dry_run`: what a run would need, memory by part and time, without training."""

from functools import partial
import math
import os
import time

import torch

from lora.model.placement import lay_out
from lora.training.memory_plan import memory


def dry_run(opening, task, data, config, total, device, dtype, backward, evaluate):
    """Print `opening`, the memory that the run would take and, if that fits, the time. backward,
    evaluate: train.py's.
    """
    table, fits = describe_memory(memory(task, data, config, device, dtype), device)
    print(f"{opening}\n{table}")
    if fits:
        lay_out(task, config, device, dtype)
        step = partial(
            backward,
            task,
            data,
            0,
            torch.amp.GradScaler(enabled=False),
            config.training.seed,
            device,
            dtype,
        )
        # A frozen base reads a row once
        passes = min(total, math.ceil(data.steps_per_epoch)) if task.frozen else total
        print(
            describe_time(
                step,
                partial(evaluate, task, data, device, dtype),
                passes,
                config.training.eval_steps,
            )
        )


def describe_memory(parts, device):
    """(what `memory` gave as a table, whether it fits on the device)."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    held = sum(parts.values())
    lines = [f"  {name:12}{size / 1e9:9.3f} GB" for name, size in {**parts, "in all": held}.items()]
    lines[-1] += f" of {there / 1e9:.0f} on this {device.type}" + (
        "" if held < there else ": it does not fit"
    )
    return "\n".join(["memory at the peak, with the longest rows:", *lines]), held < there


def describe_time(step, evaluate, total, every):
    """How long `total` steps take, with an evaluation `every` so many: step() and evaluate() are
    done, by the clock.
    """
    step()  # the first is slower
    times = [time.monotonic()]
    for function in (step, evaluate):
        function()
        times.append(time.monotonic())
    a_step, an_evaluation = times[1] - times[0], times[2] - times[1]
    evaluations = 1 + -(-total // every)
    whole = total * a_step + evaluations * an_evaluation
    return f"time: {whole:.0f} s, {a_step:.2f} s for a step and {an_evaluation:.2f} s for each of {evaluations} evaluations"
