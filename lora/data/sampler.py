"""`batch_at(step)`: the micro-batches of a step as a pure function of (seed, step).

There is no data loader and no state. The examples of a step are a slice of a seeded shuffle, so a
run continues at any step by asking for that step. How they are laid out in micro-batches changes
the speed and nothing else.
"""

from functools import cached_property, lru_cache
from itertools import chain

import numpy as np

from lora.common.errors import LESS_MEMORY, ResourceExhausted, UserError
from lora.common.seeds import seed_for
from lora.config.schema import Config, rows_per_batch
from lora.data.batches import Batch, Rows, shard_rows, split_groups
from lora.data.mixing import Mix, dataset_names

MAX_PASSES = 100  # over the data in one step


@lru_cache(maxsize=64)  # asked for several times a step
def shuffle(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order in which a pass over `count` rows visits them."""
    return np.random.default_rng(seed_for(seed, "order", epoch)).permutation(count)


class TrainingData:
    """The training rows and the held-out rows of a run, as one process of several reads them."""

    def __init__(
        self,
        rows: Rows,
        held_out: Rows,
        config: Config,
        packed: bool = True,
        rank: int = 0,
        world_size: int = 1,
        layout: dict | None = None,
    ) -> None:
        """`layout` is that of the run that is resumed, from its checkpoint; None: a fresh run."""
        training = config.training
        data = config.data
        self.rows = rows
        self.held_out = held_out
        self.packed = packed
        self.rank = rank
        self.world_size = world_size
        self.seed = training.seed

        batch_size = rows_per_batch(training)
        self.examples_per_step = batch_size * training.gradient_accumulation_steps * world_size
        self.max_tokens = batch_size * data.max_length
        if training.batch_size == "auto":  # a step in one micro-batch, halved until it fits
            self.max_tokens *= training.gradient_accumulation_steps
        if layout:
            self.examples_per_step = layout["examples_per_step"]
            self.max_tokens = layout["max_tokens"]
        if self.examples_per_step > MAX_PASSES * len(rows):
            step = f"a step of {self.examples_per_step} examples"
            passes = f"{step} is {self.examples_per_step // len(rows)} passes over the data"
            mend = "lower batch_size or gradient_accumulation_steps"
            raise UserError(f"{passes}; expected {MAX_PASSES} at most; {mend}.")
        self.steps_per_epoch = len(rows) / self.examples_per_step
        self.cap_max_tokens()
        self.max_eval_rows = training.max_eval_batches * 4 or len(held_out)

        self.sets = [np.arange(len(rows))]  # rows of each data set that is mixed
        if data.weights:
            ids = range(len(data.train_paths))
            self.sets = [np.flatnonzero(rows.dataset_ids == dataset_id) for dataset_id in ids]
        self.mix = Mix(data.train_paths, data.weights or [1.0], self.sets)
        # {name: dataset id} of the held-out sets whose metrics are shown one by one
        self.held_out_sets: dict[str, int] = {}
        names = dataset_names(data.eval_paths)
        if len(names) > 1 and (data.eval_data or data.weights or data.only_evaluated):
            self.held_out_sets = {name: dataset_id for dataset_id, name in enumerate(names)}

    def cap_max_tokens(self) -> None:
        """Lower max_tokens to the largest micro-batch of any step, which is tried before step 1."""
        self.uncapped_max_tokens = self.max_tokens  # a resumed run begins with it, and caps it too
        self.max_tokens = min(self.max_tokens, self.largest_group(self.longest_rows))

    @property
    def layout(self) -> dict:
        """What a resumed run keeps of this one, whatever its number of processes."""
        return {"examples_per_step": self.examples_per_step, "max_tokens": self.uncapped_max_tokens}

    def batch_at(self, step: int) -> list[Batch]:
        """Return this process's micro-batches of a step, whatever came before."""
        return self.local_batches(self.rows_at(step))

    def local_batches(self, rows: np.ndarray) -> list[Batch]:
        """Return this process's micro-batches of a step that has these rows."""
        # All processes get equally many, because they gather sharded weights at once.
        groups_by_process = self.groups_by_process(rows)
        most_groups = max(len(groups) for groups in groups_by_process)
        groups = split_groups(groups_by_process[self.rank], most_groups)
        return self.make_batches(groups, rows)

    def largest_batches(self) -> list[Batch]:
        """Return the two largest micro-batches that a step can have on this process."""
        # Two, because the second one's backward pass runs beside the gradients of the first.
        rows = self.longest_rows
        groups_by_process = self.groups_by_process(rows)
        count = min(2, max(len(groups) for groups in groups_by_process))  # on every process
        groups = sorted(groups_by_process[self.rank], key=self.num_positions, reverse=True)
        largest = groups[:count]
        if len(largest) < count:  # another process has one micro-batch more
            largest.append([])
        return self.make_batches(largest, rows)

    def make_batches(self, groups: list[list[int]], rows: np.ndarray) -> list[Batch]:
        """Make a micro-batch of each group; an empty group repeats a row without its targets."""
        shortest = rows[self.rows.seq_lens(rows).argmin()]
        batches = []
        for group in groups:
            has_targets = len(group) > 0
            batches.append(self.rows.batch(group or [shortest], self.packed, has_targets))
        return batches

    def largest_group(self, rows: np.ndarray) -> int:
        """Return the positions of the largest micro-batch of any process in a step of `rows`."""
        groups = chain.from_iterable(self.groups_by_process(rows))
        return max(self.num_positions(group) for group in groups)

    def groups_by_process(self, rows: np.ndarray) -> list[list[list[int]]]:
        process = shard_rows(self.rows.seq_lens(rows), self.world_size)
        shares = [rows[process == i] for i in range(self.world_size)]
        return [self.rows.groups(share, self.max_tokens, self.packed) for share in shares]

    def num_positions(self, group: list[int]) -> int:
        """Return the number of a micro-batch's tokens, with those of padding where it is padded."""
        if not group:
            return 0
        seq_lens = self.rows.seq_lens(np.array(group, np.int64))
        return int(seq_lens.sum() if self.packed else len(group) * seq_lens.max())

    def halve_micro_batches(self, rows: np.ndarray) -> str:
        """Halve all later micro-batches, after `rows` did not fit, and return a line for the log.

        Raises ResourceExhausted where each micro-batch holds a single row already.
        """
        largest = self.largest_group(rows)
        if all(len(group) <= 1 for group in chain.from_iterable(self.groups_by_process(rows))):
            found = f"out of memory on a single example of {largest} tokens"
            raise ResourceExhausted(f"{found}. {LESS_MEMORY}")
        self.max_tokens = min(self.max_tokens, largest) // 2
        self.cap_max_tokens()
        found = f"out of memory on {largest} tokens"
        return f"{found}: micro-batches of at most {self.max_tokens} tokens from now on"

    def num_targets_at(self, step: int) -> int:
        """Return the number of targets of a step, over all processes."""
        return self.rows.num_targets(self.rows_at(step))

    def size_at(self, step: int) -> int:
        """Return the number of tokens of a step, over all processes."""
        return int(self.rows.seq_lens(self.rows_at(step)).sum())

    def rows_at(self, step: int) -> np.ndarray:
        """Return the rows of a step, over all processes."""
        first = step * self.examples_per_step
        return self.rows_of_examples(np.arange(first, first + self.examples_per_step))

    @cached_property  # asked for by every evaluation, and it sorts all rows
    def longest_rows(self) -> np.ndarray:
        """The longest rows that a step could have, over all processes."""
        order = np.argsort(-self.rows.seq_lens(np.arange(len(self.rows))), kind="stable")
        # A copy: a view would keep the order of all rows. A step may hold a row several times.
        return np.resize(order, self.examples_per_step)

    def rows_of_examples(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows, [n], that are these examples of the run, counted over all steps."""
        dataset_ids, earlier = self.mix.turns(numbers)
        rows = np.empty(len(numbers), np.int64)
        for dataset_id, members in enumerate(self.sets):
            in_set = np.flatnonzero(dataset_ids == dataset_id)
            epochs, places = np.divmod(earlier[in_set], len(members))
            for epoch in np.unique(epochs).tolist():
                in_epoch = epochs == epoch
                order = shuffle(self.seed, epoch, len(members))
                rows[in_set[in_epoch]] = members[order[places[in_epoch]]]
        return rows

    def evaluation(self) -> list[Batch]:
        """Return all processes' micro-batches of an evaluation: the same rows in every run.

        No micro-batch has more tokens than the largest of a training step, tried before step 1.
        """
        return self.held_out.batches(self.evaluation_rows(), self.max_tokens, self.packed)

    def evaluation_rows(self) -> np.ndarray:
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return order[: self.max_eval_rows]
