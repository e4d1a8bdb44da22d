"""Write the arrays of a token cache entry shard by shard; an interrupted writer is continued."""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lora.common.atomic_files import write_text_atomically
from lora.data.batches import array_types
from lora.data.counts import Counts

PARTS = ("train", "eval")
ARRAYS = tuple(array_types("lm"))
NAMES = [f"{part}_{name}" for part in PARTS for name in ARRAYS]
PROGRESS = "progress.json"
Arrays = dict[str, np.ndarray]  # the fields of Rows


class EntryWriter:
    """Appends shards to the arrays of a folder, from where an interrupted writer stopped.

    After each shard, progress.json records the length and the hash of every array. After a crash,
    only what agrees with it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_shards = 0
        self.counts = {part: Counts() for part in PARTS}
        self.files: dict[str, BinaryIO] = {}
        self.sums = {name: hashlib.sha256() for name in NAMES}
        try:
            progress = json.loads((folder / PROGRESS).read_bytes())
            sizes = progress["sizes"]
            for name in NAMES:
                if sizes[name]:
                    written = np.memmap(self.path(name), np.uint8, "r", shape=(sizes[name],))
                    self.sums[name].update(written.data)
            if self.hashes() != progress["sha256"]:
                raise ValueError("changed since they were written")
            self.num_shards = progress["shards"]
            self.counts = {part: Counts(**progress["counts"][part]) for part in PARTS}
        except (OSError, ValueError, KeyError, TypeError):
            sizes = dict.fromkeys(NAMES, 0)
            self.sums = {name: hashlib.sha256() for name in NAMES}
        for name in NAMES:
            self.files[name] = open(self.path(name), "ab")
            self.files[name].truncate(sizes[name])

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def hashes(self) -> dict[str, str]:
        return {name: total.hexdigest() for name, total in self.sums.items()}

    def append(self, shard: dict[str, tuple[Arrays, Counts]]) -> None:
        """Write a shard: {part: the arrays of its rows, and their counts}."""
        for part, (arrays, counts) in shard.items():
            # The offsets of all shards are those of one table, which begin with a single 0.
            offsets = arrays["offsets"] + self.counts[part].tokens
            arrays["offsets"] = offsets[1:] if self.num_shards else offsets
            for name, array in arrays.items():
                self.files[f"{part}_{name}"].write(array.data)
                self.sums[f"{part}_{name}"].update(array.data)
            self.counts[part].add(counts)
        for file in self.files.values():
            file.flush()
        self.num_shards += 1
        progress = {
            "shards": self.num_shards,
            "sizes": {name: file.tell() for name, file in self.files.items()},
            "sha256": self.hashes(),
            "counts": {part: vars(counts) for part, counts in self.counts.items()},
        }
        write_text_atomically(self.folder / PROGRESS, json.dumps(progress))

    def seq_lens(self, part: str) -> np.ndarray:
        return np.diff(np.fromfile(self.path(f"{part}_offsets"), np.int64))

    def close(self) -> None:
        for file in self.files.values():
            file.close()
