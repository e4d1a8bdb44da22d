"""Where the time of a training step goes on a CPU, per operation, and two ways to save some of it.

    python benchmarks/cpu_profile.py [--threads 2] [--pairs 30] [--output FILE]

The base has the shape and the random weights of the work `small` of benchmarks/peers.py, LoRA is on
all of its linear layers, and a step is one packed micro-batch of 4 documents of mixed length. The
dtype is what --dtype auto takes on the machine.

1. torch's profiler gives the time of each operation itself, without those that it calls. The second
   column of times is the same step under --compile, where inductor writes one kernel for a chain of
   element-wise operations: what an operation loses there is what fusing it saves.
2. LoRA's update is added to the output of the base by one product, `addmm_`, with the scale in the
   small factor. Steps of both kinds alternate in one process, and so does which goes first.
"""

import argparse
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
import statistics
import tempfile
import time

from common import describe_cpu

from lora.common.allocator import keep_freed_memory

keep_freed_memory()  # as the scripts do, before torch is imported

from gpu_work import Place, make_rows, make_run, make_task, mixed_lengths
from peer_work import SHAPES
import torch
from torch import Tensor
import torch._inductor.config
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from lora.common.signals import StopSignal
from lora.layer import LoRALinear
from lora.model.device import cpu_has_bfloat16
from lora.training.checkpoint import trainable_parameters
from lora.training.gradients import GradientAccumulation
from lora.training.log import Log
from lora.training.optimizer import make_optimizer

UNTIMED_STEPS = 2
PROFILED_STEPS = 3
SMALLEST_SHARE = 0.01  # of a step's time; what takes less is one row
DOCUMENTS = 4
LONGEST = 512
FUSED = "fused kernels of inductor"


class Steps:
    """Training steps over the same rows, each by the parts that train.py calls."""

    def __init__(self, folder: Path, compiled: bool = False) -> None:
        place = Place("cpu", "full")
        shape = SHAPES["small"]
        task = make_task(place, shape)
        task.float()  # make_task's base is in bfloat16
        lengths = mixed_lengths(place, DOCUMENTS, LONGEST)
        rows = make_rows(lengths, shape["vocab_size"])
        settings = {"batch_size": DOCUMENTS, "gradient_accumulation_steps": 1, "compile": compiled}
        run = make_run(place, task, rows, settings)
        dtype = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        for parameter in task.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        run = replace(run, dtype=dtype)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.run = run
        self.num_tokens = sum(lengths)
        log = Log(folder, run.config, max_steps=1)
        self.gradients = GradientAccumulation(run, scaler, StopSignal(), log)
        self.parameters = list(trainable_parameters(task).values())
        self.optimizer = make_optimizer(trainable_parameters(task), run.config, run.device)
        for _ in range(UNTIMED_STEPS):
            self.step()

    def step(self) -> float:
        """Make one step and return its seconds."""
        start = time.perf_counter()
        self.gradients.of_step(0)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def milliseconds_by_operation(self) -> dict[str, float]:
        """Return the time that each operation itself takes in a step."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILED_STEPS):
                self.step()
        found: dict[str, float] = defaultdict(float)
        for event in profiler.key_averages():
            name = FUSED if "cpp_fused" in event.key else event.key
            found[name] += event.self_cpu_time_total / 1e3 / PROFILED_STEPS
        return found


def updated_in_place(self: LoRALinear, x: Tensor) -> Tensor:
    """What LoRALinear.forward computes, without DoRA and a bias of B, by one `addmm_`."""
    A = self.lora_A.weight.to(x.dtype)
    B = (self.lora_B.weight * self.scaling).to(x.dtype)
    small = F.linear(self.dropout(x), A)
    y = self.base_layer(x)
    y.view(-1, y.shape[-1]).addmm_(small.view(-1, self.r), B.T)
    return y


def table_of_operations(eager: dict[str, float], compiled: dict[str, float]) -> list[str]:
    total = sum(eager.values())
    rows = []
    small, small_compiled = 0.0, 0.0
    for name in sorted(eager | compiled, key=lambda name: -eager.get(name, 0)):
        before, after = eager.get(name, 0), compiled.get(name, 0)
        if max(before, after) < SMALLEST_SHARE * total:
            small += before
            small_compiled += after
        else:
            rows.append((f"`{name}`" if name != FUSED else name, before, after))
    rows.append(("all others", small, small_compiled))
    rows.append(("a step", total, sum(compiled.values())))
    lines = ["| operation | ms | share | ms with --compile |", "|---|---|---|---|"]
    for name, before, after in rows:
        lines.append(f"| {name} | {before:.0f} | {before / total:.0%} | {after:.0f} |")
    return lines


def compare_updates(steps: Steps, pairs: int) -> list[str]:
    """Time steps with either update in turns, and return a table of the ratios."""
    kinds = {"now": LoRALinear.forward, "addmm_": updated_in_place}
    ratios: dict[str, list[float]] = {"now": [], "addmm_": []}  # by which goes first
    for pair in range(pairs):
        first, second = ("now", "addmm_") if pair % 2 == 0 else ("addmm_", "now")
        seconds = {}
        for name in (first, second):
            LoRALinear.forward = kinds[name]
            seconds[name] = steps.step()
        ratios[first].append(seconds["now"] / seconds["addmm_"])
    LoRALinear.forward = kinds["now"]
    lines = ["| first of a pair | pairs | times as fast with `addmm_`, median |", "|---|---|---|"]
    for first, values in ratios.items():
        lines.append(f"| {first} | {len(values)} | {statistics.median(values):.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--output", type=Path, help="a file for the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._inductor.config.cpp.enable_kernel_profile = True
    with tempfile.TemporaryDirectory() as folder:
        eager = Steps(Path(folder) / "eager")
        operations = eager.milliseconds_by_operation()
        updates = compare_updates(eager, arguments.pairs)
        compiled = Steps(Path(folder) / "compiled", compiled=True).milliseconds_by_operation()
    dtype = str(eager.run.dtype).removeprefix("torch.")
    text = "\n".join(
        [
            "# A training step on a CPU, per operation",
            "",
            f"LoRA on the shape `small`, {eager.num_tokens} tokens a step, {dtype}, "
            f"{arguments.threads} threads.",
            "",
            *table_of_operations(operations, compiled),
            "",
            *updates,
            "",
            f"`python benchmarks/cpu_profile.py --threads {arguments.threads} "
            f"--pairs {arguments.pairs}`; torch {version('torch')}",
            "",
            f"CPU: {describe_cpu()}",
            "",
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
