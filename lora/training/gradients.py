"""The gradients of a step: backward over this process's micro-batches, summed over all processes."""

import torch

from lora.common import signals
from lora.common.errors import ran_out_of_memory
from lora.common.seeds import seed_for
from lora.distributed import process_group, sharding
from lora.distributed.collectives import sum_over_all
from lora.distributed.process_group import world
from lora.distributed.sharding import is_sharded
from lora.model.device import autocast


def backward(task, data, step, scaler, seed, device, dtype):
    """Add the gradients of this process's part of a step; returns [its part of the loss, 1 if
    memory ran out, 1 to stop].

    Every micro-batch adds its part of the gradient of (sum of the losses) / (number of targets,
    over all processes), so that how a step is cut changes nothing.
    """
    batches, num_targets = data.batch_at(step), data.num_targets_at(step)
    totals = torch.zeros(3, device=device)
    try:
        for i, batch in enumerate(batches):
            torch.manual_seed(seed_for(seed, "dropout", step, process_group.place(i)))
            with autocast(device, dtype):
                loss_sum, _ = task(batch.to(device))
            scaler.scale(loss_sum / num_targets).backward()
            totals[0] += loss_sum.detach() / num_targets
    except RuntimeError as error:
        # Where weights are sharded the other processes wait in the middle of a layer: this one
        # cannot go back alone.
        if not ran_out_of_memory(error) or any(map(sharding.is_sharded, task.parameters())):
            raise
        totals[1] = 1
    totals[2] = signals.received > 0
    return totals


def sum_gradients(parameters, totals):
    """Give every process the sum of all processes' gradients, and of their `totals`; one call over
    all, once a step.
    """
    if world() == 1:
        return
    if any(map(is_sharded, parameters)):  # these are summed on the way
        sum_over_all(totals)
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = sum_over_all(torch.cat([part.flatten() for part in (*gradients, totals)]))
    *parts, summed = flat.split([part.numel() for part in (*gradients, totals)])
    for parameter, part in zip(parameters, parts):
        parameter.grad = part.view_as(parameter)
    totals.copy_(summed)
