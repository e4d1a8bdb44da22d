"""Linear probing: the hidden states of a frozen base are computed once, and only the score head is
trained.
"""

import numpy as np
from tqdm import tqdm

from lora.config.schema import max_batch_tokens
from lora.distributed.process_group import rank

AT_ONCE = 64  # micro-batches whose features are on the device together


def keep_features(task, data, total, config, hidden_of):
    """Where the model is frozen, compute its hidden states at the targets of all that a run of
    `total` steps reads, once.

    hidden_of(batches) -> ([n, width], ...): train.py's `predict`. Which rows share a micro-batch
    depends on no step, so a resumed run has the same bits.
    """
    if not task.frozen:
        return
    used = np.concatenate([data.rows_at(step) for step in (None, *range(total))])
    held_out = [row for batch in data.evaluation() for row in batch.rows]
    for name, rows, indices in (("train", data.rows, used), ("eval", data.held_out, held_out)):
        groups = rows.groups(np.unique(indices), max_batch_tokens(config), task.packed)
        features, quiet = {}, True if rank() > 0 else None  # None: without a terminal
        with tqdm(
            total=len(groups), desc=f"features of {name}", unit="batch", disable=quiet, leave=False
        ) as bar:
            for start in range(0, len(groups), AT_ONCE):
                some = groups[start : start + AT_ONCE]
                hidden = hidden_of([rows.batch(group, task.packed) for group in some])[0]
                order = np.concatenate(some)
                features |= zip(order, hidden.split([rows.num_targets([i]) for i in order]))
                bar.update(len(some))
        rows.features = features
