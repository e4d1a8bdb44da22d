"""Twenty steps of four configurations give the losses that were committed with them.

A change that moves them must say why, and write them anew: `python -m tests.scripts.test_golden`.
What is smaller than the tolerance `benchmarks/same_numbers.py` finds.
"""

import json
from pathlib import Path
import tempfile

import pytest

from lora.common.paths import ROOT
from lora.config.command_line import read_command_line
from lora.config.schema import Config, get_lora_config
from lora.data.raw_data import RawData
import train
import train_lora

FOLDER = ROOT / "tests" / "golden"  # a configuration for each name, and the losses of all
FILE = FOLDER / "losses.json"
GOLDEN = json.loads(FILE.read_text())
STEPS = ["--max_steps=20", "--eval_steps=20", "--logging_steps=1", "--dtype=float32"]


def losses(name, folder):
    """The training loss of each step of a configuration, run in this process."""
    if GOLDEN[name]["script"] == "train.py":
        script, config = train, Config()
    else:
        script, config = train_lora, get_lora_config()
    flags = [
        f"--config={FOLDER / name}.toml",
        *STEPS,
        f"--output_dir={folder}",
        "--experiment_name=run",
    ]
    command = read_command_line(flags, config, "", "")
    script.main(command, RawData(command.config))
    lines = map(
        json.loads, (Path(folder) / "run" / "logs" / "train_metrics.jsonl").read_text().splitlines()
    )
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("name", GOLDEN)
def test_twenty_steps_have_the_losses_that_were_committed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = losses(name, tmp_path)
    assert len(found) == 20 and found[-1] < 0.9 * found[0]
    # Between AVX2 and AVX-512 these differ by 3e-6 at most.
    assert found == pytest.approx(GOLDEN[name]["losses"], rel=1e-4)


if __name__ == "__main__":
    for name, golden in GOLDEN.items():
        golden["losses"] = losses(name, tempfile.mkdtemp())
    FILE.write_text(json.dumps(GOLDEN, indent=2) + "\n")
