"""How long a run is, and the learning rate of each step."""

import math

from lora.config.schema import TrainingConfig

DEFAULT_EPOCHS = 3.0  # as in transformers' TrainingArguments


def total_steps(settings: TrainingConfig, steps_per_epoch: float) -> int:
    """Return the optimizer steps of a run: max_steps or num_train_epochs, whichever ends first."""
    if settings.max_steps and not settings.num_train_epochs:
        return settings.max_steps
    num_epochs = settings.num_train_epochs or DEFAULT_EPOCHS
    steps = max(1, math.ceil(round(num_epochs * steps_per_epoch, 6)))  # 1.1 * 50 is above 55
    return min(steps, settings.max_steps or steps)


def stops_early(settings: TrainingConfig, evaluations_without_best: int) -> bool:
    """Return whether a run ends after so many evaluations without a new best."""
    return 0 < settings.early_stopping_patience <= evaluations_without_best


def learning_rate_at(step: int, total: int, settings: TrainingConfig) -> float:
    """Return the learning rate of step 0..total-1, as transformers' schedules have it.

    It rises linearly from 0 during the warm-up and then follows `lr_scheduler_type`.
    """
    warmup = warmup_steps(total, settings)
    if step < warmup:
        return settings.learning_rate * step / warmup
    done = (step - warmup) / max(1, total - warmup)  # from 0 to 1
    factors = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
    }
    return settings.learning_rate * factors[settings.lr_scheduler_type]


def warmup_steps(total: int, settings: TrainingConfig) -> int:
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    if settings.warmup_ratio is not None:
        return math.ceil(settings.warmup_ratio * total)
    return min(500, total // 20)
