"""Linear probing: only the score head is trained on a frozen base.

The base's hidden states at the targets are computed once, and kept in main memory.
"""

from dataclasses import replace

import numpy as np
from tqdm import tqdm

from lora.config.schema import max_batch_tokens
from lora.data.batches import Rows
from lora.distributed.process_group import rank
from lora.evaluation.predict import outputs_at_targets
from lora.model.run import Run

BATCHES_AT_ONCE = 64  # micro-batches whose hidden states are on the device together


def cache_features(run: Run, total_steps: int) -> None:
    """Compute the hidden states that `total_steps` steps and the evaluations need, once.

    Does nothing where more than the head is trained. Which rows share a micro-batch depends on no
    step, so a resumed run computes the same bits.
    """
    data = run.data
    if not run.task.frozen:
        return
    rows_of_steps = [data.rows_at(step) for step in range(total_steps)]
    used = np.concatenate([data.longest_rows(), *rows_of_steps])
    evaluated = np.concatenate([batch.rows for batch in data.evaluation()])
    data.rows = with_features(run, data.rows, used, "features of train")
    data.held_out = with_features(run, data.held_out, evaluated, "features of eval")


def with_features(run: Run, rows: Rows, indices: np.ndarray, desc: str) -> Rows:
    """Return `rows` with the hidden states of those at `indices`. The progress bar shows `desc`."""
    task = run.task
    groups = rows.groups(np.unique(indices), max_batch_tokens(run.config), task.packed)
    features = {}
    quiet = True if rank() > 0 else None  # None: no bar where there is no terminal
    with tqdm(total=len(groups), desc=desc, unit="batch", disable=quiet, leave=False) as bar:
        for start in range(0, len(groups), BATCHES_AT_ONCE):
            chunk = groups[start : start + BATCHES_AT_ONCE]
            batches = [rows.batch(group, task.packed) for group in chunk]
            method = task.target_hidden_states
            hidden = outputs_at_targets(task, method, batches, run.device, run.dtype)
            order = np.concatenate(chunk)
            counts = [rows.num_targets([row]) for row in order]
            features.update(zip(order, hidden.split(counts)))
            bar.update(len(chunk))
    return replace(rows, features=features)
