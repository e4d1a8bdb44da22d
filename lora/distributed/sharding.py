"""Full fine-tuning on several processes: weights sharded by FSDP2, and the rows a process holds."""

import sys

import torch
from torch import Tensor, nn

from lora.common.errors import UserError
from lora.distributed.process_group import rank, world_size
from lora.target_modules import decoder_layers


def shard(task: nn.Module, dtype: torch.dtype, optimizer: str, device: torch.device) -> None:
    """Shard the weights of `task` over the processes: each holds some rows of every layer (FSDP2).

    A layer is gathered in `dtype` when it is computed. The shards and the sums of the gradients are
    in fp32, and so is the optimizer's state, which is sharded as well. Raises UserError for a dtype
    or an optimizer that is not supported on sharded weights.
    """
    method = "full fine-tuning on several processes"
    if dtype == torch.float16:
        hint = "computes in bfloat16 or float32; name one"
        raise UserError(f"dtype float16: {method} {hint}.")
    if optimizer != "adamw":
        raise UserError(f"optimizer {optimizer}: {method} has adamw only; leave it out.")
    # Importing these takes a second, and most runs have one process.
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    # Without a mesh, fully_shard would choose the GPUs of a machine even for a run on its CPU.
    mesh = init_device_mesh(device.type, (world_size(),))
    gathered_dtype = None if dtype == torch.float32 else dtype
    policy = fsdp.MixedPrecisionPolicy(param_dtype=gathered_dtype, reduce_dtype=torch.float32)
    for module in (*decoder_layers(task.model), task):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # The loss is already divided by the number of targets over all processes.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    fsdp.register_fsdp_forward_method(task, "predict")


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the value of a tensor that may be sharded, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the rows that this process holds, as a plain tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def row_bounds(num_rows: int, num_parts: int) -> list[int]:
    """Return where each part begins, and the end: [num_parts + 1], divided as torch.chunk does."""
    size = -(-num_rows // num_parts)
    return [min(i * size, num_rows) for i in range(num_parts + 1)]


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the rows [first, end) that this process holds of a tensor and its optimizer state."""
    if not is_sharded(tensor):
        return (
            0,
            sys.maxsize,
        )  # an open end: some states of 8-bit optimizers are longer than the tensor
    bounds = row_bounds(len(tensor), world_size())
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
