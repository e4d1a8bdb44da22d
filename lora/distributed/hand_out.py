"""The first process hands the weights that it has read out to the processes that share them."""

import torch
from torch import Tensor, nn
import torch.distributed as dist
from tqdm import tqdm

from lora.distributed.process_group import rank, world_size
from lora.distributed.sharding import local_tensor, row_bounds


def move_to_meta(module: nn.Module) -> None:
    """Replace every parameter by one without memory, in place; tied ones stay tied."""
    replaced: dict[Tensor, nn.Parameter] = {}
    for submodule in module.modules():
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            if parameter not in replaced:
                empty = torch.empty_like(parameter, device="meta")
                replaced[parameter] = nn.Parameter(empty, parameter.requires_grad)
            setattr(submodule, name, replaced[parameter])


@torch.no_grad()
def hand_out(task: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Fill the sharded parameters of `task`, and its buffers, from the first process's values.

    Args:
        parameters: full values by name, which only the first process reads. They are removed one by
            one, so that their memory is free as soon as they are handed out.
        buffers: the same of the buffers, which every process has whole.
    """
    quiet = None if rank() == 0 else True  # None: no bar without a terminal
    for name, parameter in tqdm(list(task.named_parameters()), "sharding weights", disable=quiet):
        hand_out_rows(parameter, parameters.pop(name))
    for name, buffer in task.named_buffers():
        if rank() == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)


def hand_out_rows(parameter: Tensor, value: Tensor) -> None:
    """Give each process its rows of `value`."""
    local_rows = local_tensor(parameter)
    if rank() > 0:
        if len(local_rows) > 0:
            dist.recv(local_rows, 0)
        return
    bounds = row_bounds(parameter)
    for process in range(1, world_size()):
        rows = value[bounds[process] : bounds[process + 1]]
        if len(rows) > 0:
            dist.send(rows.to(local_rows.device).contiguous(), process)
    local_rows.copy_(value[: bounds[1]])
