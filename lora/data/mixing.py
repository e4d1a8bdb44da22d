"""Several data sets in one run: their names, and which of them each example comes from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora.common.errors import UserError

SCHEDULE = 10_000  # examples over which the shares of a mix come out exactly


def dataset_names(paths: Sequence[str]) -> list[str]:
    """Return a short name for each path: its file's, with a number where two are alike."""
    stems = [Path(path).name.split(".")[0] or "data" for path in paths]
    names: list[str] = []
    for number, stem in enumerate(stems, 1):
        name = stem if stems.count(stem) == 1 else f"{stem}_{number}"
        while stems.count(stem) > 1 and name in (*stems, *names):  # another file has that name
            name += "_"
        names.append(name)
    return names


class Mix:
    """Which data set each example comes from: shares are always as near the weights as can be."""

    def __init__(self, paths: list[str], weights: list[float], sets: list[np.ndarray]) -> None:
        """`sets` holds the rows of each path. Raises UserError where one would never be read."""
        for path, rows in zip(paths, sets):
            if len(rows) == 0:
                advice = "leave it out, and its weight, or raise max_samples"
                raise UserError(f"{path}: it has no rows left to train on; {advice}.")
        self.quotas = np.round(np.array(weights) / sum(weights) * SCHEDULE).astype(int)
        if not self.quotas.all():
            problem = f"a share below {1 / SCHEDULE} is never reached; leave that set out"
            raise UserError(f"data_weights = {weights}: {problem}.")
        # An example of a set is due each time that the set's share of the schedule has passed.
        due = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in self.quotas])
        order = np.argsort(due, kind="stable")
        counts = np.concatenate([np.arange(quota) for quota in self.quotas])
        self.dataset_ids = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]  # [schedule]
        self.earlier = counts[order]  # [schedule], examples of the same set before

    def turns(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the data set of these examples of the run, and how many came from it before."""
        rounds, places = np.divmod(numbers, len(self.dataset_ids))
        dataset_ids = self.dataset_ids[places]
        return dataset_ids, rounds * self.quotas[dataset_ids] + self.earlier[places]
