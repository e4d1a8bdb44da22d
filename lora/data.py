"""Rows in flat arrays, and `batch_at(step)`: a pure function of (seed, step).

There is no loader and no state: the examples of a step are a slice of a seeded shuffle, so a run continues at any step
by asking for that step. How they are laid out in micro-batches changes the speed and nothing else.
"""

from array import array
from dataclasses import dataclass, replace
from functools import lru_cache
import hashlib

import numpy as np
import torch

from lora.config import rows_per_batch
from lora.distributed import cut, deal
from lora.errors import LESS_MEMORY, Exhausted
from lora.mixing import Mix, names_of
from lora.render import NO_TOKEN

MOST_PADDING = 0.05  # of the positions of a micro-batch of padded rows


def seed_for(*parts):
    """A 63-bit seed that depends on every part: `seed_for(seed, "order", epoch)`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def shuffle(seed, epoch, count):
    """The order in which a pass over `count` rows visits them."""
    return np.random.default_rng(seed_for(seed, "order", epoch)).permutation(count)


@dataclass
class Batch:
    """A micro-batch, with n targets: documents end to end in one row, or one under the other.

    b is 1 and t the sum of the lengths where documents are packed; else each has a row of its own, padded on the right.
    """

    tokens: torch.Tensor  # [b, t]
    positions: torch.Tensor  # [b, t], from 0 again in every document
    segments: torch.Tensor  # [b, t], token types of an encoder, else 0
    rows: list[int]  # which of the Rows the documents are
    lengths: list[int]  # of the documents
    target_positions: torch.Tensor  # [n], indices into b x t
    targets: torch.Tensor  # [n], token ids or scores
    weights: torch.Tensor  # [n], by which their losses are multiplied
    sources: torch.Tensor  # [n], the data set that each target is of
    features: torch.Tensor | None = None  # [n, width]: the hidden states at the targets, where a frozen backbone's are kept

    @property
    def num_targets(self):
        return len(self.targets)

    def to(self, device):
        tensors = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


@dataclass
class Rows:
    """The tokenised rows of a data set, in flat arrays over all of them; row i is offsets[i] to offsets[i + 1]."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32 with NO_TOKEN, or float32 with NaN
    segments: np.ndarray  # int8
    offsets: np.ndarray  # int64, one more than rows
    weights: np.ndarray  # float32: of each row's losses
    sources: np.ndarray  # int16: of which path each row is
    features = None  # row -> the hidden states at its targets [n, width], where a frozen backbone's are kept

    @classmethod
    def of(cls, rows, task):
        """The arrays of (Row, source) pairs, which may be a generator."""
        tokens, targets = array("i"), array("i" if task == "lm" else "f")
        segments, offsets, weights, sources = array("b"), array("q", [0]), array("f"), array("h")
        for row, source in rows:
            tokens.extend(row.tokens)
            targets.extend(row.targets)
            segments.extend(row.segments or bytes(len(row.tokens)))
            offsets.append(len(tokens))
            weights.append(row.weight)
            sources.append(source)
        return cls(*(np.array(values) for values in (tokens, targets, segments, offsets, weights, sources)))

    def __len__(self):
        return len(self.offsets) - 1

    def lengths(self, indices):
        return self.offsets[indices + 1] - self.offsets[indices]

    def batch(self, indices, packed=True, asked=True):
        """The micro-batch of these rows, in this order; with their targets, if `asked`."""
        indices = np.asarray(indices)
        lengths = self.lengths(indices)
        where = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices])
        positions = np.concatenate([np.arange(length) for length in lengths])
        targets = self.targets[where]
        has_target = is_target(targets) & asked
        if packed:
            shape, place = (1, len(where)), np.arange(len(where))
        else:
            shape = (len(indices), int(lengths.max()))
            place = np.repeat(np.arange(len(indices)), lengths) * shape[1] + positions

        def laid_out(values):
            table = np.zeros(shape, np.int64)
            table.flat[place] = values
            return torch.from_numpy(table)

        return Batch(
            tokens=laid_out(self.tokens[where]),
            positions=laid_out(positions),
            segments=laid_out(self.segments[where]),
            rows=indices.tolist(),
            lengths=lengths.tolist(),
            target_positions=torch.from_numpy(place[has_target]),
            targets=torch.from_numpy(targets[has_target]).to(torch.int64 if targets.dtype == np.int32 else torch.float32),
            weights=torch.from_numpy(np.repeat(self.weights[indices], lengths)[has_target]),
            sources=torch.from_numpy(np.repeat(self.sources[indices], lengths)[has_target]),
            features=self.features and torch.cat([self.features[i] for i in indices])[: has_target.sum()],
        )

    def num_targets(self, indices):
        return sum(int(is_target(self.targets[self.offsets[i] : self.offsets[i + 1]]).sum()) for i in indices)

    def batches(self, indices, max_tokens, packed=True):
        """The rows at `indices` in micro-batches of at most `max_tokens` positions."""
        return [self.batch(group, packed) for group in self.groups(indices, max_tokens, packed)]

    def groups(self, indices, max_tokens, packed=True):
        """The rows of each micro-batch.

        Packed rows keep the order; others are sorted by length, so that little of a micro-batch is padding.
        """
        indices = np.asarray(indices, np.int64)
        if not packed:
            indices = indices[np.argsort(self.lengths(indices), kind="stable")]
        lengths = self.lengths(indices)
        groups, held = [[]], 0
        for i, length in zip(indices, lengths):
            held += length
            size = held if packed else (len(groups[-1]) + 1) * length
            if groups[-1] and (size > max_tokens or size - held > MOST_PADDING * size):
                groups.append([])
                held = length
            groups[-1].append(i)
        return groups


