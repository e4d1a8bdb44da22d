"""Tokenised rows in flat arrays, and micro-batches made of them: packed end to end, or padded."""

from array import array
from dataclasses import dataclass, replace

import numpy as np
import torch

from lora.data.tokenise import NO_TOKEN

MOST_PADDING = 0.05  # of the positions of a micro-batch of padded rows


@dataclass
class Batch:
    """A micro-batch, with n targets: documents end to end in one row, or one under the other.

    b is 1 and t the sum of the lengths where documents are packed; else each has a row of its own,
    padded on the right.
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
    # [n, width]: the hidden states at the targets, where a frozen backbone's are kept
    features: torch.Tensor | None = None

    @property
    def num_targets(self):
        return len(self.targets)

    def to(self, device):
        tensors = {
            k: v.to(device, non_blocking=True)
            for k, v in vars(self).items()
            if isinstance(v, torch.Tensor)
        }
        return replace(self, **tensors)


@dataclass
class Rows:
    """The tokenised rows of a data set, in flat arrays over all of them; row i is offsets[i] to
    offsets[i + 1].
    """

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32 with NO_TOKEN, or float32 with NaN
    segments: np.ndarray  # int8
    offsets: np.ndarray  # int64, one more than rows
    weights: np.ndarray  # float32: of each row's losses
    sources: np.ndarray  # int16: of which path each row is
    # Row -> the hidden states at its targets [n, width], where a frozen backbone's are kept
    features = None

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
        return cls(
            *(np.array(values) for values in (tokens, targets, segments, offsets, weights, sources))
        )

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
            targets=torch.from_numpy(targets[has_target]).to(
                torch.int64 if targets.dtype == np.int32 else torch.float32
            ),
            weights=torch.from_numpy(np.repeat(self.weights[indices], lengths)[has_target]),
            sources=torch.from_numpy(np.repeat(self.sources[indices], lengths)[has_target]),
            features=self.features
            and torch.cat([self.features[i] for i in indices])[: has_target.sum()],
        )

    def num_targets(self, indices):
        return sum(
            int(is_target(self.targets[self.offsets[i] : self.offsets[i + 1]]).sum())
            for i in indices
        )

    def batches(self, indices, max_tokens, packed=True):
        """The rows at `indices` in micro-batches of at most `max_tokens` positions."""
        return [self.batch(group, packed) for group in self.groups(indices, max_tokens, packed)]

    def groups(self, indices, max_tokens, packed=True):
        """The rows of each micro-batch.

        Packed rows keep the order; others are sorted by length, so that little of a micro-batch is
        padding.
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


def deal(lengths, world):
    """[len(lengths)]: which process gets each row; the longest first, each to the one that has the
    least to do.
    """
    owner, load = np.zeros(len(lengths), np.int64), np.zeros(world, np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        owner[i] = load.argmin()
        load[owner[i]] += lengths[i]
    return owner


def cut(groups, count):
    """The groups in `count` parts: the largest are halved, and where there is nothing to halve a
    part is empty.
    """
    groups = [group for group in groups if group]
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]), default=None)
        if largest is None or len(groups[largest]) == 1:
            groups.append([])
        else:
            group = groups[largest]
            groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups
