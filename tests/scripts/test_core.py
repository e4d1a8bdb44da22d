"""The core stands without its annexes: without them it still trains, resumes and saves."""

import json
import shutil

import pytest

from lora.common.paths import ROOT
from tests.processes import run_programs

ANNEXES = (
    "tools",
    "preflight",
    "export/gguf.py",
    "export/gguf_tokenizer.py",
    "export/modelfile.py",
    "training/trackers.py",
    "evaluation/retrieval.py",
)


@pytest.mark.slow
def test_both_scripts_and_a_resume_run_without_the_annexes(tmp_path):
    for name in ("lora", "configs", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "train_lora.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ANNEXES:
        path = tmp_path / "lora" / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    short = ["--max_steps=2", "--save_steps=1", "--batch_size=2", "--max_eval_batches=1"]
    short.append("--train_data=arithmetic:train:60")
    checkpoint = "outputs/lora/checkpoints/checkpoint_step_2"
    commands = [
        ["train.py", "--config=configs/tiny_full.toml", *short, "--experiment_name=full"],
        ["train_lora.py", "--config=configs/tiny_lora.toml", *short, "--experiment_name=lora"],
        ["train_lora.py", f"--resume_from={checkpoint}", "--max_steps=3"],
    ]
    run_programs(commands, tmp_path)
    results = (tmp_path / "outputs" / "lora" / "logs" / "final_results.json").read_text()
    assert json.loads(results)["last"]["step"] == 3
    assert (tmp_path / "outputs" / "full" / "final_artifact" / "config.json").is_file()
