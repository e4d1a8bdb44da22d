"""Tensors that may be sharded by FSDP2: their rows are gathered and scattered."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
import torch.distributed as dist

from lora.distributed.process_group import rank


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


def gather(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of each tensor, in full and on the CPU in the first process.

    A sharded tensor is gathered when it is asked for, by all processes at once. So each of them
    must go through all of `tensors`. The others keep nothing, and are given the sharded tensor.
    """
    copies: dict[int, Tensor] = {}  # a tied tensor has two names and one value
    for name, tensor in tensors.items():
        if id(tensor) not in copies:
            full = full_tensor(tensor.detach())
            copies[id(tensor)] = full.cpu().contiguous() if rank() == 0 else tensor
            del full
        yield name, copies[id(tensor)]


@torch.no_grad()
def copy_into(tensor: Tensor, value: Tensor | None, from_rank_zero: bool = False) -> None:
    """Copy a full value into a tensor that may be sharded. Raises ValueError for other shapes.

    With `from_rank_zero` the first process's value is copied in all, and the others may give None.
    """
    if value is None:
        value = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.shape != value.shape:
        raise ValueError(f"a tensor of {list(value.shape)} for a place of {list(tensor.shape)}")
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        # Every process is sent its rows by the first one.
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    elif from_rank_zero:
        value = value.to(tensor.device, tensor.dtype)
        dist.broadcast(value, 0)
    tensor.copy_(value)
