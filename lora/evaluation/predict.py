"""Predictions of a task for every target, gathered over all processes, and the metrics of the
held-out set.
"""

import torch

from lora.distributed import collectives, process_group
from lora.model.device import autocast


@torch.no_grad()
def predict(task, batches, device, dtype, method="predict"):
    """Of every target of `batches`, without dropout: (what the task says by `method` [n, ...],
    targets [n], data sets [n]).

    The batches are dealt over the processes, and what they say is put together again in the order
    of the batches.
    """
    task.eval()
    said, targets, sources = [], [], []
    for i, batch in enumerate(batches):
        if i % process_group.world() == process_group.rank():
            with autocast(device, dtype):
                said.append(getattr(task, method)(batch.to(device)).float())
        targets.append(batch.targets)
        sources.append(batch.sources)
    # This process had a batch less than others
    if 0 < len(targets) % process_group.world() <= process_group.rank():
        with autocast(device, dtype):
            # For the others' sake: sharded weights are gathered by all at once
            getattr(task, method)(batch.to(device))
    task.train()
    lengths = [len(one) for one in targets]
    return (
        collectives.interleaved(said, lengths, device).cpu(),
        torch.cat(targets),
        torch.cat(sources),
    )


def evaluate(task, data, device, dtype, keep=None):
    """The head's metrics over the held-out rows, and under a set's name over that set, where data
    is mixed.
    """
    batches = data.evaluation()
    said, targets, sources = predict(task, batches, device, dtype)
    if keep:  # what `python -m lora compare` reads
        keep(task.head, said, targets, data.held_out, batches)
    metrics = task.head.metrics(said, targets)
    for name, source in data.held_out_sets.items():
        mine = sources == source
        if mine.any():
            metrics |= {
                f"{name}/{key}": value
                for key, value in task.head.metrics(said[mine], targets[mine]).items()
            }
    return metrics
