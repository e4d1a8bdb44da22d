"""benchmarks/gpu.py: its correctness parts on a GPU, and all of it at a tiny size on a CPU."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
import torch

# cuBLAS reads it at a process's first product; part (e) needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU of CUDA")
@pytest.mark.parametrize("part", "abcdefgh")
def test_correctness_on_a_gpu(part, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu_correctness import CORRECTNESS
    from gpu_work import NotRun, Place

    try:
        checks = CORRECTNESS[part](Place("cuda", "full"))
    except NotRun as reason:
        pytest.skip(str(reason))
    assert not [check for check in checks if check.passed is False]


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu_where_what_can_be_checked_holds(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device=cpu", "--size=tiny"]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'gpu.md'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    checks = {row["part"]: row["checks"] for row in rows if "checks" in row}
    assert list(checks) == list("abcdefgh")
    for part, found in checks.items():
        # What a CPU cannot show is said, not passed over.
        unmeasured = [check for check in found if check["found"] == "not measured on a CPU"]
        assert bool(unmeasured) == (part in "gh")
    speeds = [row["speed"] for row in rows if "speed" in row]
    assert [len(speed["seconds"]) for speed in speeds] == [8, 8, 8]
    page = (tmp_path / "gpu.md").read_text()
    assert "## Correctness" in page and "## Speed" in page and "FAIL" not in page
