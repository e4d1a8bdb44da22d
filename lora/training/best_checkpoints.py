"""Which checkpoints are kept: the three with the lowest validation loss, and the last one."""

import math
from pathlib import Path

from lora.common.atomic_files import clear, remove
from lora.common.checkpoint_folders import by_step
from lora.common.checksums import damage
from lora.common.serialization import read_file

KEPT = 3


def saved(folder):
    """The states of the checkpoints below `folder`, the oldest first, each with its "path"."""
    return [{**read_state(path), "path": path} for _, path in sorted(by_step(Path(folder)).items())]


def best(states):
    """Those with a (finite) validation loss, the lowest first (of equals, the earlier)."""
    evaluated = [s for s in states if s["val"] and s["val"]["loss"] is not None]
    return sorted(evaluated, key=lambda s: (s["val"]["loss"], s["step"]))


def best_loss(folder):
    """The lowest validation loss among the checkpoints below `folder`; infinite where there is
    none.
    """
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
    """Clear what a killed run left, set damaged checkpoints aside and delete those that are not to
    stay; lines to say.
    """
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
