"""Full fine-tuning on several processes: weights sharded by FSDP2, and the rows of a tensor that a
process holds.
"""

import sys

import torch

from lora.common.errors import UserError
from lora.distributed.process_group import rank, world_size
from lora.target_modules import decoder_layers


def shard(task, dtype, optimizer, device):
    """Lay out the weights of `task` over the processes (FSDP2): each holds a part of every layer,
    and of its optimizer.

    A layer is gathered when it is computed, in `dtype`; the parts and the sums of the gradients are
    fp32. Raises UserError.
    """
    if dtype == torch.float16:
        raise UserError(
            "dtype float16: full fine-tuning on several processes computes in bfloat16 or float32; name one."
        )
    if optimizer != "adamw":
        raise UserError(
            f"optimizer {optimizer}: full fine-tuning on several processes has adamw only; leave it out."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )  # a second

    # Fully_shard's own is of GPUs wherever there are some
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for module in (*decoder_layers(task.model), task):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # The loss is divided by the targets of all processes
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    register_fsdp_forward_method(task, "predict")


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor


def full_tensor(tensor):
    """A sharded tensor's value, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def row_bounds(count, processes):
    """[processes + 1]: where in `count` rows the part of each process begins, and the end; as
    torch.chunk has it.
    """
    size = -(-count // processes)
    return [min(i * size, count) for i in range(processes + 1)]


def local_rows(tensor):
    """(first, last + 1) of the rows of `tensor`, and of what an optimizer keeps of it, that this
    process holds.
    """
    if not is_sharded(tensor):
        return 0, sys.maxsize  # the scales of 8-bit states can be more than the tensor's rows
    return tuple(row_bounds(len(tensor), world_size())[rank() : rank() + 2])


def local_tensor(tensor):
    """The rows that this process holds, as a plain tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def copy_into(tensor, value):
    """Copy a whole `value` into a tensor that may be sharded. Raises ValueError where it is of
    another shape.
    """
    if tensor.shape != value.shape:
        raise ValueError(f"a tensor of {list(value.shape)} for a place of {list(tensor.shape)}")
    local_tensor(tensor).copy_(value[slice(*local_rows(tensor))] if value.ndim else value)


def sharded_like(parameter, local_tensor):
    """This process's rows, as a tensor that is sharded as `parameter` is, if it is."""
    local_tensor = local_tensor.to(parameter.device)
    if not is_sharded(parameter) or local_tensor.ndim == 0:
        return local_tensor
    layout = {"shape": parameter.shape, "stride": parameter.stride()}
    return type(parameter.data).from_local(
        local_tensor, parameter.device_mesh, parameter.placements, **layout
    )
