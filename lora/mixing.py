"""Several data sets in one run: their names, and whose turn it is at each example."""

import numpy as np

from lora.errors import UserError

SCHEDULE = 10_000  # examples over which the shares of a mix come out exactly


def names_of(paths):
    """A short name for each path: its file's, with a number where two are alike."""
    stems = [path.rpartition("/")[2].split(".")[0] for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}_{i}" for i, stem in enumerate(stems, 1)]


def schedule(paths, weights, sets):
    """[SCHEDULE]: which set each example of a mix comes from; at every point the shares are as near as can be."""
    empty = [path for path, members in zip(paths, sets) if not len(members)]
    if empty:
        raise UserError(f"{empty[0]}: none of its rows is left to train on, and it has a weight in data_weights.")
    quotas = np.round(np.array(weights) / sum(weights) * SCHEDULE).astype(int)
    if not quotas.all():
        raise UserError(f"data_weights = {weights}: a share below {1 / SCHEDULE} is never reached; leave that set out.")
    turns = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
    return np.repeat(np.arange(len(sets)), quotas)[np.argsort(turns, kind="stable")]
