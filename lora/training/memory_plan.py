"""The memory that a run would take, by part, counted without running it.

A step on the longest rows is run with tensors that have shapes and no contents (torch's
FakeTensorMode), and the bytes of what it would hold are counted. So this works where the run itself
would not fit.
"""

import logging
import os
from pathlib import Path
import weakref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora.common.errors import UserError
from lora.distributed import process_group
from lora.model.device import autocast
from lora.model.run import Run
from lora.target_modules import decoder_layers
from lora.training.checkpoint import trainable_parameters
from lora.training.log import peak_memory
from lora.training.optimizer import optimizer_bytes


class Counting(TorchDispatchMode):
    """Counts the bytes of what is made on a kind of device and not let go of yet: `live`, and at
    most, `peak`.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind, self.live, self.peak, self.held = kind, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made, declared in zip(
            out if isinstance(out, (list, tuple)) else [out], func._schema.returns
        ):
            for tensor in made if isinstance(made, (list, tuple)) else [made]:
                if (
                    isinstance(tensor, torch.Tensor)
                    and not declared.alias_info
                    and tensor.device.type == self.kind
                ):
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


def plan_memory(run: Run) -> dict[str, int]:
    """What this process holds on `device` at its peak: {"weights", "gradients", "optimizer",
    "activations", "head"}, bytes.

    On a CPU there is "program" as well: Python, the libraries, and what is left of loading.

    task: on the CPU (a 4-bit base: on `device`), not sharded yet; dtype: the type it computes in.
    """
    task, data, config, device, dtype = run.task, run.data, run.config, run.device, run.dtype
    parameters = list(trainable_parameters(task).values())
    parts = process_group.world_size() if process_group.world_size() > 1 and not config.lora else 1
    storages = {
        t.untyped_storage()._cdata: t.nbytes for t in (*task.state_dict().values(), *task.buffers())
    }
    weights = sum(storages.values()) // parts
    if parts > 1:  # a layer is gathered while the one before it is computed
        weights += 2 * max(
            sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(task.model)
        )
    gradients = sum(p.nbytes for p in parameters)
    head = before = earlier = 0

    def head_begins(*_):
        nonlocal before, earlier
        before, earlier, counting.peak = counting.live, counting.peak, counting.live

    def head_ends(*_):
        nonlocal head
        head, counting.peak = max(head, counting.peak - before), max(earlier, counting.peak)

    # It would print a traceback of its own
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    hooks = (
        task.head.register_forward_pre_hook(head_begins),
        task.head.register_forward_hook(head_ends),
    )
    with (
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True) as fakes,
    ):
        fake = {
            name: fakes.from_tensor(tensor.detach()).to(device).requires_grad_(tensor.requires_grad)
            for name, tensor in (*task.named_parameters(), *task.named_buffers())
            # Those of 4 bits are bitsandbytes' own, and on the device
            if type(tensor) in (torch.Tensor, nn.Parameter)
        }
        with Counting(device.type) as counting:
            try:
                for batch in data.largest_batches():
                    with autocast(device, dtype):
                        loss, _ = torch.func.functional_call(task, fake, (batch.to(device),))
                    loss.backward()
            # Torch has no such shapes for experts in float32, say
            except (RuntimeError, AttributeError) as error:
                raise UserError(
                    f"--dry_run: this model cannot be counted in {dtype} ({str(error)[:120]})."
                ) from None
    for hook in hooks:
        hook.remove()
    head = min(head, counting.peak - gradients)
    program = {"program": max(0, resident() - weights)} if device.type == "cpu" else {}
    return program | {
        "weights": weights,
        "gradients": gradients // parts,
        "optimizer": optimizer_bytes(parameters, config.training.optimizer) // parts,
        "activations": counting.peak - gradients - head,
        "head": head,
    }


def resident():
    """The main memory that this process holds now, in bytes (its peak, where the system does not
    tell).
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(torch.device("cpu"))
