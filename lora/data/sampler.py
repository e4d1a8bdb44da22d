"""`batch_at(step)`: the micro-batches of a step as a pure function of (seed, step).

There is no loader and no state: the examples of a step are a slice of a seeded shuffle, so a run
continues at any step by asking for that step. How they are laid out in micro-batches changes the
speed and nothing else.
"""

from functools import lru_cache

import numpy as np

from lora.common.errors import LESS_MEMORY, Exhausted
from lora.common.seeds import seed_for
from lora.config.schema import rows_per_batch
from lora.data.batches import cut, deal
from lora.data.mixing import Mix, names_of


def shuffle(seed, epoch, count):
    """The order in which a pass over `count` rows visits them."""
    return np.random.default_rng(seed_for(seed, "order", epoch)).permutation(count)


class TrainingData:
    """What the loop asks for: `batch_at(step)`, and `evaluation()`, for one process of several.

    A resumed run keeps the examples of a step and the tokens of a micro-batch of `before`, its
    checkpoint's state.
    """

    def __init__(self, rows, held_out, config, packed=True, rank=0, world=1, before=None):
        settings, data = config.training, config.data
        self.rank, self.world = rank, world
        self.rows, self.held_out, self.seed, self.packed = rows, held_out, settings.seed, packed
        batch_size, accumulated = rows_per_batch(settings), settings.gradient_accumulation_steps
        at_once = accumulated if settings.batch_size == "auto" else 1
        self.examples_per_step = batch_size * accumulated * world
        self.max_tokens = batch_size * at_once * data.max_length
        if before:
            self.examples_per_step, self.max_tokens = (
                before["examples_per_step"],
                before["max_tokens"],
            )
        self.max_eval_rows = settings.max_eval_batches * 4 or len(held_out)
        self.steps_per_epoch = len(rows) / self.examples_per_step
        self.sets = [np.arange(len(rows))]
        if data.weights:
            self.sets = [
                np.flatnonzero(rows.sources == source) for source in range(len(data.train_paths))
            ]
        self.mix = Mix(data.train_paths, data.weights or [1.0], self.sets)
        # Kept, because it is asked for at every step
        self.order = lru_cache(maxsize=64)(self.order_of)
        mixed = len(data.eval_paths) > 1 and (data.eval_data or data.weights or data.only_evaluated)
        self.held_out_sets = (
            {name: source for source, name in enumerate(names_of(data.eval_paths))} if mixed else {}
        )

    @property
    def layout(self):
        """What a resumed run keeps of this one."""
        return {"examples_per_step": self.examples_per_step, "max_tokens": self.max_tokens}

    def batch_at(self, step):
        """This process's micro-batches of a step: the same ones for the same (seed, step), whatever
        came before.

        Every process gets as many, since sharded weights are gathered by all at once.
        """
        rows = self.rows_at(step)
        dealt = self.dealt(rows)
        mine = cut(dealt[self.rank], max(map(len, dealt)))
        if step is None:  # the two largest; the second meets the gradients of the first
            mine = sorted(
                mine, key=lambda group: -self.rows.lengths(np.array(group, np.int64)).sum()
            )[:2]
        shortest = rows[self.rows.lengths(rows).argmin()]
        return [self.rows.batch(group or [shortest], self.packed, bool(group)) for group in mine]

    def dealt(self, rows):
        """The rows of each process's micro-batches, dealt by length so that all are done at about
        the same time.
        """
        owner = deal(self.rows.lengths(rows), self.world)
        return [
            self.rows.groups(rows[owner == i], self.max_tokens, self.packed)
            for i in range(self.world)
        ]

    def halve(self, step):
        """Micro-batches of half as many tokens from now on; returns what is to be said of it.

        Raises Exhausted where each of the step's holds a single row already.
        """
        groups = [group for groups in self.dealt(self.rows_at(step)) for group in groups]
        largest = max(int(self.rows.lengths(np.array(group)).sum()) for group in groups)
        if all(len(group) == 1 for group in groups):
            raise Exhausted(f"out of memory on a single example of {largest} tokens. {LESS_MEMORY}")
        self.max_tokens = min(self.max_tokens, largest) // 2
        return f"out of memory on {largest} tokens: micro-batches of at most {self.max_tokens} tokens from now on"

    def num_targets_at(self, step):
        """The number of targets of a step, over all processes."""
        return self.rows.num_targets(self.rows_at(step))

    def size_at(self, step):
        """The number of tokens of a step, over all processes."""
        return int(self.rows.lengths(self.rows_at(step)).sum())

    def rows_at(self, step):
        """The rows of a step, over all processes; of no step (None) the longest that one could
        have.
        """
        if step is None:
            longest = np.argsort(-self.rows.lengths(np.arange(len(self.rows))), kind="stable")
            return longest[: self.examples_per_step]
        first = step * self.examples_per_step
        return np.array(
            [self.row_at(place) for place in range(first, first + self.examples_per_step)]
        )

    def row_at(self, place):
        """The row that is the run's example number `place`; each set is passed over in an order of
        its own.
        """
        source, before = self.mix.turn(place)
        members = self.sets[source]
        epoch, number = divmod(before, len(members))
        return members[self.order(source, epoch)[number]]

    def order_of(self, source, epoch):
        """The order in which a pass visits the rows of a set."""
        return shuffle(self.seed, epoch, len(self.sets[source]))

    def evaluation(self):
        """The micro-batches, for all processes, of the first so many held-out rows of one order,
        the same for every run.
        """
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return self.held_out.batches(order[: self.max_eval_rows], self.max_tokens, self.packed)
