"""How long a run is, and the learning rate of each step."""

import math

from lora.config.schema import TrainingConfig


def total_steps(settings: TrainingConfig, steps_per_epoch: float) -> int:
    """Return the optimizer steps of a run: max_steps or num_train_epochs, whichever ends first."""
    limits = []
    if settings.max_steps:
        limits.append(settings.max_steps)
    if settings.num_train_epochs:
        limits.append(math.ceil(settings.num_train_epochs * steps_per_epoch))
    return min(limits, default=10_000)


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
