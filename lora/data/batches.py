"""Tokenised rows in flat arrays, and micro-batches made of them: packed end to end, or padded.

A row is one sequence for the model: a chat, a window of a text, or a problem with its steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lora.data.array_check import ArrayCheck
from lora.data.tokenise import NO_TOKEN, Row

MAX_PADDING = 0.05  # of the positions of a padded micro-batch


@dataclass
class Batch:
    """A micro-batch with n targets.

    Packed documents lie end to end in one row: b is 1. Otherwise each is padded on the right.
    """

    input_ids: Tensor  # [b, t]
    position_ids: Tensor  # [b, t], starting from 0 in every document
    token_type_ids: Tensor  # [b, t], of an encoder's pair of texts; otherwise 0
    rows: list[int]  # indices of the documents in Rows
    seq_lens: list[int]  # lengths of the documents
    target_positions: Tensor  # [n], indices into the flattened b x t positions
    targets: Tensor  # [n], token ids or scores
    loss_weights: Tensor  # [n], factors of the targets' losses
    dataset_ids: Tensor  # [n], the data set of each target
    features: Tensor | None = None  # [n, width], cached hidden states at the targets

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


@dataclass
class Rows:
    """The tokenised rows of a data set in flat arrays; row i is offsets[i] to offsets[i + 1]."""

    tokens: np.ndarray  # [tokens], int32
    targets: np.ndarray  # [tokens], int32 with NO_TOKEN, or float32 with NaN
    token_type_ids: np.ndarray  # [tokens], int8
    offsets: np.ndarray  # [rows + 1], int64
    loss_weights: np.ndarray  # [tokens], float32, of the target at this place
    dataset_ids: np.ndarray  # [rows], int32
    features: dict[int, Tensor] | None = None  # row -> cached hidden states [its targets, width]
    check: ArrayCheck = field(default_factory=ArrayCheck)  # of the files that are mapped

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[Row, int]], task: str) -> Rows:
        """Collect pairs of (row, dataset id). `task` is "lm" or "score"."""
        columns = {name: array(np.dtype(kind).char) for name, kind in array_types(task).items()}
        columns["offsets"].append(0)
        for row, dataset_id in rows:
            columns["tokens"].extend(row.tokens)
            columns["targets"].extend(row.targets)
            columns["token_type_ids"].extend(row.token_type_ids or bytes(len(row.tokens)))
            columns["offsets"].append(len(columns["tokens"]))
            target_weights = row.target_weights or [1.0] * len(row.tokens)
            columns["loss_weights"].extend(row.loss_weight * weight for weight in target_weights)
            columns["dataset_ids"].append(dataset_id)
        return cls(**{name: np.array(column) for name, column in columns.items()})

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def span(self, i: int) -> slice:
        """Return where row i lies in the flat arrays."""
        return slice(self.offsets[i], self.offsets[i + 1])

    def seq_lens(self, indices: np.ndarray) -> np.ndarray:
        return self.offsets[indices + 1] - self.offsets[indices]

    def num_targets(self, indices: Iterable[int]) -> int:
        return sum(int(is_target(self.targets[self.span(i)]).sum()) for i in indices)

    def batch(self, group: Sequence[int], packed: bool = True, with_targets: bool = True) -> Batch:
        """Make one micro-batch of the rows in `group`, in this order."""
        rows = np.asarray(group)
        seq_lens = self.seq_lens(rows)
        tokens_of_rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows]
        token_indices = np.concatenate(tokens_of_rows)
        position_ids = np.concatenate([np.arange(seq_len) for seq_len in seq_lens])

        # positions_in_table[k]: where token k goes in the flattened [b, t] table.
        if packed:
            shape = (1, len(token_indices))
            positions_in_table = np.arange(len(token_indices))
        else:
            shape = (len(rows), int(seq_lens.max()))
            first_positions = np.arange(len(rows)) * shape[1]
            positions_in_table = np.repeat(first_positions, seq_lens) + position_ids

        def table(values: np.ndarray) -> Tensor:
            padded = np.zeros(shape, np.int64)
            padded.flat[positions_in_table] = values
            return torch.from_numpy(padded)

        targets = self.targets[token_indices]
        has_target = is_target(targets) & with_targets
        target_dtype = torch.int64 if targets.dtype == np.int32 else torch.float32
        dataset_ids = np.repeat(self.dataset_ids[rows], seq_lens)
        features = None
        if self.features is not None:
            features = torch.cat([self.features[i] for i in rows])
            if not with_targets:
                features = features[:0]
        return Batch(
            input_ids=table(self.tokens[token_indices]),
            position_ids=table(position_ids),
            token_type_ids=table(self.token_type_ids[token_indices]),
            rows=rows.tolist(),
            seq_lens=seq_lens.tolist(),
            target_positions=torch.from_numpy(positions_in_table[has_target]),
            targets=torch.from_numpy(targets[has_target]).to(target_dtype),
            loss_weights=torch.from_numpy(self.loss_weights[token_indices][has_target]),
            dataset_ids=torch.from_numpy(dataset_ids[has_target]),
            features=features,
        )

    def groups(self, rows: Sequence[int], max_tokens: int, packed: bool = True) -> list[list[int]]:
        """Divide rows into micro-batches of at most `max_tokens` positions."""
        rows = np.asarray(rows, np.int64)
        if not packed:  # rows of similar lengths need little padding
            rows = rows[np.argsort(self.seq_lens(rows), kind="stable")]
        groups: list[list[int]] = [[]]
        num_tokens = 0
        for row, seq_len in zip(rows, self.seq_lens(rows)):
            num_tokens += seq_len
            size = num_tokens if packed else (len(groups[-1]) + 1) * seq_len
            num_padding = size - num_tokens
            is_full = size > max_tokens or num_padding > MAX_PADDING * size
            if groups[-1] and is_full:
                groups.append([])
                num_tokens = seq_len
            groups[-1].append(row)
        return groups

    def batches(self, rows: Sequence[int], max_tokens: int, packed: bool = True) -> list[Batch]:
        """Return these rows in micro-batches of at most `max_tokens` positions."""
        return [self.batch(group, packed) for group in self.groups(rows, max_tokens, packed)]


def array_types(task: str) -> dict[str, type]:
    """Return the dtype of each field of Rows that is stored. `task` is "lm" or "score"."""
    return {
        "tokens": np.int32,
        "targets": np.int32 if task == "lm" else np.float32,
        "token_type_ids": np.int8,
        "offsets": np.int64,
        "loss_weights": np.float32,
        "dataset_ids": np.int32,
    }


def is_target(targets: np.ndarray) -> np.ndarray:
    """Return where a target stands: not NO_TOKEN for token ids, not NaN for scores."""
    return targets != NO_TOKEN if targets.dtype == np.int32 else ~np.isnan(targets)


def shard_rows(seq_lens: np.ndarray, world_size: int) -> np.ndarray:
    """Return a process for each row [rows], so that all have about the same number of tokens.

    Longest rows first, each to the process with the least work (LPT scheduling; Graham 1969).
    """
    process_of_row = np.zeros(len(seq_lens), np.int64)
    tokens_of_process = np.zeros(world_size, np.int64)
    for row in np.argsort(-seq_lens, kind="stable"):
        process = tokens_of_process.argmin()
        process_of_row[row] = process
        tokens_of_process[process] += seq_lens[row]
    return process_of_row


def split_groups(groups: list[list[int]], count: int) -> list[list[int]]:
    """Return `count` groups: the largest are halved, and empty ones are added where none can be."""
    groups = [group for group in groups if group]
    while len(groups) < count and any(len(group) > 1 for group in groups):
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        group = groups[largest]
        middle = len(group) // 2
        groups[largest : largest + 1] = [group[:middle], group[middle:]]
    groups += [[] for _ in range(count - len(groups))]
    return groups
