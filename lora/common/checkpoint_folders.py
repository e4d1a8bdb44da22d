"""The names of checkpoint folders: checkpoint_step_<N>."""

from pathlib import Path


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """Return {step: path} of the checkpoints in `folder`. Copies under other names do not count."""
    checkpoints = {}
    for path in folder.glob("checkpoint_step_*"):
        step = path.name.removeprefix("checkpoint_step_")
        if step.isdecimal():
            checkpoints[int(step)] = path
    return checkpoints
