"""Checkpoints, from which a run resumes exactly, on any number of processes.

checkpoints/checkpoint_step_<N>/
    lora_adapter/, backbone/, ...   the weights (Task.save)
    optimizer.safetensors           {"model.layers.0.weight/exp_avg": tensor, ...}
    trainer_state.json              the step, and what else `save` was given
    checksums.json

The whole state of a run is weights, optimizer and step, because the order of the data and the
dropout are functions of (seed, step).
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
import time

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lora.common.atomic_files import atomic_folder
from lora.common.checkpoint_folders import FORMAT_VERSION, OPTIMIZER_FILE
from lora.common.checksums import write_checksums
from lora.common.errors import library_errors, raise_if_any
from lora.common.toml_json import to_json
from lora.distributed import process_group
from lora.distributed.collectives import broadcast_from_rank_zero, on_rank_zero, wait_for_all
from lora.distributed.sharding import any_sharded, copy_into, gather
from lora.model.task import Task
from lora.training import best_checkpoints
from lora.training.optimizer import Parameters, init_state, set_numbers, state_tensors


def save(folder: Path, step: int, task: Task, optimizer: Optimizer | None, state: dict) -> str:
    """Write `checkpoint_step_<step>`, prune the others, and return a line about it for the log.

    Every process calls this. The first one writes, and where it cannot, all raise its error.
    Without an optimizer the checkpoint holds weights alone. `state` goes into trainer_state.json;
    its "val" are the metrics at this step, or None.
    """
    started = time.monotonic()
    final = folder / f"checkpoint_step_{step}"
    sharded = any_sharded(task.parameters())
    model_state = gather(task.model.state_dict(keep_vars=True) if sharded else {})
    head_state = gather(task.head.state_dict(keep_vars=True) if sharded else {})
    parameters = trainable_parameters(task)
    if optimizer:
        init_state(optimizer)  # parameters without an update so far have no state
    optimizer_tensors = state_tensors(optimizer, parameters) if optimizer else {}

    def gather_optimizer() -> Iterator[tuple[str, Tensor]]:
        # The first process has just written the weights, and the others wait for it here: in the
        # gathering itself they wait for ten minutes only.
        wait_for_all()
        yield from gather(optimizer_tensors)

    optimizer_state = gather_optimizer()

    def gather_the_rest() -> None:
        """Go through what is not gathered yet: all processes take part in each tensor."""
        for _ in chain(model_state, head_state, optimizer_state):
            pass

    def write() -> int:
        try:
            with atomic_folder(final) as temporary:
                task.save(temporary, dict(model_state) or None, dict(head_state) or None)
                if optimizer:
                    save_file(dict(optimizer_state), temporary / OPTIMIZER_FILE, {"format": "pt"})
                text = to_json({"format_version": FORMAT_VERSION, "step": step, **state})
                (temporary / "trainer_state.json").write_text(text, encoding="utf-8")
                write_checksums(temporary)
            best_checkpoints.prune(folder)
            return sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
        finally:  # also where this process could not write
            gather_the_rest()

    if process_group.rank() > 0:
        gather_the_rest()
    size = broadcast_from_rank_zero(write)
    amount = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    return f"Saved {final}: {amount} in {time.monotonic() - started:.1f} s"


def load(path: str | Path, task: Task, optimizer: Optimizer) -> dict:
    """Put weights and optimizer state in their places, where they must fit; return the `state`."""
    path = Path(path)
    state = best_checkpoints.trainer_state(path)
    task.load(path)
    load_optimizer(path / OPTIMIZER_FILE, trainable_parameters(task), optimizer)
    return state


def load_optimizer(path: Path, parameters: Parameters, optimizer: Optimizer) -> None:
    """Fill the optimizer's state; if weights are sharded, rank 0 reads and scatters it."""
    init_state(optimizer)
    tensors = state_tensors(optimizer, parameters)
    sharded = any_sharded(parameters.values())
    file = on_rank_zero(open_state, path, tensors) if sharded else open_state(path, tensors)
    for name, tensor in tensors.items():
        copy_into(tensor, file.get_tensor(name) if file else None, from_rank_zero=sharded)
    set_numbers(optimizer, parameters, tensors)


def open_state(path: Path, expected: dict[str, Tensor]) -> safe_open:
    """Open the file of an optimizer's state. Raises UserError unless it has the tensors expected.

    torch's fused step does not look at shapes, so that this is the only check.
    """
    with library_errors(path):
        file = safe_open(path, "pt")
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    names = found.keys() | shapes.keys()
    mismatches = [name for name in names if found.get(name) != shapes.get(name)]
    what = "not the optimizer's state of this model: absent, unknown or of another shape"
    raise_if_any(mismatches, f"{path.parent}: {what}")
    return file


def trainable_parameters(task: nn.Module) -> Parameters:
    return {name: p for name, p in task.named_parameters() if p.requires_grad}
