"""Tensors that may be sharded by FSDP2, and the rows of them that a process holds."""

from collections.abc import Iterable
import sys

import torch
from torch import Tensor

from lora.distributed.process_group import rank, world_size


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
