"""The pictures of README and docs show what benchmarks/results/default_runs.json records."""

import json
import re
import statistics
import subprocess
import sys

import pytest

from lora.common.paths import ROOT

RECORD = json.loads((ROOT / "benchmarks" / "results" / "default_runs.json").read_text())
DRAWN = ("lora", "full", "random_backbone")


def points(picture, gid):
    """[(x, y)]: the positions of one line of a picture, in points."""
    path = re.search(rf'<g id="{gid}">\s*<path d="([^"]*)"', picture.read_text())[1]
    return [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_the_recorded_summaries_are_those_of_the_recorded_runs():
    for name, entry in RECORD.items():
        for split in {"validation", "test"} & entry.keys():
            low, median, high = sorted(figures[split] for figures in entry["seeds"].values())
            expected = f"{median:z.3f} ({low:z.3f}-{high:z.3f})"
            assert entry[split] == expected, (name, split)


@pytest.mark.parametrize("name", DRAWN)
def test_the_committed_curve_has_the_recorded_medians(name):
    curves = [figures["curve"] for figures in RECORD[name]["seeds"].values()]
    medians = [statistics.median(value for _, value in at_step) for at_step in zip(*curves)]
    drawn = points(ROOT / "assets" / "learning_curve.svg", f"{name}-whole")
    assert len(drawn) == len(medians) == 9
    # The page is 230.4 points high, the axes are from 0.15 to 0.9 of it and show -0.25 to 1.
    for (_, y), median in zip(drawn, medians):
        height = (230.4 - y) / 230.4
        assert -0.25 + (height - 0.15) / 0.75 * 1.25 == pytest.approx(median, abs=1e-5)


def test_the_recorded_runs_are_drawn_as_committed(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "benchmarks/pictures.py", "--output", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    drawn, committed = tmp_path / "learning_curve.svg", ROOT / "assets" / "learning_curve.svg"
    for name in DRAWN:
        expected = [pytest.approx(point, abs=1e-3) for point in points(committed, f"{name}-whole")]
        assert points(drawn, f"{name}-whole") == expected
