"""The losses of the validation examples at every evaluation, by which `compare` compares runs.

RUN/logs/examples/step_<N>.npz   id [rows], a hash of the row's tokens and targets;
                                 loss [rows], the sum over its targets; targets [rows], their number
"""

import hashlib
from pathlib import Path

import numpy as np

from lora.common.atomic_files import atomic_file
from lora.data.batches import Batch, is_target
from lora.distributed.process_group import rank
from lora.evaluation.predict import Predictions
from lora.model.run import Run


def save_example_losses(
    run_dir: Path, step: int, run: Run, batches: list[Batch], predictions: Predictions
) -> None:
    """Write the file of an evaluation. The targets of each row lie together in the predictions."""
    if rank() > 0:
        return
    rows = run.data.held_out
    order = np.concatenate([batch.rows for batch in batches])
    ids = np.zeros(len(order), np.uint64)
    counts = np.zeros(len(order), np.int32)
    for place, row in enumerate(order):
        tokens, targets = rows.tokens[rows.span(row)], rows.targets[rows.span(row)]
        digest = hashlib.blake2b(tokens.tobytes() + targets.tobytes(), digest_size=8).digest()
        ids[place] = int.from_bytes(digest)
        counts[place] = is_target(targets).sum()
    losses = run.task.head.losses(predictions.values, predictions.targets)
    first_targets = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(losses.double().numpy(), first_targets)
    folder = run_dir / "logs" / "examples"
    folder.mkdir(exist_ok=True)
    with atomic_file(folder / f"step_{step}.npz") as temporary:
        np.savez_compressed(temporary, id=ids, loss=sums.astype(np.float32), targets=counts)
