"""What can be found without running anything; the rules stand in pyproject.toml."""

import subprocess
import sys

import pytest

from lora.common.paths import ROOT

CHECKS = {
    "ruff finds no fault": ["ruff", "check", "--no-cache"],
    "the code has ruff's format": ["ruff", "format", "--check", "--no-cache"],
    "every text file is opened with its encoding named": [
        *("ruff", "check", "--no-cache", "--preview", "--select=PLW1514", "lora"),
        *("train.py", "train_lora.py", "eval.py", "merge.py"),
    ],
    "every attribute and call that mypy knows is there and fits": ["mypy", "--cache-dir=/dev/null"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_static_checks_pass(check):
    done = subprocess.run(
        [sys.executable, "-m", *CHECKS[check]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
