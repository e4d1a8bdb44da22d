"""Which folder a run writes to, and which checkpoint `--resume_from auto` means."""

import os
from pathlib import Path

from lora.common.checkpoint_folders import checkpoints_by_step, resumable_by_step
from lora.common.checksums import find_damage
from lora.common.errors import UserError
from lora.config.schema import Config


def newest_checkpoint(config: Config) -> str:
    """Return the newest undamaged checkpoint of the run experiment_name, or ""."""
    if not config.output.experiment_name:
        raise UserError("--resume_from auto: which run? Add its --experiment_name.")
    folder = run_folder(config)
    checkpoints = resumable_by_step(folder / "checkpoints")
    for step in sorted(checkpoints, reverse=True):
        if not find_damage(checkpoints[step], "trainer_state.json"):
            return str(checkpoints[step])
    if checkpoints_by_step(folder / "checkpoints"):
        damaged = f"every checkpoint in {folder} is damaged or has no optimizer"
        raise UserError(f"--resume_from auto: {damaged}; choose another --experiment_name.")
    if (folder / "final_artifact").exists():
        found = f"{folder} has an artifact and no checkpoint"
        raise UserError(f"--resume_from auto: {found}; choose another --experiment_name.")
    return ""


def run_folder(config: Config) -> Path:
    """Return the folder of a run. Raises UserError where its name leads out of output_dir."""
    name = config.output.experiment_name
    if Path(name).anchor or ".." in Path(name).parts:
        problem = "it leads out of output_dir; expected the name of a folder"
        raise UserError(f"experiment_name {name!r}: {problem}.")
    return Path(config.output.output_dir).expanduser() / name


def new_folder(config: Config) -> Path:
    """Return the folder of a new run. Raises UserError where it exists or cannot be created."""
    folder = run_folder(config)
    if folder.exists():
        hint = "choose another --experiment_name, or continue it with --resume_from"
        raise UserError(f"{folder} exists; {hint}.")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        problem = f"{parent} cannot be written to; name another folder"
        raise UserError(f"output_dir {config.output.output_dir}: {problem}.")
    return folder


def continued_folder(saved: Config, config: Config, checkpoint: Path) -> Path:
    """Return the folder of the checkpoint's run, or a new one where output options name another.

    Raises UserError where the checkpoint is not the last one of a run's folder.
    """
    if run_folder(config).resolve() != run_folder(saved).resolve():
        return new_folder(config)
    path = checkpoint.resolve()
    checkpoints = resumable_by_step(path.parent)
    # checkpoints/ may be a link to another disk, or `checkpoint` itself a link into it.
    as_named = Path(os.path.abspath(checkpoint)).parent.parent
    candidates = [run_folder(config), as_named, path.parent.parent]
    folders = [folder for folder in candidates if (folder / "checkpoints").resolve() == path.parent]
    if not folders or path not in checkpoints.values():
        hint = "not in a run's checkpoints/; name a new --experiment_name for it"
        raise UserError(f"--resume_from {checkpoint}: {hint}.")
    latest = checkpoints[max(checkpoints)]
    if path != latest:
        hint = "resume that, or name a new --experiment_name"
        raise UserError(f"--resume_from {checkpoint}: {latest.name} is later; {hint}.")
    return folders[0]
