"""How long a run is, and the learning rate of each step."""

import math


def total_steps(settings, steps_per_epoch):
    """Where a run ends: max_steps or num_train_epochs, the smaller where both are given; 10000
    where neither is.
    """
    by_epochs = settings.num_train_epochs and math.ceil(settings.num_train_epochs * steps_per_epoch)
    return min(filter(None, (settings.max_steps, by_epochs)), default=10000)


def learning_rate_at(step, total, settings):
    """The learning rate of step 0..total-1, as transformers' schedules have it: linear warm-up from
    0, then the shape.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        ratio = settings.warmup_ratio
        warmup = min(500, total // 20) if ratio is None else math.ceil(ratio * total)
    if step < warmup:
        return settings.learning_rate * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.learning_rate * shape[settings.lr_scheduler_type]
