"""What a run says before its first step: its length, and what is probably not meant."""

import json

import pytest
import torch

from lora.common.errors import UserError
from lora.training.startup import describe_moved
from tests.conftest import run
from tests.model.test_families import GROUPED, base
from tests.training.test_resume import run_until

MOE = GROUPED | dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, head_dim=8)


def test_the_plan_says_how_many_epochs_a_run_is(configure, capsys):
    run(configure(True, max_steps=3))
    said = capsys.readouterr().out
    assert "3 steps of 8 examples" in said and "0.4 epochs of 7.5 steps" in said
    assert "epochs over the same data" not in said and "warmup steps" not in said


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
    folder = run(configure(True, max_steps=1))
    path = folder / "checkpoints" / "checkpoint_step_1"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if under_torchrun:  # which sets it itself
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    torch.set_num_threads(2)
    try:
        run_until(1, configure(True, "resumed", max_steps=2), monkeypatch, path)
        assert torch.get_num_threads() == (1 if under_torchrun else 2)
    finally:
        torch.set_num_threads(1)
    moved = "resumed with threads 1 -> 2: " in capsys.readouterr().out
    assert moved == (not under_torchrun)


def test_a_run_that_resumes_elsewhere_says_what_is_different():
    before = {"device": "cuda", "processes": 1, "threads": 8, "torch": "2.9.0", "cpu": "AVX2"}
    rounding = "steps have the same examples and targets, but results differ by rounding"
    first, second = {**before, "gpu": "NVIDIA A100"}, {**before, "gpu": "NVIDIA H100"}
    assert describe_moved(first, first) == ""
    assert describe_moved(before, second) == ""  # an older checkpoint does not name its GPU
    moved = f"resumed with gpu NVIDIA A100 -> NVIDIA H100: {rounding}"
    assert describe_moved(first, second) == moved
    moved = f"resumed with processes 1 -> 2: {rounding}, and with dropout by its random numbers"
    assert describe_moved(before, {**before, "processes": 2}) == moved


def test_experts_that_lora_does_not_reach_are_named(configure, tmp_path, capsys):
    folder = base("Qwen3Moe", MOE, tmp_path)
    run(configure(True, base_model=str(folder), max_steps=1))
    said = capsys.readouterr().out
    assert (
        "stay as they are (mlp.experts.down_proj, mlp.experts.gate_up_proj): LoRA reaches" in said
    )
    run(configure(True, "named", base_model=str(folder), max_steps=1, target_modules=["q_proj"]))
    assert "stay as they are" not in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is_and_a_longer_one_goes_on(configure, capsys):
    settings = dict(max_steps=4)
    folder = run(configure(True, **settings))
    results = (folder / "logs" / "final_results.json").read_bytes()
    checkpoint = folder / "checkpoints" / "checkpoint_step_4"
    capsys.readouterr()
    run(configure(True, **settings), checkpoint, auto=True)
    assert f"{folder}: complete since step 4; nothing to do\n" in capsys.readouterr().out
    assert (folder / "logs" / "final_results.json").read_bytes() == results
    run(configure(True, max_steps=6), checkpoint, auto=True)
    after = json.loads((folder / "logs" / "final_results.json").read_text())
    before = json.loads(results)
    # Seconds are rounded to tenths.
    assert after["last"]["step"] == 6 and after["seconds"] >= before["seconds"]
    assert (
        after["tokens"] > before["tokens"] and after["peak_memory_gb"] >= before["peak_memory_gb"]
    )


def test_a_run_that_stopped_early_is_finished(configure, capsys):
    settings = dict(max_steps=40, early_stopping_patience=1, learning_rate=1e-9, eval_steps=2)
    folder = run(configure(True, **settings))
    step = json.loads((folder / "logs" / "final_results.json").read_text())["last"]["step"]
    assert step < 40
    checkpoint = folder / "checkpoints" / f"checkpoint_step_{step}"
    run(configure(True, **settings), checkpoint, auto=True)
    assert f"complete since step {step}" in capsys.readouterr().out
