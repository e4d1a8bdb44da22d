"""What plainlora 0.1.0 wrote (f9d5bca) is still resumed, evaluated and merged, with its numbers.

fixtures/written_by_0_1_0/ is a LoRA run of four steps of a step scorer on the embedded base. The
expected numbers are those that f9d5bca itself computed from these files.
"""

import json
from pathlib import Path
import shutil

import pytest
from safetensors.torch import load_file
import torch

from lora import verify_artifact
from lora.common.paths import ROOT
from tests.conftest import script

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0_1_0"
# Training losses of steps 5 to 8, and the validation loss after them.
RESUMED_LOSSES = [
    0.13537892699241638,
    0.12424735724925995,
    0.08902516216039658,
    0.11334957927465439,
]
RESUMED_VALIDATION_LOSS = 0.08704380666094995
VALIDATION_LOSS = 0.13122449855842075
# Between AVX2 and AVX-512, and other numbers of threads, sums differ by 3e-6 at most.
ANOTHER_CPU = 1e-4


def test_a_checkpoint_is_resumed(monkeypatch, capsys, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint_step_4"
    shutil.copytree(WRITTEN / "checkpoint_step_4", checkpoint)
    monkeypatch.chdir(tmp_path)
    status, _, error = script(
        monkeypatch,
        capsys,
        ROOT / "train_lora.py",
        f"--resume_from={checkpoint}",
        "--max_steps=8",
        "--output_dir=outputs",
        "--experiment_name=resumed",
    )
    assert status == 0, error
    logs = tmp_path / "outputs" / "resumed" / "logs"
    lines = [json.loads(line) for line in (logs / "train_metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses == pytest.approx(RESUMED_LOSSES, rel=ANOTHER_CPU)
    results = json.loads((logs / "final_results.json").read_text())
    assert results["best"]["loss"] == pytest.approx(RESUMED_VALIDATION_LOSS, rel=ANOTHER_CPU)


def test_an_artifact_is_verified_and_evaluated(monkeypatch, capsys, tmp_path):
    artifact = WRITTEN / "final_artifact"
    assert verify_artifact(artifact)["best"]["loss"] == VALIDATION_LOSS
    results = tmp_path / "results.json"
    status, _, error = script(
        monkeypatch,
        capsys,
        ROOT / "eval.py",
        f"--checkpoint={artifact}",
        f"--output={results}",
        "--dtype=float32",
    )
    assert status == 0, error
    loss = json.loads(results.read_text())["loss"]
    assert loss == pytest.approx(VALIDATION_LOSS, rel=ANOTHER_CPU)


def test_an_artifact_is_merged_with_the_base_it_names_or_another_place_of_it(
    monkeypatch, capsys, tmp_path
):
    merged = tmp_path / "merged"
    status, out, error = script(
        monkeypatch,
        capsys,
        ROOT / "merge.py",
        f"--adapter={WRITTEN / 'final_artifact'}",
        "--base_model=embedded",
        f"--output={merged}",
        "--dtype=float32",
    )
    assert status == 0, error
    base = load_file(ROOT / "assets" / "tiny_base" / "model.safetensors")
    adapter = load_file(WRITTEN / "final_artifact" / "lora_adapter" / "adapter_model.safetensors")
    weights = load_file(merged / "model.safetensors")
    layer = "layers.0.self_attn.q_proj"
    (lora_A,) = [t for name, t in adapter.items() if f"{layer}.lora_A" in name]
    (lora_B,) = [t for name, t in adapter.items() if f"{layer}.lora_B" in name]
    update = lora_B @ lora_A * 2  # alpha / r = 4 / 2
    expected = base[f"model.{layer}.weight"].float() + update
    torch.testing.assert_close(weights[f"model.{layer}.weight"], expected, rtol=0, atol=1e-6)
