"""Checkpoints: written beside their place and renamed, the three best and the last kept, resumed exactly.

    checkpoints/checkpoint_step_<N>/   weights (Task.save), optimizer.safetensors, trainer_state.json, checksums.json

The whole state of a run is weights, optimizer, step: data order and dropout are functions of (seed, step).
"""

import json
import math
from pathlib import Path

from safetensors.torch import save_file

from lora import distributed
from lora.checksums import damage, write_checksums
from lora.config import read_file
from lora.durable import clear, folder_for, remove
from lora.errors import by_step, refuse_any
from lora.foreign import one_line
from lora.optimizer import set_state, state_of
from lora.shards import INDEX, Shards, write

KEPT = 3


def save(folder, step, task, optimizer, state):
    """Write `checkpoint_step_<step>` below `folder`, then delete those that are neither among the best nor the last.

    Of several processes, which hold the same, the first does so. `state` (JSON) goes along; its "val" are the validation
    metrics at this step, or None.
    """
    sharded = any(map(distributed.is_sharded, task.parameters()))
    final = Path(folder) / f"checkpoint_step_{step}"
    if distributed.rank() == 0:
        with folder_for(final) as temporary:
            write_tensors(temporary, task, optimizer, sharded)
            (temporary / "trainer_state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
            write_checksums(temporary)
        prune(folder)
    elif sharded:
        write_tensors(final.with_name(f".tmp_{final.name}"), task, optimizer, sharded)


def write_tensors(folder, task, optimizer, sharded):
    """Write weights and optimizer state: whole, or this process's part of them once the first one has made the folder."""
    tensors = optimizer_tensors(task, optimizer)
    if sharded:
        distributed.wait()
        write(folder, trainable(task) | tensors)
        distributed.wait()
    else:
        task.save(folder)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "optimizer.safetensors", {"format": "pt"})


def saved(folder):
    """The states of the checkpoints below `folder`, the oldest first, each with its "path"."""
    return [{**read_state(path), "path": path} for _, path in sorted(by_step(Path(folder)).items())]


def best(states):
    """Those with a (finite) validation loss, the lowest first (of equals, the earlier)."""
    evaluated = [s for s in states if s["val"] and s["val"]["loss"] is not None]
    return sorted(evaluated, key=lambda s: (s["val"]["loss"], s["step"]))


def best_loss(folder):
    """The lowest validation loss among the checkpoints below `folder`; infinite where there is none."""
    return min((state["val"]["loss"] for state in best(saved(folder))), default=math.inf)


def enters_best(folder, loss):
    """Whether a checkpoint with this validation loss would be one of those that are kept for it."""
    losses = [state["val"]["loss"] for state in best(saved(folder))]
    return math.isfinite(loss) and (len(losses) < KEPT or loss < losses[KEPT - 1])


def prune(folder):
    states = saved(folder)
    keep = {state["step"] for state in [*best(states)[:KEPT], *states[-1:]]}
    for state in states:
        if state["step"] not in keep:
            remove(state["path"])


def recover(run_dir):
    """Clear what a killed run left, set damaged checkpoints aside and delete those that are not to stay; lines to say."""
    said, folder = [], Path(run_dir) / "checkpoints"
    clear(Path(run_dir))
    clear(folder)
    for path in by_step(folder).values():
        found = damage(path, "trainer_state.json")
        if found:
            aside = folder / f"damaged_{path.name}"
            if aside.exists():
                remove(aside)
            path.rename(aside)
            said.append(f"warning: {path}: damaged ({found}); set aside as {aside.name}")
    prune(folder)
    return said


def read_state(path):
    return read_file(Path(path) / "trainer_state.json")


def load(path, task, optimizer):
    """Put a checkpoint's weights and optimizer state into `task` and `optimizer`; returns its state."""
    path = Path(path)
    state = read_state(path)
    task.load(path)
    parameters = trainable(task)
    names = {parameter: name for name, parameter in parameters.items()}
    states, strange = {parameter: {} for parameter in names}, []
    tensors = path if (path / INDEX).is_file() else path / "optimizer.safetensors"
    with one_line(tensors):
        shards = Shards(tensors)
        for key in shards.index.keys() - parameters.keys():  # shards hold the weights as well
            name, _, of_state = key.rpartition("/")
            parameter = parameters.get(name)
            if parameter is None:
                strange.append(key)
            else:
                states[parameter][of_state] = shards.get(key, *distributed.my_rows(parameter))
    try:
        if not strange:
            set_state(optimizer, states)
    except KeyError as error:
        strange = [f"{names[error.args[0]]}/{key}" for key in error.args[1:]]
    refuse_any(strange, f"{path}: not the optimizer's state of this model: absent, unknown or of another shape")
    return state


def trainable(task):
    """Name -> parameter, for those that are trained."""
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def optimizer_tensors(task, optimizer):
    """The optimizer's state by parameter name: "model.layers.0.weight/exp_avg" -> tensor."""
    states = state_of(optimizer)
    return {
        f"{name}/{key}": tensor.detach()
        for name, parameter in trainable(task).items()
        for key, tensor in states[parameter].items()
    }
