"""Rows in flat arrays, and `batch_at(step)`: a pure function of (seed, step).

There is no loader and no state: the examples of a step are a slice of a seeded shuffle, so a run continues at any step
by asking for that step. How they are laid out in micro-batches changes the speed and nothing else.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
import hashlib

import numpy as np
import torch

from lora.errors import UserError
from lora.render import NO_TOKEN, render


def seed_for(*parts):
    """A 63-bit seed that depends on every part: `seed_for(seed, "order", epoch)`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@lru_cache(maxsize=2)
def shuffle(seed, epoch, count):
    """The order in which a pass over `count` rows visits them (kept, because it is asked for at every step)."""
    return np.random.default_rng(seed_for(seed, "order", epoch)).permutation(count)


@dataclass
class Batch:
    """A micro-batch: documents laid end to end in one row of T tokens, n of whose positions have a target."""

    tokens: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T], from 0 again in every document
    segments: torch.Tensor  # [1, T], token types of an encoder, else 0
    lengths: list[int]  # of the documents; their sum is T
    target_positions: torch.Tensor  # [n], indices into T
    targets: torch.Tensor  # [n], token ids or scores

    @property
    def num_targets(self):
        return len(self.targets)

    def to(self, device):
        tensors = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


class Rows:
    """The tokenised rows of a data set.

    tokens, targets and segments are flat arrays over all rows; row i is offsets[i] to offsets[i + 1].
    """

    def __init__(self, rows, task):
        self.offsets = np.cumsum([0] + [len(row.tokens) for row in rows])
        self.tokens = np.concatenate([np.asarray(row.tokens, np.int32) for row in rows])
        kind = np.int32 if task == "lm" else np.float32
        self.targets = np.concatenate([np.asarray(row.targets, kind) for row in rows])
        self.segments = np.concatenate([np.asarray(row.segments or [0] * len(row.tokens), np.int8) for row in rows])
        self.has_target = self.targets != NO_TOKEN if task == "lm" else ~np.isnan(self.targets)

    def __len__(self):
        return len(self.offsets) - 1

    def batch(self, indices):
        """The micro-batch of these rows, in this order."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]
        where = np.concatenate(spans)
        has_target = self.has_target[where]
        targets = self.targets[where][has_target]
        return Batch(
            tokens=torch.from_numpy(self.tokens[where].astype(np.int64))[None],
            positions=torch.from_numpy(np.concatenate([span - span[0] for span in spans]))[None],
            segments=torch.from_numpy(self.segments[where].astype(np.int64))[None],
            lengths=[len(span) for span in spans],
            target_positions=torch.from_numpy(np.flatnonzero(has_target)),
            targets=torch.from_numpy(targets.astype(np.int64) if targets.dtype == np.int32 else targets),
        )

    def batches(self, indices, max_tokens):
        """The rows at `indices` in micro-batches of at most `max_tokens` tokens, as few as this order allows."""
        groups, size = [], max_tokens + 1
        for i in indices:
            length = self.offsets[i + 1] - self.offsets[i]
            if size + length > max_tokens:
                groups.append([])
                size = 0
            groups[-1].append(i)
            size += length
        return [self.batch(group) for group in groups]


class TrainingData:
    """What the loop asks for: `batch_at(step)`, and `evaluation()`."""

    def __init__(self, rows, held_out, config):
        settings = config.training
        self.rows, self.held_out, self.seed = rows, held_out, settings.seed
        self.examples_per_step = settings.batch_size * settings.gradient_accumulation_steps
        self.max_tokens = settings.batch_size * config.data.max_length
        self.max_eval_rows = settings.max_eval_batches * 4 or len(held_out)
        self.steps_per_epoch = len(rows) / self.examples_per_step

    def batch_at(self, step):
        """The micro-batches of a step: the same ones for the same (seed, step), whatever came before."""
        first = step * self.examples_per_step
        places = np.arange(first, first + self.examples_per_step)
        epochs = places // len(self.rows)
        chosen = [shuffle(self.seed, int(e), len(self.rows))[p % len(self.rows)] for e, p in zip(epochs, places)]
        return self.rows.batches(chosen, self.max_tokens)

    def evaluation(self):
        """Micro-batches of the held-out rows: the first so many of one fixed order, the same for every run."""
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return self.held_out.batches(order[: self.max_eval_rows], self.max_tokens)


def tokenise(examples, task, config, name):
    """(Rows, a line that says what they are). Raises UserError where no row has a target."""
    data = config.data
    rendered = render(examples, task.tokenizer, config.model.task, data.max_length, task.causal)
    rows = [row for result in rendered for row in result.rows]
    if not rows:
        raise UserError(f"{examples[0].where}: no {name} example has a target within max_length {data.max_length}.")
    table = Rows(rows, config.model.task)
    targets = table.targets[table.has_target]
    facts = f"{name}: {len(examples)} examples, {len(table.tokens)} tokens, {len(targets)} targets"
    if config.model.task == "score":
        facts += f" (mean {targets.mean():.3f})"
        labelled = sum(label is not None for example in examples for label in example.labels)
        if labelled > len(targets):
            facts += f"; {labelled - len(targets)} labelled steps do not fit max_length {data.max_length} and are left out"
    return table, facts
