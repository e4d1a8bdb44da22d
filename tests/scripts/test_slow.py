"""Real runs: what docs/results.md says of the default commands. A few minutes; `pytest -m slow`."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from lora.common.paths import ROOT

pytestmark = pytest.mark.slow


def call(script, *arguments):
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder):
    return json.loads((folder / "logs" / "final_results.json").read_text())


def test_the_default_run_learns_to_check_arithmetic_it_has_never_seen(tmp_path):
    call("train_lora.py", "--output_dir", tmp_path, "--experiment_name", "run")
    best = results(tmp_path / "run")["best"]
    assert best["r2"] >= 0.90 and results(tmp_path / "run")["peak_memory_gb"] < 1.5
    metrics = (tmp_path / "run" / "logs" / "train_metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["val/r2"] < 0.1
    out = tmp_path / "test.json"
    checkpoint = tmp_path / "run" / "final_artifact"
    call(
        "eval.py", "--checkpoint", checkpoint, "--eval_data", "arithmetic:test:400", "--output", out
    )
    assert abs(json.loads(out.read_text())["r2"] - best["r2"]) <= 0.03


@pytest.mark.parametrize(
    "command",
    [["train.py"], ["train_lora.py", "--load_in_4bit", "--bnb_4bit_compute_dtype=float32"]],
    ids=["full", "qlora"],
)
def test_a_fourth_of_it_is_enough_for_all_weights_and_for_a_4_bit_base(command, tmp_path):
    call(*command, "--max_steps=200", "--output_dir", tmp_path, "--experiment_name", "run")
    assert results(tmp_path / "run")["best"]["r2"] >= 0.80


def test_it_is_not_enough_for_a_random_backbone(tmp_path):
    flags = ["--init_from=scratch", "--max_steps=200"]
    call("train_lora.py", *flags, "--output_dir", tmp_path, "--experiment_name", "run")
    assert results(tmp_path / "run")["best"]["r2"] < 0.3


@pytest.mark.skipif(
    "PLAINLORA_DATA" not in os.environ,
    reason="needs the public sets: PLAINLORA_DATA names their folder",
)
def test_characters_from_random_weights_reach_the_loss_of_nanogpts_setting(tmp_path):
    text = Path(os.environ["PLAINLORA_DATA"]) / "tinyshakespeare" / "input.txt"
    flags = ["--config", "configs/shakespeare_char.toml", "--train_data", text.resolve()]
    call("train.py", *flags, "--output_dir", tmp_path, "--experiment_name", "run")
    assert results(tmp_path / "run")["best"]["loss"] <= 1.88
