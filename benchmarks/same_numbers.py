"""Proof that a change keeps the numbers: another commit and this tree run the same commands here, compared bit for bit.

    python benchmarks/same_numbers.py [COMMIT]      (the parent of what is checked out, where none is given)

The commands are those of tests/golden_losses.json, 20 steps each. Compared are all metrics of all steps but times, and
every tensor of the last checkpoint (weights and optimizer). What differs is named, and the exit status is then 1. A
refactor should print nothing but "equal"; a change that does not must say why.
"""

import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile

from safetensors.torch import load_file
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["--max_steps=20", "--eval_steps=10", "--logging_steps=1"]


def run(tree, name, command, folder):
    """The folder of the last checkpoint of a command in `tree`, and its lines of metrics without times."""
    script, *flags = command.split()
    arguments = [*flags, *STEPS, f"--output_dir={folder}", f"--experiment_name={name}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PLAINLORA_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, script, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} in {tree}: {done.stderr.strip().splitlines()[-1]}")
    lines = map(json.loads, (folder / name / "logs" / "train_metrics.jsonl").read_text().splitlines())
    timed = ("timestamp", "train/tokens_per_second")
    metrics = {(line["step"], key): value for line in lines for key, value in line.items() if key not in timed}
    return folder / name / "checkpoints" / "checkpoint_step_20", metrics


def tensors(checkpoint):
    """{"file: tensor": its values} of all safetensors in a checkpoint."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}: {name}": t for file in files for name, t in load_file(file).items()}


def differences(one, other, equal):
    """A line for each name that stands on one side only or has another value."""
    absent = object()
    pairs = {name: (one.get(name, absent), other.get(name, absent)) for name in [*one, *(other.keys() - one.keys())]}
    for name, (a, b) in pairs.items():
        if a is absent or b is absent:
            yield f"{name}: only {'now' if a is absent else 'before'}"
        elif not equal(a, b):
            yield f"{name}: {shown(a, b)}"


def shown(a, b):
    if not isinstance(a, torch.Tensor):
        return f"{a!r} -> {b!r}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{list(a.shape)} {a.dtype} -> {list(b.shape)} {b.dtype}"
    return f"largest difference {(a.double() - b.double()).abs().max():.1e} in {int((a != b).sum())} of {a.numel()} values"


def main(commit="HEAD^"):
    goldens = json.loads((ROOT / "tests" / "golden_losses.json").read_text())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        before, folder = Path(folder) / "tree", Path(folder)
        subprocess.run(["git", "worktree", "add", "-q", "--detach", before, commit], cwd=ROOT, check=True)
        try:
            for name, golden in goldens.items():
                (old, was), (new, now) = (
                    run(tree, name.replace(" ", "_"), golden["command"], folder / tree.name) for tree in (before, ROOT)
                )
                lines = [*differences(was, now, lambda a, b: a == b)]
                lines += differences(tensors(old), tensors(new), lambda a, b: a.dtype == b.dtype and torch.equal(a, b))
                print(
                    f"{name}: {len(was)} metrics, {len(tensors(new))} tensors: {'; '.join(lines[:8]) or 'equal'}",
                    flush=True,
                )
                found += lines
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
