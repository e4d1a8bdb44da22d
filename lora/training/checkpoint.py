"""Checkpoints, from which a run resumes exactly.

checkpoints/checkpoint_step_<N>/
    lora_adapter/, backbone/, ...   the weights (Task.save)
    optimizer.safetensors           {"model.layers.0.weight/exp_avg": tensor, ...}
    trainer_state.json              the step, and what else `save` was given
    checksums.json

The whole state of a run is weights, optimizer and step, because the order of the data and the
dropout are functions of (seed, step).
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from lora.common.atomic_files import atomic_folder
from lora.common.checksums import write_checksums
from lora.common.errors import library_errors, raise_if_any
from lora.distributed import process_group, sharding
from lora.distributed.sharded_checkpoint import INDEX_FILE, Shards, write_shard
from lora.model.task import Task
from lora.training import best_checkpoints
from lora.training.optimizer import Parameters, States, set_state, state_of


def save(folder: Path, step: int, task: Task, optimizer: Optimizer, state: dict) -> None:
    """Write `checkpoint_step_<step>`, then delete those neither among the best nor the last.

    Rank 0 writes for all processes, unless the weights are sharded: then each writes its part.
    `state` goes into trainer_state.json; its "val" are the metrics at this step, or None.
    """
    sharded = sharding.any_sharded(task.parameters())
    final = Path(folder) / f"checkpoint_step_{step}"
    if process_group.rank() == 0:
        with atomic_folder(final) as temporary:
            write_tensors(temporary, task, optimizer, sharded)
            text = json.dumps({"step": step, **state}, indent=2) + "\n"
            (temporary / "trainer_state.json").write_text(text, encoding="utf-8")
            write_checksums(temporary)
        best_checkpoints.prune(folder)
    elif sharded:
        temporary = final.with_name(f".tmp_{final.name}")  # as atomic_folder names it
        write_tensors(temporary, task, optimizer, sharded)


def write_tensors(folder: Path, task: Task, optimizer: Optimizer, sharded: bool) -> None:
    """Write weights and optimizer state, or this process's shards of them."""
    parameters = trainable_parameters(task)
    tensors = {}
    for name, parameter in parameters.items():
        for key, tensor in state_of(optimizer, parameter).items():
            tensors[f"{name}/{key}"] = tensor.detach()
    if sharded:
        process_group.barrier()  # rank 0 makes the folder
        write_shard(folder, {**parameters, **tensors})
        process_group.barrier()
    else:
        task.save(folder)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "optimizer.safetensors", {"format": "pt"})


def load(path: str | Path, task: Task, optimizer: Optimizer) -> dict:
    """Put weights and optimizer state in their places, where they must fit; return the `state`."""
    path = Path(path)
    state = best_checkpoints.read_state(path)
    task.load(path)
    parameters = trainable_parameters(task)
    states: States = {name: {} for name in parameters}
    mismatches = []
    source = path if (path / INDEX_FILE).is_file() else path / "optimizer.safetensors"
    with library_errors(source):
        shards = Shards(source)
        for full_name in shards.index.keys() - parameters.keys():  # shards hold the weights as well
            name, _, key = full_name.rpartition("/")
            if name in parameters:
                first, end = sharding.local_rows(parameters[name])
                states[name][key] = shards.get(full_name, first, end)
            else:
                mismatches.append(full_name)
    if not mismatches:
        mismatches = set_state(optimizer, parameters, states)
    what = "not the optimizer's state of this model: absent, unknown or of another shape"
    raise_if_any(mismatches, f"{path}: {what}")
    return state


def trainable_parameters(task: nn.Module) -> Parameters:
    return {name: p for name, p in task.named_parameters() if p.requires_grad}
