"""How long a run is, and its learning rate: transformers' schedules, to the last digit."""

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lora.config.schema import TrainingConfig
from lora.training.schedule import learning_rate_at, total_steps

SCHEDULES = {
    "cosine": lambda o: get_cosine_schedule_with_warmup(o, 7, 40),
    "linear": lambda o: get_linear_schedule_with_warmup(o, 7, 40),
    "constant": lambda o: get_constant_schedule_with_warmup(o, 7),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_learning_rate_is_that_of_transformers(kind):
    settings = TrainingConfig(learning_rate=3e-3, warmup_steps=7, lr_scheduler_type=kind)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = SCHEDULES[kind](optimizer)
    for step in range(40):
        assert learning_rate_at(step, 40, settings) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12
        )
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "settings, total, warmup",
    [
        ({}, 400, 20),
        ({}, 100000, 500),
        ({"warmup_ratio": 0.03}, 410, 13),
        ({"warmup_steps": 3, "warmup_ratio": 0.5}, 400, 3),
    ],
)
def test_warm_up_ends_where_it_is_asked_to(settings, total, warmup):
    settings = TrainingConfig(learning_rate=1.0, **settings)
    assert (
        learning_rate_at(warmup, total, settings)
        == 1.0
        > learning_rate_at(warmup - 1, total, settings)
    )


def test_a_part_of_an_epoch_is_not_rounded_up_by_a_step():
    assert total_steps(TrainingConfig(num_train_epochs=1.1), steps_per_epoch=50) == 55
    assert total_steps(TrainingConfig(num_train_epochs=1e-9), steps_per_epoch=50) == 1


@pytest.mark.parametrize(
    "max_steps, epochs, expected",
    [(None, None, 38), (30, None, 30), (None, 2.0, 25), (30, 2.0, 25), (20, 2.0, 20)],
)
def test_the_smaller_of_max_steps_and_epochs_ends_the_run(max_steps, epochs, expected):
    assert (
        total_steps(
            TrainingConfig(max_steps=max_steps, num_train_epochs=epochs), steps_per_epoch=12.4
        )
        == expected
    )
