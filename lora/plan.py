"""What a run would need (`--dry_run`): memory by part, and time.

A step on the longest rows is gone through with tensors that have shapes and no contents (torch's FakeTensorMode), and what
it would hold is counted. So this works where the run itself would not fit. The time is that of a step, by the clock.
"""

from functools import partial
import logging
import math
import os
from pathlib import Path
import time
import weakref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora import distributed
from lora.checkpoint import trainable
from lora.errors import UserError
from lora.log import peak_memory
from lora.model import autocast, lay_out
from lora.optimizer import state_bytes
from lora.targets import decoder_layers


def dry_run(opening, task, data, config, total, device, dtype, backward, evaluate):
    """Print `opening`, the memory that the run would take and, if that fits, the time. backward, evaluate: train.py's."""
    table, fits = describe_memory(memory(task, data, config, device, dtype), device)
    print(f"{opening}\n{table}")
    if fits:
        lay_out(task, config, device, dtype)
        step = partial(backward, task, data, 0, torch.amp.GradScaler(enabled=False), config.training.seed, device, dtype)
        passes = min(total, math.ceil(data.steps_per_epoch)) if task.frozen else total  # a frozen base reads a row once
        print(describe_time(step, partial(evaluate, task, data, device, dtype), passes, config.training.eval_steps))


class Counting(TorchDispatchMode):
    """Counts the bytes of what is made on a kind of device and not let go of yet: `live`, and at most, `peak`."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.live, self.peak, self.held = kind, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made, declared in zip(out if isinstance(out, (list, tuple)) else [out], func._schema.returns):
            for tensor in made if isinstance(made, (list, tuple)) else [made]:
                if isinstance(tensor, torch.Tensor) and not declared.alias_info and tensor.device.type == self.kind:
                    self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.live -= self.held.pop(key)


def memory(task, data, config, device, dtype):
    """What this process holds on `device` at its peak: {"weights", "gradients", "optimizer", "activations", "head"}, bytes.

    On a CPU there is "program" as well: Python, the libraries, and what is left of loading.

    task: on the CPU (a 4-bit base: on `device`), not sharded yet; dtype: the type it computes in.
    """
    parameters = list(trainable(task).values())
    parts = distributed.world() if distributed.world() > 1 and not config.lora else 1
    storages = {t.untyped_storage()._cdata: t.nbytes for t in (*task.state_dict().values(), *task.buffers())}
    weights = sum(storages.values()) // parts
    if parts > 1:  # a layer is gathered while the one before it is computed
        weights += 2 * max(sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(task.model))
    gradients = sum(p.nbytes for p in parameters)
    head = before = earlier = 0

    def head_begins(*_):
        nonlocal before, earlier
        before, earlier, counting.peak = counting.live, counting.peak, counting.live

    def head_ends(*_):
        nonlocal head
        head, counting.peak = max(head, counting.peak - before), max(earlier, counting.peak)

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would print a traceback of its own
    hooks = task.head.register_forward_pre_hook(head_begins), task.head.register_forward_hook(head_ends)
    with torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        fake = {
            name: fakes.from_tensor(tensor.detach()).to(device).requires_grad_(tensor.requires_grad)
            for name, tensor in (*task.named_parameters(), *task.named_buffers())
            if type(tensor) in (torch.Tensor, nn.Parameter)  # those of 4 bits are bitsandbytes' own, and on the device
        }
        with Counting(device.type) as counting:
            try:
                for batch in data.batch_at(None):
                    with autocast(device, dtype):
                        loss, _ = torch.func.functional_call(task, fake, (batch.to(device),))
                    loss.backward()
            except (RuntimeError, AttributeError) as error:  # torch has no such shapes for experts in float32, say
                raise UserError(f"--dry_run: this model cannot be counted in {dtype} ({str(error)[:120]}).") from None
    for hook in hooks:
        hook.remove()
    head = min(head, counting.peak - gradients)
    program = {"program": max(0, resident() - weights)} if device.type == "cpu" else {}
    return program | {
        "weights": weights,
        "gradients": gradients // parts,
        "optimizer": state_bytes(parameters, config.training.optimizer) // parts,
        "activations": counting.peak - gradients - head,
        "head": head,
    }


def resident():
    """The main memory that this process holds now, in bytes (its peak, where the system does not tell)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(torch.device("cpu"))


def describe_memory(parts, device):
    """(what `memory` gave as a table, whether it fits on the device)."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    held = sum(parts.values())
    lines = [f"  {name:12}{size / 1e9:9.3f} GB" for name, size in {**parts, "in all": held}.items()]
    lines[-1] += f" of {there / 1e9:.0f} on this {device.type}" + ("" if held < there else ": it does not fit")
    return "\n".join(["memory at the peak, with the longest rows:", *lines]), held < there


def describe_time(step, evaluate, total, every):
    """How long `total` steps take, with an evaluation `every` so many: step() and evaluate() are done, by the clock."""
    step()  # the first is slower
    times = [time.monotonic()]
    for function in (step, evaluate):
        function()
        times.append(time.monotonic())
    a_step, an_evaluation = times[1] - times[0], times[2] - times[1]
    evaluations = 1 + -(-total // every)
    whole = total * a_step + evaluations * an_evaluation
    return f"time: {whole:.0f} s, {a_step:.2f} s for a step and {an_evaluation:.2f} s for each of {evaluations} evaluations"
