"""The memory that a run would take, by part, counted without running it.

A step on the longest rows is run with tensors that have shapes and no contents (FakeTensorMode), so
this works where the run itself would not fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
import logging
import weakref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora.common.errors import UserError
from lora.common.operating_system import resident_bytes
from lora.data.batches import Batch
from lora.distributed import process_group
from lora.distributed.collectives import sum_over_all, wait_for_all
from lora.model.device import autocast
from lora.model.run import Run
from lora.model.task import Task
from lora.target_modules import decoder_layers
from lora.training.checkpoint import trainable_parameters
from lora.training.memory_limit import USABLE
from lora.training.optimizer import optimizer_bytes


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made on a device and still referred to."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.live = 0  # bytes now
        self.peak = 0  # bytes at most
        self.sizes: dict[int, int] = {}  # of the live storages, by address
        self.before_head: int | None = None  # bytes where the head began, while it is computed
        self.head_peak = 0  # bytes at most that the head's forward pass added

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else [result]
        for output, declared in zip(outputs, func._schema.returns):
            is_view = declared.alias_info
            for tensor in output if isinstance(output, (list, tuple)) else [output]:
                if isinstance(tensor, Tensor) and not is_view:
                    self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if tensor.device.type == self.device_type and address not in self.sizes:
            self.sizes[address] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            if self.before_head is not None:
                self.head_peak = max(self.head_peak, self.live - self.before_head)
            weakref.finalize(storage, self.drop, address)

    def drop(self, address: int) -> None:
        self.live -= self.sizes.pop(address)

    def head_begins(self, *hook_arguments) -> None:
        self.before_head = self.live

    def head_ends(self, *hook_arguments) -> None:
        self.before_head = None


def fits(needed_bytes: int, available_bytes: int) -> bool:
    return needed_bytes <= USABLE * available_bytes


def needs_checkpointing(run: Run, available_bytes: int) -> bool:
    """Return whether a step, as its layers are now, would not fit in `available_bytes`.

    The processes agree: it is needed if one of them needs it. False where layers cannot be
    checkpointed or the memory of the model cannot be counted.
    """
    if not decoder_layers(run.task.model):
        return False
    batches = run.data.largest_batches()
    if run.config.training.batch_size == "auto" and num_shards(run) == 1:
        longest = run.data.longest_rows[0]
        batches = [run.data.rows.batch([longest], run.data.packed)]  # a step may be cut to this
    try:
        needed_bytes = sum(plan_memory(run, batches).values())
    except UserError:
        needed_bytes = 0
    needed = torch.tensor(not fits(needed_bytes, available_bytes), dtype=torch.int32)
    wait_for_all()  # the first one may have read weights for longer than the sum would wait
    return sum_over_all(needed.to(run.device)).item() > 0


def plan_memory(run: Run, batches: list[Batch]) -> dict[str, int]:
    """Return the bytes of each part of what this process would hold at its peak in a step.

    On a CPU one part is "program": Python, the libraries, and what is left of loading. The task is
    not sharded yet, and may be on the CPU or on the device.
    """
    parameters = list(trainable_parameters(run.task).values())
    shards = num_shards(run)
    weights = weight_bytes(run.task, run.dtype, shards)
    gradients = sum(parameter.nbytes for parameter in parameters)
    peak, head_peak = count_step(run, batches)
    beside_gradients = peak if shards > 1 else peak - gradients
    head = min(head_peak, beside_gradients)
    parts = {}
    resident = resident_bytes()
    if run.device.type == "cpu" and resident:
        parts["program"] = max(0, resident - weights)
    parts["weights"] = weights
    parts["gradients"] = gradients // shards
    parts["optimizer"] = optimizer_bytes(parameters, run.config.training.optimizer) // shards
    parts["activations"] = beside_gradients - head
    parts["head"] = head
    return parts


def num_shards(run: Run) -> int:
    return 1 if run.config.lora else process_group.world_size()


def weight_bytes(task: Task, dtype: torch.dtype, shards: int) -> int:
    """Return the bytes of the weights and buffers that a process holds, computing in `dtype`."""
    sizes = {}  # by storage: tied weights are held once
    for tensor in (*task.state_dict().values(), *task.buffers()):
        sizes[tensor.untyped_storage()._cdata] = tensor.nbytes
    total = sum(sizes.values()) // shards
    if shards > 1:
        # While a layer is computed the next one is gathered, and what is in no layer stays so.
        layers = [num_weights(layer) for layer in decoder_layers(task.model)]
        outside = num_weights(task) - sum(layers)
        total += (outside + 2 * max(layers, default=0)) * dtype.itemsize
    return total


def num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def plain_4bit_weights(task: nn.Module) -> Iterator[None]:
    """Give 4-bit weights the type Parameter in the block; torch 2.11 counts no other type.

    A weight keeps the attributes that say how it is quantised.
    """
    types = [(weight, type(weight)) for weight in task.parameters()]
    for weight, _ in types:
        weight.__class__ = nn.Parameter
    try:
        yield
    finally:
        for weight, own_type in types:
            weight.__class__ = own_type


class ForwardAndBackward(nn.Module):
    """A task's loss and its gradients in one forward pass.

    So `functional_call` puts the fake weights in for the backward pass as well, in which
    checkpointed layers are computed again.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.task = run.task

    def forward(self, batch: Batch) -> None:
        with autocast(self.run.device, self.run.dtype):
            loss, _ = self.task(batch)
        loss.backward()


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def count_step(run: Run, batches: list[Batch]) -> tuple[int, int]:
    """Run micro-batches on fake tensors; return the peak bytes of the step, and of its head.

    Where the weights are to be sharded these bytes are without the gradients, whose parts are
    summed to their processes as they are made.
    """
    task = run.task
    is_sharded = num_shards(run) > 1
    counter = MemoryCounter(run.device.type)
    # torch would print a traceback of its own.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    before = task.head.register_forward_pre_hook(counter.head_begins)
    after = task.head.register_forward_hook(counter.head_ends)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with before, after, torch.compiler.set_stance("force_eager"), fake_mode:  # removes the hooks
        fakes = {}
        for name, tensor in (*task.named_parameters(), *task.named_buffers()):
            # 4-bit weights, of bitsandbytes' own type, are on the device already.
            if type(tensor) in (Tensor, nn.Parameter):
                fake = fake_mode.from_tensor(tensor.detach()).to(run.device)
                if is_sharded and isinstance(tensor, nn.Parameter):
                    fake = fake.to(run.dtype)  # as it is gathered
                fakes[f"task.{name}"] = fake.requires_grad_(tensor.requires_grad)
                if is_sharded and tensor.requires_grad:
                    fake.register_post_accumulate_grad_hook(drop_gradient)
        with counter, plain_4bit_weights(task):
            try:
                for batch in batches:
                    batch = batch.to(run.device)
                    torch.func.functional_call(ForwardAndBackward(run), fakes, (batch,))
            # torch cannot tell the shapes of some operations, such as float32 experts, and an
            # operation may raise anything on a tensor without contents.
            except Exception as error:
                found = f"this model cannot be counted in {run.dtype} ({str(error)[:120]})"
                raise UserError(f"--dry_run: {found}.") from None
    return counter.peak, counter.head_peak
