"""Which checkpoints are kept: the three with the lowest validation loss, and the last one.

The last is the newest that holds the optimizer's state, so that the run can be resumed from it.
With save_optimizer = "last" no other one holds it.
"""

import math
from pathlib import Path

from lora.common.atomic_files import remove_folder, remove_leftovers
from lora.common.checkpoint_folders import checkpoints_by_step, has_optimizer, resumable_by_step
from lora.common.checksums import find_damage
from lora.common.toml_json import read_file
from lora.config.schema import Config
from lora.distributed.collectives import broadcast_from_rank_zero

KEPT = 3


def trainer_state(checkpoint: str | Path) -> dict:
    return read_file(Path(checkpoint) / "trainer_state.json")


def saved_states(folder: Path) -> list[dict]:
    """Return the states of the checkpoints in `folder`, the oldest first, each with its "path"."""
    checkpoints = checkpoints_by_step(folder)
    return [{**trainer_state(path), "path": path} for _, path in sorted(checkpoints.items())]


def best_first(states: list[dict]) -> list[dict]:
    """Return those with a finite validation loss, the lowest first; of equal ones the earlier."""
    evaluated = [s for s in states if s["val"] and s["val"]["loss"] is not None]
    return sorted(evaluated, key=lambda s: (s["val"]["loss"], s["step"]))


def finite_losses(folder: Path) -> list[float]:
    """Return the finite validation losses of the checkpoints in `folder`, on every process."""
    states = broadcast_from_rank_zero(saved_states, folder)
    return [state["val"]["loss"] for state in best_first(states)]


def best_has_optimizer(folder: Path, config: Config) -> bool:
    """Return, on every process, whether a new best checkpoint in `folder` holds the optimizer.

    With save_optimizer = "last" only the first best checkpoint of a run does, so that a run that is
    lost before its first save_steps can be resumed.
    """
    if config.save_optimizer == "all":
        return True
    return not broadcast_from_rank_zero(resumable_by_step, folder)


def is_among_best(losses: list[float], loss: float) -> bool:
    """Return whether `loss` is one of the lowest so far, whose checkpoints are kept."""
    return math.isfinite(loss) and (len(losses) < KEPT or loss < sorted(losses)[KEPT - 1])


def prune(folder: Path) -> None:
    """Delete the checkpoints that are neither among the best nor the last."""
    states = saved_states(folder)
    best = best_first(states)[:KEPT]
    resumable = [state for state in states if has_optimizer(state["path"])]
    for state in states:
        if state not in best + resumable[-1:]:
            remove_folder(state["path"])
    for state in resumable[:-1]:
        if state in best and state.get("save_optimizer") == "last":
            from lora.training.remove_optimizer import remove_optimizer

            remove_optimizer(state["path"])


def recover(run_dir: Path, step: int) -> list[str]:
    """Prepare the folder of a run that begins at `step`, and return warnings for the log.

    Clear what a killed run left, set damaged checkpoints aside, and delete those after `step`,
    which the run makes anew (they hold weights alone).
    """
    warnings = []
    folder = run_dir / "checkpoints"
    remove_leftovers(run_dir)
    remove_leftovers(folder)
    for saved_step, path in checkpoints_by_step(folder).items():
        from lora.common.saved_files import read_state  # for a run that is resumed

        damage = find_damage(path, "trainer_state.json")
        if damage:
            aside = folder / f"damaged_{path.name}"
            if aside.exists():
                remove_folder(aside)
            path.rename(aside)
            warnings.append(f"warning: {path}: damaged ({damage}); set aside as {aside.name}")
            continue
        read_state(path)  # refuses what no plainlora has written
        if saved_step > step:
            remove_folder(path)
            warnings.append(f"warning: {path}: later than step {step}; deleted, to be made anew")
    prune(folder)
    return warnings
