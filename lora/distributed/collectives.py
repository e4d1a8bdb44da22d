"""Sums over all processes, and values that one process sends to the others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
import torch.distributed as dist

from lora.common.errors import ProcessLost, UserError
from lora.distributed.process_group import micro_batch_index, patient_group, rank, world_size


def sum_over_all(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    """Wait until all processes are here, however long one of them writes."""
    if world_size() > 1:
        dist.barrier(patient_group())


def on_rank_zero(function: Callable, *arguments: Any) -> Any:
    """Call `function` in the first process only; return its result there, and None in the others.

    A UserError is raised in all processes. Of another error they raise ProcessLost, so that none
    waits for one that has ended.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
    if world_size() > 1:
        errors = [error]
        if error and not isinstance(error, UserError):
            errors = [ProcessLost("the first process failed, and says why.")]
        dist.broadcast_object_list(errors, 0, patient_group())
        error = error or errors[0]
    if error:
        raise error
    return result


def broadcast_from_rank_zero(function: Callable, *arguments: Any) -> Any:
    """Call `function` in the first process only, and return its result in all of them."""
    values = [on_rank_zero(function, *arguments)]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0, patient_group())
    return values[0]


def gather_objects(value: Any) -> list:
    """Return the values of all processes, in order and on every process."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, patient_group())
    return values


def gather_in_order(local_parts: list[Tensor], lengths: list[int], device: torch.device) -> Tensor:
    """Concatenate parts that the processes computed round-robin, in order and on every process.

    `local_parts` are the parts number rank, rank + world_size, ..., [length, ...] each, `lengths`
    the lengths of all parts. The processes' tensors are summed on `device`.
    """
    if world_size() == 1:
        return torch.cat(local_parts)
    # The first process always has a part; the others may have none.
    shape = broadcast_from_rank_zero(lambda: list(local_parts[0].shape[1:]))
    gathered = torch.zeros(sum(lengths), *shape, device=device)
    for i, part in enumerate(local_parts):
        start = sum(lengths[: micro_batch_index(i)])
        gathered[start : start + len(part)] = part
    # Each row was written by one process, and the others add zero.
    return sum_over_all(gathered)
