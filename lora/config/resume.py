"""What may change between a checkpoint and the run that resumes it."""

from collections.abc import Collection
import dataclasses
from pathlib import Path
from typing import Any

from lora.common.errors import UserError
from lora.config.schema import QUANTIZATION_KEYS, Config, EvaluationConfig
from lora.config.set_keys import key_values, saved_config

LENGTH_KEYS = ("max_steps", "num_train_epochs", "early_stopping_patience", "skip_nonfinite")
INTERVAL_KEYS = ("logging_steps", "eval_steps", "save_steps", "save_optimizer")
# gradient_checkpointing computes layers again in the backward pass, which changes no gradient.
PLACE_KEYS = ("experiment_name", "output_dir", "report_to", "device", "gradient_checkpointing")
NAME_KEYS = ("artifact_version",)
# A resumed run keeps its examples per step and the size of its micro-batches.
LAYOUT_KEYS = ("batch_size", "gradient_accumulation_steps")
EVALUATION_KEYS = [field.name for field in dataclasses.fields(EvaluationConfig)]  # of eval.py
# Facts that have no key: the base decides them, and for tokens the data and how they are read.
BASE_FACTS = ("base_config", "train_tokens", "eval_tokens")
# The keys that may differ between a checkpoint and the run that continues it.
FREE_ON_RESUME = {*LENGTH_KEYS, *INTERVAL_KEYS, *PLACE_KEYS, *NAME_KEYS, *EVALUATION_KEYS}


def checkpoint_config(checkpoint: str, config: Config) -> Config:
    """Return a checkpoint's configuration. Raises UserError where the other script made it."""
    saved = saved_config(checkpoint)
    if (saved.lora is None) != (config.lora is None):
        script = "train.py" if saved.lora is None else "train_lora.py"
        raise UserError(f"--resume_from {checkpoint}: {script} made it; call that.")
    return saved


def refuse_changed_keys(saved: Config, new: Config, folder: str, allowed: Collection[str]) -> None:
    """Raise UserError where keys differ from those saved in a checkpoint's folder and may not."""
    before, now = key_values(saved), key_values(new)
    changed = {}
    for name in now:
        if now[name] != before[name] and name not in FREE_ON_RESUME:
            changed[name] = (before[name], now[name])
        if name in LAYOUT_KEYS and name in changed:
            kept = f"{name} {now[name]}: a resumed run keeps its {before[name]}"
            raise UserError(f"--resume_from {folder}: {kept}; start another run with --init_from.")
    refuse_changes(folder, changed, allowed)


def refuse_other_losses(saved: Config, new: Config) -> None:
    """Raise UserError where a run would go on in its folder, but measure its losses otherwise.

    Base, data and dtype are left to `Command.require_same`, which compares what is read of them.
    """
    names = {*vars(new.model), *vars(new.data), "max_eval_batches", "load_in_4bit"}
    if new.lora and new.lora.load_in_4bit:
        names |= {*QUANTIZATION_KEYS}
    before, now = key_values(saved), key_values(new)
    changed = {name for name in names if before.get(name) != now.get(name)}
    raise_other_losses(changed - {"base_model", "train_data", "eval_data"})


def raise_other_losses(changed: Collection[str]) -> None:
    """Raise UserError if there are changes after which other checkpoints might be the best."""
    if changed:
        problem = "validation losses before and after could not be compared"
        names = ", ".join(sorted(changed))
        raise UserError(f"{names} changed: {problem}; name a new --experiment_name.")


def refuse_changes(checkpoint: str, changed: dict[str, tuple], allowed: Collection[str]) -> None:
    """Raise UserError that lists `changed`, {name: (before, now)}, except what is allowed to be."""
    refused = [name for name in changed if name not in allowed]
    if refused:
        pairs = [f"{name} ({changed[name][0]} -> {changed[name][1]})" for name in refused]
        problem = f"not what it was made with: {', '.join(pairs)}"
        if "train_tokens" in refused or "eval_tokens" in refused:
            problem += ": of another tokenizer, chat template or plainlora"
        keys = ["base_model" if name in BASE_FACTS else name for name in refused]
        hint = f"--allow_change {','.join(dict.fromkeys(keys))} allows it"
        if keys != refused:  # the losses of the run so far would be those of another base
            hint += " under a new --experiment_name"
        raise UserError(f"--resume_from {checkpoint}: {problem}; {hint}.")


def describe_fact(fact: Any) -> Any:
    """Return a fact for a message: of hashed files, their names and the first digits of each."""
    if not isinstance(fact, dict):
        return fact
    files = []
    for path, sha256 in fact.items():
        files.append(f"{Path(path).name} {(sha256 or '')[:8]}".strip())
    return " ".join(files)
