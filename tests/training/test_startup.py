"""What a run says before its first step: its length, and what is probably not meant."""

import json

import pytest
import torch

from lora.common.errors import UserError
from tests.conftest import run


def test_the_plan_says_how_many_epochs_a_run_is(configure, capsys):
    run(configure(True, max_steps=3))
    said = capsys.readouterr().out
    assert "3 steps of 8 examples" in said and "0.4 epochs of 7.5 steps" in said
    assert "warning" not in said


def test_many_epochs_and_a_warmup_without_an_end_are_warned_of(configure, capsys):
    few = ["arithmetic:train:4"]
    run(configure(True, train_data=few, max_steps=11, warmup_steps=11))
    said = capsys.readouterr().out
    assert "warning: 22 epochs over the same data" in said
    assert "warning: 11 warmup steps: learning_rate is never reached" in said


def test_a_run_without_a_length_is_three_epochs(configure, capsys):
    run(configure(True, max_steps=None))
    assert "23 steps of 8 examples" in capsys.readouterr().out  # ceil(3 x 60 / 8)


def test_where_every_example_has_weight_0_nothing_is_trained(configure, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "steps": ["a"], "labels": [1], "weight": 0}
    path.write_text("\n".join(json.dumps(row | {"prompt": f"p{i}"}) for i in range(4)))
    with pytest.raises(UserError, match="rows.jsonl:1: every train example has weight 0"):
        run(configure(True, train_data=[str(path)]))


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_threads_that_the_user_chose_win_over_those_of_the_checkpoint(
    configure, capsys, monkeypatch, under_torchrun
):
    folder = run(configure(True, max_steps=4))
    path = folder / "checkpoints" / "checkpoint_step_4"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if under_torchrun:  # which sets it itself
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    torch.set_num_threads(2)
    try:
        run(configure(True, "resumed", max_steps=5), path)
        assert torch.get_num_threads() == (1 if under_torchrun else 2)
    finally:
        torch.set_num_threads(1)
    moved = "resumed with threads 1 -> 2: " in capsys.readouterr().out
    assert moved == (not under_torchrun)
