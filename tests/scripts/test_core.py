"""The core stands without its annexes: without them it still trains, resumes and saves."""

import json
import os
import shutil
import subprocess
import sys

from lora.common.paths import ROOT

ANNEXES = (
    "tools",
    "preflight",
    "export/gguf.py",
    "export/gguf_tokenizer.py",
    "training/trackers.py",
    "evaluation/retrieval.py",
)
RUN_ALL = """
import json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    print("\\nloaded:", " ".join(name for name in sys.modules if name.startswith("lora")))
"""  # in one process, so that torch is loaded once


def test_both_default_commands_and_a_resume_run_without_the_annexes(tmp_path):
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
    checkpoint = "outputs/lora/checkpoints/checkpoint_step_2"
    commands = [
        ["train.py", *short, "--experiment_name=full"],
        ["train_lora.py", *short, "--experiment_name=lora"],
        ["train_lora.py", f"--resume_from={checkpoint}", "--max_steps=3"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = (tmp_path / "outputs" / "lora" / "logs" / "final_results.json").read_text()
    assert json.loads(results)["last"]["step"] == 3
    assert (tmp_path / "outputs" / "full" / "final_artifact" / "backbone").is_dir()
