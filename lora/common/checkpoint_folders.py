"""The folders of checkpoints, checkpoint_step_<N>: their names and the version of their format."""

from pathlib import Path

from lora.common.errors import UserError

FORMAT_VERSION = 2  # "format_version" of trainer_state.json; one without it is of version 1
OPTIMIZER_FILE = "optimizer.safetensors"
SHARDS_FILE = "shards.json"  # of version 1: each process wrote its part of weights and optimizer


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """Return {step: path} of the checkpoints in `folder`. Copies under other names do not count."""
    checkpoints = {}
    for path in folder.glob("checkpoint_step_*"):
        step = path.name.removeprefix("checkpoint_step_")
        if step.isdecimal():
            checkpoints[int(step)] = path
    return checkpoints


def resumable_by_step(folder: Path) -> dict[int, Path]:
    """Return {step: path} of the checkpoints that hold the optimizer's state."""
    checkpoints = checkpoints_by_step(folder).items()
    return {step: path for step, path in checkpoints if has_optimizer(path)}


def has_optimizer(checkpoint: Path) -> bool:
    return (checkpoint / OPTIMIZER_FILE).is_file() or (checkpoint / SHARDS_FILE).is_file()


def require_known_format(checkpoint: Path, state: dict) -> None:
    """Raise UserError for a checkpoint that cannot be read; `state` is its trainer_state.json."""
    if (checkpoint / SHARDS_FILE).is_file():
        found = f"in parts ({SHARDS_FILE}), written by plainlora 0.1"
        raise UserError(f"{checkpoint}: {found}, which reads it; end the run with that version.")
    version = state.get("format_version", 1)
    if version not in (1, FORMAT_VERSION):
        expected = f"expected {FORMAT_VERSION} at most; a newer plainlora reads it"
        raise UserError(f"{checkpoint}: format_version {version}; {expected}.")
