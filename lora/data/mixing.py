"""Several data sets in one run: their names, and whose turn it is at each example."""

import numpy as np

from lora.common.errors import UserError

SCHEDULE = 10_000  # examples over which the shares of a mix come out exactly


def dataset_names(paths):
    """A short name for each path: its file's, with a number where two are alike."""
    stems = [path.rpartition("/")[2].split(".")[0] for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}_{i}" for i, stem in enumerate(stems, 1)]


class Mix:
    """Which set each example of a run comes from: at every point the shares are as near to the
    weights as can be.
    """

    def __init__(self, paths, weights, sets):
        """sets: of each path the rows. Raises UserError where one is empty, or would never have its
        turn.
        """
        empty = [path for path, members in zip(paths, sets) if not len(members)]
        if empty:
            raise UserError(
                f"{empty[0]}: none of its rows is left to train on; leave it out, and its weight."
            )
        self.quotas = np.round(np.array(weights) / sum(weights) * SCHEDULE).astype(int)
        if not self.quotas.all():
            raise UserError(
                f"data_weights = {weights}: a share below {1 / SCHEDULE} is never reached; leave that set out."
            )
        due = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in self.quotas])
        order = np.argsort(due, kind="stable")
        # [the quotas' sum]: whose turn it is
        self.sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
        # How often it was, in this round
        self.before = np.concatenate([np.arange(quota) for quota in self.quotas])[order]

    def turn(self, place):
        """Of the run's example number `place`: (the number of its set, how many came from that set
        before).
        """
        rounds, i = divmod(place, len(self.sources))
        source = self.sources[i]
        return source, int(rounds * self.quotas[source] + self.before[i])
