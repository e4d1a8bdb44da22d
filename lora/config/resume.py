"""What may change between a checkpoint and the run that resumes it."""

import dataclasses
from pathlib import Path

from lora.common.errors import UserError
from lora.config.schema import EvaluationConfig
from lora.config.tables import fields_by_key, saved_config

# What may differ between a checkpoint and the run that continues it: how long, how often, where to,
# and what is asked of the answers afterwards.
FREE_ON_RESUME = {
    *(
        "max_steps",
        "num_train_epochs",
        "early_stopping_patience",
        "logging_steps",
        "eval_steps",
        "save_steps",
    ),
    *("max_eval_batches", "skip_nonfinite", "experiment_name", "output_dir", "report_to", "device"),
    *(f.name for f in dataclasses.fields(EvaluationConfig)),
}


def config_of(checkpoint, config):
    """The configuration that a checkpoint was made with. Raises UserError where the other script
    made it.
    """
    saved = saved_config(checkpoint)
    if (saved.lora is None) != (config.lora is None):
        raise UserError(
            f"--resume_from {checkpoint}: {'train_lora' if saved.lora else 'train'}.py made it; call that."
        )
    return saved


def refuse_changes(saved, config, checkpoint, allowed):
    before, now = (
        {n: getattr(table, n) for n, (table, _) in fields_by_key(one).items()}
        for one in (saved, config)
    )
    changed = {
        name: (before[name], now[name])
        for name in now
        if now[name] != before[name] and name not in FREE_ON_RESUME
    }
    refuse(checkpoint, changed, allowed)


def refuse(checkpoint, changed, allowed):
    """Raises UserError that names what is `changed`, {name: (before, now)}, and not allowed to be."""
    changed = {name: pair for name, pair in changed.items() if name not in allowed}
    if changed:
        listed = ", ".join(f"{name} ({before} -> {now})" for name, (before, now) in changed.items())
        hint = f"--allow_change {','.join(changed)} allows it"
        raise UserError(f"--resume_from {checkpoint}: not what it was made with: {listed}; {hint}.")


def shown(fact):
    """A fact in a few characters; of hashed files their names and the beginnings of their hashes."""
    if not isinstance(fact, dict):
        return fact
    return " ".join(
        f"{Path(path).name} {(sha256 or '')[:8]}".strip() for path, sha256 in fact.items()
    )
