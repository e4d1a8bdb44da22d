"""Which folder a run writes to, and which checkpoint `--resume_from auto` means."""

import os
from pathlib import Path

from lora.common.checkpoint_folders import checkpoints_by_step
from lora.common.checksums import find_damage
from lora.common.errors import UserError


def newest_checkpoint(config):
    """The newest whole checkpoint of the run called experiment_name; "" where that has none yet.
    Raises UserError.
    """
    if not config.output.experiment_name:
        raise UserError("--resume_from auto: which run? Add its --experiment_name.")
    folder = run_folder(config)
    found = checkpoints_by_step(folder / "checkpoints")
    newest_first = (found[step] for step in sorted(found, reverse=True))
    # The run says which not
    whole = next(
        (path for path in newest_first if not find_damage(path, "trainer_state.json")), None
    )
    if found and not whole:
        raise UserError(
            f"--resume_from auto: every checkpoint in {folder} is damaged; choose another --experiment_name."
        )
    return str(whole or "")


def run_folder(config):
    return Path(config.output.output_dir) / config.output.experiment_name


def new_folder(config):
    """The folder of a new run; one that exists is never written into."""
    folder = run_folder(config)
    if folder.exists():
        raise UserError(
            f"{folder} exists; choose another --experiment_name, or continue it with --resume_from."
        )
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(
            f"output_dir {config.output.output_dir}: {above} cannot be written to; name another folder."
        )
    return folder


def continued_folder(saved, config, checkpoint):
    """The folder of the run that `checkpoint` belongs to, or a new one where the output options
    name another.
    """
    if (config.output.output_dir, config.output.experiment_name) != (
        saved.output.output_dir,
        saved.output.experiment_name,
    ):
        return new_folder(config)
    place = checkpoint.resolve()
    found = checkpoints_by_step(place.parent)
    if place.parent.name != "checkpoints" or place not in found.values():
        raise UserError(
            f"--resume_from {checkpoint}: not in a run's checkpoints/; name a new --experiment_name for it."
        )
    latest = found[max(found)]
    if place != latest:
        mend = "resume that, or name a new --experiment_name"
        raise UserError(f"--resume_from {checkpoint}: {latest.name} is later; {mend}.")
    return place.parent.parent
