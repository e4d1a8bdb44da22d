"""Checkpoints of sharded weights: each process writes its rows, any number of processes read them.

shard_<rank>.safetensors   "name" and "name/exp_avg" -> the rows that this process holds
shards.json                {name: {"shape", "rows": the first row of each process, and the end}}
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
import torch
from torch import Tensor

from lora.common.operating_system import fsync_path
from lora.distributed.process_group import rank
from lora.distributed.sharding import is_sharded, local_rows, local_tensor, row_bounds

INDEX_FILE = "shards.json"


def write_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's rows of named tensors; the first one also writes what is not sharded."""
    index: dict[str, dict] = {}
    local_tensors = {}
    for name, tensor in tensors.items():
        index[name] = {"shape": list(tensor.shape)}
        if tensor.ndim > 0:
            index[name]["rows"] = row_bounds(tensor)
        if is_sharded(tensor) or rank() == 0:
            local_tensors[name] = local_tensor(tensor).detach().cpu().contiguous()
    path = folder / f"shard_{rank()}.safetensors"
    save_file(local_tensors, path, {"format": "pt"})
    fsync_path(path)  # on several machines, only this one can make its own shard durable
    if rank() == 0:
        (folder / INDEX_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")


class Shards:
    """Tensors of which any rows can be read: the folder of `write_shard`, or a safetensors file."""

    def __init__(self, path: Path) -> None:
        self.index: dict[str, dict] = {}
        self.files = [path]
        if path.is_dir():
            self.index = json.loads((path / INDEX_FILE).read_bytes())
            num_bounds = max(len(entry.get("rows", (0, 0))) for entry in self.index.values())
            self.files = [path / f"shard_{i}.safetensors" for i in range(num_bounds - 1)]
            return
        with safe_open(path, "pt") as file:
            for name in file.keys():
                shape = file.get_slice(name).get_shape()
                self.index[name] = {"shape": shape}
                if shape:
                    self.index[name]["rows"] = [0, shape[0]]

    @torch.no_grad()
    def fill(self, tensor: Tensor, name: str) -> None:
        """Copy this process's rows into `tensor`. Raises ValueError where the shapes differ."""
        shape = self.index.get(name, {}).get("shape")
        if shape != list(tensor.shape):
            raise ValueError(f"{name} is {shape or 'absent'}, its place is {list(tensor.shape)}")
        first, end = local_rows(tensor)
        local_tensor(tensor).copy_(self.get(name, first, end))

    def get(self, name: str, first: int, end: int) -> Tensor:
        """Return the rows [first, end) of a tensor, or a scalar."""
        bounds = self.index[name].get("rows")
        if bounds is None:
            with safe_open(self.files[0], "pt") as file:
                return file.get_tensor(name)
        parts = []
        for i, path in enumerate(self.files[: len(bounds) - 1]):
            begin_here = max(first, bounds[i]) - bounds[i]
            end_here = min(end, bounds[i + 1]) - bounds[i]
            if begin_here < end_here:
                with safe_open(path, "pt") as file:
                    parts.append(file.get_slice(name)[begin_here:end_here])
        return torch.cat(parts) if parts else torch.empty(0, *self.index[name]["shape"][1:])
