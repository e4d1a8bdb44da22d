"""Linear probing: only the score head is trained on a frozen base.

The base's hidden states at the targets are computed once, and kept in main memory.
"""

from dataclasses import replace
import time

import numpy as np
from tqdm import tqdm

from lora.config.schema import max_batch_tokens
from lora.data.batches import Rows
from lora.distributed.process_group import hide_bar
from lora.evaluation.predict import outputs_at_targets
from lora.model.run import Run
from lora.training.log import Log, has_bar, time_left

BATCHES_AT_ONCE = 64  # micro-batches whose hidden states are on the device together


def cache_features(run: Run, total_steps: int, log: Log) -> None:
    """Compute the hidden states that `total_steps` steps and the evaluations need, once.

    Which rows share a micro-batch depends on the length of the run alone, so a run that is resumed
    to the same length computes the same bits.
    """
    data = run.data
    is_used = np.zeros(len(data.rows), bool)
    is_used[data.longest_rows] = True
    for step in range(total_steps):
        is_used[data.rows_at(step)] = True
        if is_used.all():  # as after an epoch; the run may have many
            break
    evaluated = data.evaluation_rows()
    used = np.flatnonzero(is_used)
    data.rows = with_features(run, data.rows, used, log, "features of train")
    data.held_out = with_features(run, data.held_out, evaluated, log, "features of eval")


def with_features(run: Run, rows: Rows, indices: np.ndarray, log: Log, desc: str) -> Rows:
    """Return `rows` with the hidden states of those at `indices`. Progress is shown as `desc`."""
    task = run.task
    groups = rows.groups(np.unique(indices), max_batch_tokens(run.config), task.packed)
    total = len(groups)
    features = {}
    started = time.monotonic()
    with tqdm(total=total, desc=desc, unit="batch", disable=hide_bar(), leave=False) as bar:
        for start in range(0, total, BATCHES_AT_ONCE):
            chunk = groups[start : start + BATCHES_AT_ONCE]
            batches = [rows.batch(group, task.packed) for group in chunk]
            method = task.target_hidden_states
            hidden = outputs_at_targets(task, method, batches, run.device, run.dtype)
            order = np.concatenate(chunk)
            counts = [rows.num_targets([row]) for row in order]
            features.update(zip(order, hidden.split(counts)))
            bar.update(len(chunk))
            done = start + len(chunk)
            if not has_bar() and 100 * done // total > 100 * start // total:  # at most 100 lines
                left = time_left(done, total, time.monotonic() - started)
                log.say(f"{desc}: micro-batch {done}/{total} ({done / total:.1%}){left}")
    return replace(rows, features=features)
