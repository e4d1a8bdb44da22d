"""Checkpoints: written beside their place and renamed, the three best and the last kept, resumed
exactly.

    checkpoints/checkpoint_step_<N>/   weights (Task.save), optimizer.safetensors, trainer_state.json, checksums.json

The whole state of a run is weights, optimizer, step: data order and dropout are functions of (seed,
step).
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from lora.common.atomic_files import atomic_folder
from lora.common.checksums import write_checksums
from lora.common.errors import library_errors, raise_if_any
from lora.distributed import process_group, sharding
from lora.distributed.sharded_checkpoint import INDEX_FILE, Shards, write_shard
from lora.training.best_checkpoints import prune, read_state
from lora.training.optimizer import set_state, state_of


def save(folder, step, task, optimizer, state):
    """Write `checkpoint_step_<step>` below `folder`, then delete those that are neither among the
    best nor the last.

    Of several processes, which hold the same, the first does so. `state` (JSON) goes along; its
    "val" are the validation metrics at this step, or None.
    """
    sharded = any(map(sharding.is_sharded, task.parameters()))
    final = Path(folder) / f"checkpoint_step_{step}"
    if process_group.rank() == 0:
        with atomic_folder(final) as temporary:
            write_tensors(temporary, task, optimizer, sharded)
            (temporary / "trainer_state.json").write_text(
                json.dumps({"step": step, **state}, indent=2) + "\n"
            )
            write_checksums(temporary)
        prune(folder)
    elif sharded:
        write_tensors(final.with_name(f".tmp_{final.name}"), task, optimizer, sharded)


def write_tensors(folder, task, optimizer, sharded):
    """Write weights and optimizer state: whole, or this process's part of them once the first one
    has made the folder.
    """
    tensors = optimizer_tensors(task, optimizer)
    if sharded:
        process_group.barrier()
        write_shard(folder, trainable_parameters(task) | tensors)
        process_group.barrier()
    else:
        task.save(folder)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "optimizer.safetensors", {"format": "pt"})


def load(path, task, optimizer):
    """Put a checkpoint's weights and optimizer state into `task` and `optimizer`; returns its
    state.
    """
    path = Path(path)
    state = read_state(path)
    task.load(path)
    parameters = trainable_parameters(task)
    names = {parameter: name for name, parameter in parameters.items()}
    states, strange = {parameter: {} for parameter in names}, []
    tensors = path if (path / INDEX_FILE).is_file() else path / "optimizer.safetensors"
    with library_errors(tensors):
        shards = Shards(tensors)
        for key in shards.index.keys() - parameters.keys():  # shards hold the weights as well
            name, _, of_state = key.rpartition("/")
            parameter = parameters.get(name)
            if parameter is None:
                strange.append(key)
            else:
                states[parameter][of_state] = shards.get(key, *sharding.local_rows(parameter))
    try:
        if not strange:
            set_state(optimizer, states)
    except KeyError as error:
        strange = [f"{names[error.args[0]]}/{key}" for key in error.args[1:]]
    raise_if_any(
        strange,
        f"{path}: not the optimizer's state of this model: absent, unknown or of another shape",
    )
    return state


def trainable_parameters(task):
    """Name -> parameter, for those that are trained."""
    return {
        name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad
    }


def optimizer_tensors(task, optimizer):
    """The optimizer's state by parameter name: "model.layers.0.weight/exp_avg" -> tensor."""
    states = state_of(optimizer)
    return {
        f"{name}/{key}": tensor.detach()
        for name, parameter in trainable_parameters(task).items()
        for key, tensor in states[parameter].items()
    }
