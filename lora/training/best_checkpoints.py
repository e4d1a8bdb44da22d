"""Which checkpoints are kept: the three with the lowest validation loss, and the last one."""

import math
from pathlib import Path

from lora.common.atomic_files import remove_folder, remove_leftovers
from lora.common.checkpoint_folders import checkpoints_by_step
from lora.common.checksums import find_damage
from lora.common.serialization import read_file
from lora.distributed.collectives import broadcast_from_rank_zero

KEPT = 3


def saved_states(folder):
    """The states of the checkpoints below `folder`, the oldest first, each with its "path"."""
    return [
        {**read_state(path), "path": path}
        for _, path in sorted(checkpoints_by_step(Path(folder)).items())
    ]


def best_first(states):
    """Those with a (finite) validation loss, the lowest first (of equals, the earlier)."""
    evaluated = [s for s in states if s["val"] and s["val"]["loss"] is not None]
    return sorted(evaluated, key=lambda s: (s["val"]["loss"], s["step"]))


def best_loss(folder: Path) -> float:
    """Return the lowest validation loss among the checkpoints; infinite where there is none.

    Rank 0 reads the folder, and every process gets what it found.
    """
    losses = broadcast_from_rank_zero(losses_of_best, folder)
    return min(losses, default=math.inf)


def is_among_best(folder: Path, loss: float) -> bool:
    """Return whether a checkpoint with this validation loss would be one of the best that are kept.

    Rank 0 reads the folder, and every process gets what it found.
    """
    losses = broadcast_from_rank_zero(losses_of_best, folder)
    return math.isfinite(loss) and (len(losses) < KEPT or loss < losses[KEPT - 1])


def losses_of_best(folder: Path) -> list[float]:
    """Return the finite validation losses of the checkpoints, the lowest first."""
    return [state["val"]["loss"] for state in best_first(saved_states(folder))]


def prune(folder):
    states = saved_states(folder)
    keep = {state["step"] for state in [*best_first(states)[:KEPT], *states[-1:]]}
    for state in states:
        if state["step"] not in keep:
            remove_folder(state["path"])


def recover(run_dir):
    """Clear what a killed run left, set damaged checkpoints aside and delete those that are not to
    stay; lines to say.
    """
    said, folder = [], Path(run_dir) / "checkpoints"
    remove_leftovers(Path(run_dir))
    remove_leftovers(folder)
    for path in checkpoints_by_step(folder).values():
        found = find_damage(path, "trainer_state.json")
        if found:
            aside = folder / f"damaged_{path.name}"
            if aside.exists():
                remove_folder(aside)
            path.rename(aside)
            said.append(f"warning: {path}: damaged ({found}); set aside as {aside.name}")
    prune(folder)
    return said


def read_state(path):
    return read_file(Path(path) / "trainer_state.json")
