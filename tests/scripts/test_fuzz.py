"""Slow: sixty of the random bad inputs of benchmarks/fuzz.py, by a fixed seed."""

import subprocess
import sys

import pytest

from lora.common.paths import ROOT


@pytest.mark.slow
def test_random_bad_inputs_are_answered_and_none_is_silent():
    command = [sys.executable, "benchmarks/fuzz.py", "--cases", "60", "--seed", "23"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