def is_target(targets):
    return targets != NO_TOKEN if targets.dtype == np.int32 else ~np.isnan(targets)


class TrainingData:
    """What the loop asks for: `batch_at(step)`, and `evaluation()`, for one process of several.

    A resumed run keeps the examples of a step and the tokens of a micro-batch of `before`, its checkpoint's state.
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
            self.examples_per_step, self.max_tokens = before["examples_per_step"], before["max_tokens"]
        self.max_eval_rows = settings.max_eval_batches * 4 or len(held_out)
        self.steps_per_epoch = len(rows) / self.examples_per_step
        self.sets = [np.arange(len(rows))]
        if data.weights:
            self.sets = [np.flatnonzero(rows.sources == source) for source in range(len(data.train_paths))]
        self.mix = Mix(data.train_paths, data.weights or [1.0], self.sets)
        self.order = lru_cache(maxsize=64)(self.order_of)  # kept, because it is asked for at every step
        mixed = len(data.eval_paths) > 1 and (data.eval_data or data.weights or data.only_evaluated)
        self.held_out_sets = {name: source for source, name in enumerate(names_of(data.eval_paths))} if mixed else {}

    @property
    def layout(self):
        """What a resumed run keeps of this one."""
        return {"examples_per_step": self.examples_per_step, "max_tokens": self.max_tokens}

    def batch_at(self, step):
        """This process's micro-batches of a step: the same ones for the same (seed, step), whatever came before.

        Every process gets as many, since sharded weights are gathered by all at once.
        """
        rows = self.rows_at(step)
        dealt = self.dealt(rows)
        mine = cut(dealt[self.rank], max(map(len, dealt)))
        if step is None:  # the two largest; the second meets the gradients of the first
            mine = sorted(mine, key=lambda group: -self.rows.lengths(np.array(group, np.int64)).sum())[:2]
        shortest = rows[self.rows.lengths(rows).argmin()]
        return [self.rows.batch(group or [shortest], self.packed, bool(group)) for group in mine]

    def dealt(self, rows):
        """The rows of each process's micro-batches, dealt by length so that all are done at about the same time."""
        owner = deal(self.rows.lengths(rows), self.world)
        return [self.rows.groups(rows[owner == i], self.max_tokens, self.packed) for i in range(self.world)]

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
        """The rows of a step, over all processes; of no step (None) the longest that one could have."""
        if step is None:
            longest = np.argsort(-self.rows.lengths(np.arange(len(self.rows))), kind="stable")
            return longest[: self.examples_per_step]
        first = step * self.examples_per_step
        return np.array([self.row_at(place) for place in range(first, first + self.examples_per_step)])

    def row_at(self, place):
        """The row that is the run's example number `place`; each set is passed over in an order of its own."""
        source, before = self.mix.turn(place)
        members = self.sets[source]
        epoch, number = divmod(before, len(members))
        return members[self.order(source, epoch)[number]]

    def order_of(self, source, epoch):
        """The order in which a pass visits the rows of a set."""
        return shuffle(self.seed, epoch, len(self.sets[source]))

    def evaluation(self):
        """The micro-batches, for all processes, of the first so many held-out rows of one order, the same for every run."""
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return self.held_out.batches(order[: self.max_eval_rows], self.max_tokens, self.packed)
