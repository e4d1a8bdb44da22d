"""Full fine-tuning on several processes: weights sharded by FSDP2, and the rows a process holds."""

from collections.abc import Iterable
import sys

import torch
from torch import Tensor, nn

from lora.common.errors import UserError
from lora.distributed.process_group import rank, wait_for_all, world_size
from lora.target_modules import decoder_layers


def require_supported(dtype: torch.dtype, optimizer: str) -> None:
    """Raise UserError for a dtype or an optimizer that does not support sharded weights."""
    method = "full fine-tuning on several processes"
    if dtype == torch.float16:
        raise UserError(f"dtype float16: {method} computes in bfloat16 or float32; name one.")
    if optimizer != "adamw":
        raise UserError(f"optimizer {optimizer}: {method} has adamw only; leave it out.")


def shard(task: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Shard the weights of `task` over the processes: each holds some rows of every layer (FSDP2).

    The first process has the weights, and hands them out. A layer is gathered in `dtype` when it is
    computed. Shards, gradients and optimizer states are in fp32.
    """
    # Importing these takes a second, and most runs have one process.
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    from lora.distributed.hand_out import hand_out, move_to_meta

    wait_for_all("weights ready")
    parameters = {name: parameter.detach() for name, parameter in task.named_parameters()}
    buffers = dict(task.named_buffers())
    move_to_meta(task)
    # Without a mesh, fully_shard would choose the GPUs of a machine even for a run on its CPU.
    mesh = init_device_mesh(device.type, (world_size(),))
    param_dtype = None if dtype == torch.float32 else dtype
    policy = fsdp.MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for module in (*decoder_layers(task.model), task):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # The loss is already divided by the number of targets over all processes.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    fsdp.register_fsdp_forward_method(task, "predict")
    task.to_empty(device=device)
    hand_out(task, parameters, buffers)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(is_sharded(tensor) for tensor in tensors)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the value of a tensor that may be sharded, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the rows that this process holds, as a plain tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def row_bounds(tensor: Tensor) -> list[int]:
    """Return the first row of each process, divided as torch.chunk does, and the end."""
    if not is_sharded(tensor):
        return [0, len(tensor)]
    rows_each = -(-len(tensor) // world_size())
    return [min(i * rows_each, len(tensor)) for i in range(world_size() + 1)]


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the rows [first, end) that this process holds of a tensor and its optimizer state."""
    if not is_sharded(tensor):
        # An open end: some states of 8-bit optimizers are longer than the tensor.
        return 0, sys.maxsize
    bounds = row_bounds(tensor)
    return bounds[rank()], bounds[rank() + 1]


@torch.no_grad()
def copy_into(tensor: Tensor, value: Tensor) -> None:
    """Copy a full value into a tensor that may be sharded. Raises ValueError for other shapes."""
    if tensor.shape != value.shape:
        raise ValueError(f"a tensor of {list(value.shape)} for a place of {list(tensor.shape)}")
    if value.ndim > 0:
        first, end = local_rows(tensor)
        value = value[first:end]
    local_tensor(tensor).copy_(value)
