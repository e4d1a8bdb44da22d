"""Predictions of a task for every target, gathered over all processes, and their metrics."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from lora.data.batches import Batch
from lora.distributed.collectives import gather_in_order
from lora.distributed.process_group import hide_bar, rank, world_size
from lora.model.device import autocast
from lora.model.run import Run
from lora.model.task import Task

Method = Callable[[Batch], Tensor]  # of a task


@dataclass
class Predictions:
    """What a task predicts for n targets. All tensors are on the CPU."""

    values: Tensor  # [n, ...], as the head's `predict` returns them
    targets: Tensor  # [n]
    dataset_ids: Tensor  # [n], the data set of each target


def predict(
    task: Task, batches: list[Batch], device: torch.device, dtype: torch.dtype
) -> Predictions:
    """Return the predictions for all targets of `batches`, without dropout, in their order."""
    return Predictions(
        values=outputs_at_targets(task, task.predict, batches, device, dtype),
        targets=torch.cat([batch.targets for batch in batches]),
        dataset_ids=torch.cat([batch.dataset_ids for batch in batches]),
    )


@torch.no_grad()
def outputs_at_targets(
    task: Task, method: Method, batches: list[Batch], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return what a method of the task computes at all targets, [n, ...], in fp32 on the CPU.

    The micro-batches are divided among the processes. Every process gets all outputs, in the order
    of `batches`.
    """
    training = task.training
    task.eval()

    def run_model(batch: Batch) -> Tensor:
        with autocast(device, dtype):
            return method(batch.to(device)).float()

    local_batches = batches[rank() :: world_size()]
    progress = tqdm(local_batches, desc="predict", unit="batch", disable=hide_bar(), leave=False)
    local_outputs = [run_model(batch) for batch in progress]

    # Sharded weights are gathered by all processes at once, so every process must run the model
    # equally often. In a last round of too few batches, the others repeat one and drop the result.
    batches_in_last_round = len(batches) % world_size()
    process_sits_out = batches_in_last_round > 0 and rank() >= batches_in_last_round
    if process_sits_out:
        run_model(batches[-1])

    task.train(training)
    return gather_in_order(local_outputs, [batch.num_targets for batch in batches], device).cpu()


def evaluate(run: Run) -> tuple[dict[str, float], list[Batch], Predictions]:
    """Evaluate on the held-out rows: return metrics, the micro-batches and their predictions.

    The metrics are the head's, with those of each data set under its name where several are mixed.
    """
    batches = run.data.evaluation()
    predictions = predict(run.task, batches, run.device, run.dtype)
    head = run.task.head
    metrics = head.metrics(predictions.values, predictions.targets)
    for name, dataset_id in run.data.held_out_sets.items():
        in_set = predictions.dataset_ids == dataset_id
        if in_set.any():
            set_metrics = head.metrics(predictions.values[in_set], predictions.targets[in_set])
            metrics.update({f"{name}/{key}": value for key, value in set_metrics.items()})
    return metrics, batches, predictions
