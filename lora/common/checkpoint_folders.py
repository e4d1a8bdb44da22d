"""The folders of checkpoints and artifacts: names, where they keep weights, format versions.

A checkpoint has its weights in lora_adapter/ or backbone/, and an artifact of version 1 too. Since
version 2 an artifact has them at its top, where PEFT and transformers look for them.
"""

from pathlib import Path

from lora.common.errors import UserError
from lora.common.toml_json import read_file

# "format_version" of trainer_state.json and metadata.json; one without it is of version 1
FORMAT_VERSION = 2
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


def is_artifact(folder: Path) -> bool:
    """Return whether plainlora wrote this artifact. Others' adapters may have metadata too."""
    path = folder / "metadata.json"
    return path.is_file() and "base_files" in read_file(path)


def is_written_by_us(folder: Path) -> bool:
    """Return whether this is an artifact or a checkpoint of ours, which has checksums.json."""
    state = folder / "trainer_state.json"  # other trainers write one too
    return is_artifact(folder) or (state.is_file() and "facts" in read_file(state))


def adapter_folder(folder: Path) -> Path | None:
    """Return where a checkpoint, an artifact or an adapter alone has its adapter, if it has one."""
    if (folder / "lora_adapter").is_dir():
        return folder / "lora_adapter"
    return folder if (folder / "adapter_config.json").is_file() else None


def model_folder(folder: Path) -> Path | None:
    """Return where a checkpoint or an artifact has a whole model, if it has one."""
    if (folder / "backbone").is_dir():
        return folder / "backbone"
    return folder if (folder / "config.json").is_file() and is_artifact(folder) else None


def require_known_format(checkpoint: Path, state: dict) -> None:
    """Raise UserError for a checkpoint or an artifact that this version does not read.

    Those are the sharded ones of version 0.1, and those whose `state` is of a newer version.
    """
    if (checkpoint / SHARDS_FILE).is_file():
        found = f"in parts ({SHARDS_FILE}), written by plainlora 0.1"
        raise UserError(f"{checkpoint}: {found}, which reads it; end the run with that version.")
    version = state.get("format_version", 1)
    if version not in (1, FORMAT_VERSION):
        expected = f"expected {FORMAT_VERSION} at most; a newer plainlora reads it"
        raise UserError(f"{checkpoint}: format_version {version}; {expected}.")
