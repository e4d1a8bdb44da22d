"""Checkpoints of weights that are laid out over several processes: each writes its rows, any number
read what they need.

shard_0.safetensors, shard_1.safetensors, ...   "name" and "name/exp_avg" -> the rows of that
process
shards.json                                     {name: {"shape", "rows": where each process's part begins, and the end}}
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
import torch

from lora.common.atomic_files import fsync_path
from lora.distributed import process_group, sharding

INDEX_FILE = "shards.json"


def write_shard(folder, tensors):
    """Write this process's part of `tensors` (name -> tensor, sharded or the same on all
    processes).
    """
    world, rank = process_group.world_size(), process_group.rank()
    index, mine = {}, {}
    for name, tensor in tensors.items():
        sharded = sharding.is_sharded(tensor)
        index[name] = {"shape": list(tensor.shape)}
        if tensor.ndim:
            index[name]["rows"] = sharding.row_bounds(len(tensor), world if sharded else 1)
        if sharded or rank == 0:
            mine[name] = sharding.local_tensor(tensor).detach().cpu().contiguous()
    path = Path(folder) / f"shard_{rank}.safetensors"
    save_file(mine, path, {"format": "pt"})
    fsync_path(path)  # of several machines each makes durable what it wrote
    if rank == 0:
        (Path(folder) / INDEX_FILE).write_text(json.dumps(index) + "\n")


class Shards:
    """Tensors of which any rows can be read: what `write_shard` wrote, or a plain safetensors file."""

    def __init__(self, path):
        path = Path(path)
        if path.is_dir():
            self.index = json.loads((path / INDEX_FILE).read_text())
            count = max(len(entry.get("rows", (0, 0))) for entry in self.index.values()) - 1
            self.files = [path / f"shard_{process}.safetensors" for process in range(count)]
        else:
            self.files = [path]
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            self.index = {
                name: {"shape": s, **({"rows": [0, s[0]]} if s else {})}
                for name, s in shapes.items()
            }

    @torch.no_grad()
    def fill(self, tensor, name):
        """Copy the rows that this process holds into `tensor`. Raises ValueError where it is of
        another shape.
        """
        shape = self.index.get(name, {}).get("shape")
        if shape != list(tensor.shape):
            raise ValueError(f"{name} is {shape or 'absent'}, its place is {list(tensor.shape)}")
        sharding.local_tensor(tensor).copy_(self.get(name, *sharding.local_rows(tensor)))

    def get(self, name, first, last):
        """Rows first..last of a tensor; a number is given whole."""
        rows = self.index[name].get("rows")
        if rows is None:
            with safe_open(self.files[0], "pt") as file:
                return file.get_tensor(name)
        parts = [torch.empty(0, *self.index[name]["shape"][1:])]
        for path, begin, end in zip(self.files, rows, rows[1:]):
            if max(first, begin) < min(last, end):
                with safe_open(path, "pt") as file:
                    parts.append(
                        file.get_slice(name)[max(first, begin) - begin : min(last, end) - begin]
                    )
        return torch.cat(parts[1:] or parts)
