"""The gradients of a step: backward over this process's micro-batches, summed over all processes.

Every micro-batch adds the gradient of (sum of its losses) / (number of targets of the whole step),
so how a step is divided into micro-batches, or over processes, changes nothing but the speed.
"""

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from lora.common.errors import is_out_of_memory
from lora.common.seeds import seed_for
from lora.common.signals import StopSignal
from lora.data.batches import Batch
from lora.distributed.collectives import sum_over_all
from lora.distributed.process_group import micro_batch_index, world_size
from lora.distributed.sharding import any_sharded
from lora.model.device import autocast
from lora.model.run import Run
from lora.training.checkpoint import trainable_parameters
from lora.training.log import Log
from lora.training.memory_limit import memory_limit


def backward(
    run: Run, batches: list[Batch], num_targets: int, step: int, scaler: GradScaler
) -> tuple[Tensor, bool]:
    """Add the gradients of this process's micro-batches of a step to the parameters.

    Args:
        num_targets: targets of the step over all processes.
        step: seeds the dropout, together with the number of the micro-batch.

    Returns:
        This process's part of the loss, a scalar, and whether memory ran out.
    """
    loss = torch.zeros((), device=run.device)
    try:
        for i, batch in enumerate(batches):
            seed = run.config.training.seed
            torch.manual_seed(seed_for(seed, "dropout", step, micro_batch_index(i)))
            with autocast(run.device, run.dtype):
                loss_sum, _ = run.task(batch.to(run.device))
            scaler.scale(loss_sum / num_targets).backward()
            loss += loss_sum.detach() / num_targets
    except (RuntimeError, MemoryError) as error:
        # Where weights are sharded, the other processes wait in the middle of a layer, so this one
        # cannot start the step again alone.
        if not is_out_of_memory(error) or any_sharded(run.task.parameters()):
            raise
        return loss, True
    return loss, False


def sum_gradients(parameters: list[nn.Parameter], totals: Tensor) -> None:
    """Replace the gradients, and `totals`, by their sums over all processes, in one call."""
    if world_size() == 1:
        return
    if any_sharded(parameters):
        sum_over_all(totals)  # FSDP2 has summed the gradients in the backward pass
        return
    parts = []
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parts.append(gradient.flatten())
    parts.append(totals)
    sums = sum_over_all(torch.cat(parts)).split([len(part) for part in parts])
    for parameter, gradient in zip(parameters, sums):
        parameter.grad = gradient.view_as(parameter)
    totals.copy_(sums[-1])


class GradientAccumulation:
    """Computes the gradients of whole steps, in smaller micro-batches if memory runs out."""

    def __init__(self, run: Run, scaler: GradScaler, stop_signal: StopSignal, log: Log) -> None:
        self.run = run
        self.scaler = scaler
        self.stop_signal = stop_signal
        self.log = log
        self.parameters = list(trainable_parameters(run.task).values())

    def of_step(self, step: int) -> tuple[float, bool]:
        """Add the gradients of a step over all processes.

        Return the mean loss over the targets of the step, and whether a signal asks for the end.
        """
        data = self.run.data
        num_targets = data.num_targets_at(step)
        while True:
            loss, out_of_memory, stop = self.attempt(data.batch_at(step), num_targets, step)
            if not out_of_memory:
                return loss, stop
            self.log.say(data.halve_micro_batches(data.rows_at(step)))

    def try_largest_step(self, reserved_bytes: int) -> None:
        """Find micro-batches that fit, without an update: what does not fit shows before step 1.

        `reserved_bytes` are kept free: the optimizer takes them at its first update.
        """
        data = self.run.data
        rows = data.longest_rows
        num_targets = data.rows.num_targets(rows)
        out_of_memory = True
        with memory_limit(self.run.device):
            # In the block, because on a CPU it takes no memory and only counts against the limit.
            reserved = torch.empty(reserved_bytes, dtype=torch.int8, device=self.run.device)
            while out_of_memory:
                _, out_of_memory, _ = self.attempt(data.largest_batches(), num_targets, step=0)
                if out_of_memory:
                    self.log.say(data.halve_micro_batches(rows))
        self.run.task.zero_grad()
        del reserved

    def attempt(
        self, batches: list[Batch], num_targets: int, step: int
    ) -> tuple[float, bool, bool]:
        """Return (loss, whether memory ran out, whether a signal asks for the end).

        The processes agree on all three. Where memory ran out there are no gradients.
        """
        loss, out_of_memory = backward(self.run, batches, num_targets, step, self.scaler)
        if out_of_memory and self.run.device.type == "cuda":
            torch.cuda.empty_cache()  # NCCL and cuBLAS take their memory from the driver
        totals = torch.zeros(3, device=self.run.device)
        totals[0] = loss
        totals[1] = out_of_memory
        totals[2] = self.stop_signal.number > 0
        sum_gradients(self.parameters, totals)
        mean_loss, processes_out_of_memory, processes_to_stop = totals.tolist()  # synchronises
        if processes_out_of_memory > 0:
            self.run.task.zero_grad()
        return mean_loss, processes_out_of_memory > 0, processes_to_stop > 0
