"""Tensors that may be sharded by FSDP2: their rows are gathered and scattered."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
import torch.distributed as dist

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
        value = torch.empty(tensor.shape, device="meta")
    if tensor.shape != value.shape:
        raise ValueError(f"a tensor of {list(value.shape)} for a place of {list(tensor.shape)}")
    if is_sharded(tensor):
        scatter_rows(local_tensor(tensor), value)
        return
    if rank() == 0 or not from_rank_zero:
        tensor.copy_(value)
    if from_rank_zero:
        dist.broadcast(tensor, 0)


def scatter_rows(rows: Tensor, value: Tensor) -> None:
    """Copy the first process's value into the rows that each process holds of it.

    They are received in their place. With torch's distribute_tensor each process would hold its
    rows twice meanwhile, and the embeddings may be a quarter of a model.
    """
    parts = value.chunk(world_size())  # as FSDP2 divides it; the last processes may have no part
    transfers = []
    if rank() == 0:
        rows.copy_(parts[0])
        for process, part in enumerate(parts[1:], start=1):
            sent = part.to(rows.device, rows.dtype).contiguous()
            transfers.append(dist.P2POp(dist.isend, sent, process))
    elif rank() < len(parts):
        transfers.append(dist.P2POp(dist.irecv, rows, 0))
    if transfers:
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
