"""Sums over all processes, and values that one process gives to the others."""

import torch
import torch.distributed as dist

from lora.distributed.process_group import micro_batch_index, rank, world_size


def sum_over_all(tensor):
    """The sum of every process's `tensor`, in its place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank_zero(function, *arguments):
    """What `function` gives in the first process, for all; no other calls it."""
    values = [function(*arguments) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def gather_in_order(mine, lengths, device):
    """What the processes made of parts 0, world, 2 world, ... (the first one), 1, world + 1, ...,
    in the parts' order.

    mine: tensors [n, ...]; lengths: of all the parts.
    """
    if world_size() == 1:
        return torch.cat(mine)
    shape = broadcast_from_rank_zero(lambda: list(mine[0].shape[1:]))
    whole = torch.zeros(sum(lengths), *shape, device=device)
    for i, part in enumerate(mine):
        begin = sum(lengths[: micro_batch_index(i)])
        whole[begin : begin + len(part)] = part
    return sum_over_all(whole)  # every place is filled by one process, and the others add zero
