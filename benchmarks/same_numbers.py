"""Proof that a change keeps the numbers: another commit and this tree run the same commands here,
compared bit for bit.

    python benchmarks/same_numbers.py [COMMIT]      default: the parent of what is checked out

The configurations are those of tests/golden/, 20 steps each; both trees are given the files of this
one. Compared are all metrics of all steps but times, and every tensor of the last checkpoint
(weights and optimizer). What differs is named, and the exit status is then 1.
"""

import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile

from common import ROOT, metrics
from safetensors.torch import load_file
import torch

GOLDEN = ROOT / "tests" / "golden"
STEPS = ["--max_steps=20", "--eval_steps=10", "--logging_steps=1", "--experiment_name=run"]
TIMES = ("timestamp", "train/tokens_per_second")


def found(tree, script, config, folder):
    """{name: number or tensor} of everything that a script computes in `tree` with a configuration
    file.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PLAINLORA_CACHE": str(folder / "cache")}
    arguments = [sys.executable, script, f"--config={config}", *STEPS, f"--output_dir={folder}"]
    done = subprocess.run(arguments, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} --config {config}\nin {tree}: {done.stderr.strip().splitlines()[-1]}")
    lines = metrics(folder / "run")
    numbers = {
        f"step {line['step']} {key}": value
        for line in lines
        for key, value in line.items()
        if key not in TIMES
    }
    checkpoint = folder / "run" / "checkpoints" / "checkpoint_step_20"
    for file in sorted(checkpoint.rglob("*.safetensors")):
        numbers |= {
            f"{file.relative_to(checkpoint)} {name}": tensor
            for name, tensor in load_file(file).items()
        }
    return numbers


def difference(before, now):
    """What to say of two values (None: absent) that should be one; "" where they are."""
    tensors = isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor)
    if not tensors:
        return "" if before == now else f"{before} -> {now}"
    if (before.shape, before.dtype) != (now.shape, now.dtype):
        return f"{list(before.shape)} {before.dtype} -> {list(now.shape)} {now.dtype}"
    if torch.equal(before, now):
        return ""
    largest = (before.double() - now.double()).abs().max()
    return f"{int((before != now).sum())} of {now.numel()} values, by {largest:.1e} at most"


def main(commit="HEAD^"):
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        files = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE
        ).stdout
        subprocess.run(["tar", "-x", "-C", tree], input=files, check=True)
        for name, golden in json.loads((GOLDEN / "losses.json").read_text()).items():
            config = GOLDEN / f"{name}.toml"
            before = found(tree, golden["script"], config, Path(folder) / name / "before")
            now = found(ROOT, golden["script"], config, Path(folder) / name / "now")
            said = {
                key: difference(before.get(key), now.get(key))
                for key in [*now, *(before.keys() - now.keys())]
            }
            lines = [f"    {key}: {text}" for key, text in said.items() if text]
            print(
                f"{name}: {len(lines)} of {len(said)} differ"
                if lines
                else f"{name}: equal ({len(said)} values)"
            )
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)
            differing += len(lines)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
