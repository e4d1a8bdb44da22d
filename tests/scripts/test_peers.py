"""benchmarks/peers.py: what its table shows, and that its sides do the same work."""

from dataclasses import asdict
import json
from pathlib import Path
import sys

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers

    return peers


def runs(peers, kept_seconds, plain_seconds, loss):
    def results(seconds):
        return [{"losses": [loss], "seconds": s, "process_memory": 2e6} for s in seconds]

    return peers.Runs(results(kept_seconds), results(plain_seconds), memory=1_000_000)


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_names(peers):
    for work in peers.WORKS.values():
        assert set(work.sides) <= set(peers.SIDES)
        assert set(work.control or ()) <= set(work.sides)


def test_table(peers):
    """The ratio with freed memory kept stands first, and none where losses differ too much."""
    work = peers.Work(("plainlora", "whole", "halves", "wrong"), control=("whole", "halves"))
    results = {
        "plainlora": runs(peers, [1, 2], [], loss=5.001),
        "whole": runs(peers, [2, 6], [3, 8], loss=5.0),
        "halves": runs(peers, [2, 2], [2, 2], loss=5.002),
        "wrong": runs(peers, [1, 1], [1, 1], loss=5.008),
    }
    rows = [cells_of(line) for line in peers.table(work, results, num_tokens=100)]
    assert rows[2][:4] == ["plainlora", "1.00 (1.00-1.00)", "", "75 (50-100)"]
    assert rows[3][:3] == ["whole", "2.50 (2.00-3.00)", "3.50 (3.00-4.00)"]
    assert rows[5][:3] == ["wrong", "losses differ", "losses differ"]
    # Its loss is 0.007 from the first one's; the control's losses are 0.002 apart.
    tolerance, _ = peers.loss_tolerance(work, results)
    assert tolerance == pytest.approx(peers.TOLERANCE * 0.002)


def test_losses_that_are_not_compared(peers):
    work = peers.Work(("plainlora", "4 bits"), control=None)
    results = {
        "plainlora": runs(peers, [1], [], loss=5.0),
        "4 bits": runs(peers, [2], [], loss=5.5),
    }
    row = cells_of(peers.table(work, results, num_tokens=100)[3])
    assert row == ["4 bits", "2.00", "", "50", "1", "1.00", "2", "5.0e-01"]


@pytest.mark.parametrize("keeps_memory", [True, False])
def test_freed_memory(peers, monkeypatch, capsys, keeps_memory):
    """plainlora's side is not the script's own process, so the benchmark sets the allocator."""
    import peer_sides

    calls = []
    monkeypatch.setattr(peer_sides, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(peer_sides, "train_plainlora", lambda *_: (0, [5.0, 5.0], [1.0, 3.0]))
    work = peers.Work(("plainlora",), control=None)
    side = peers.Side("plainlora", keeps_memory=keeps_memory)
    job = {"work": asdict(work), "side": asdict(side), "folder": ""}
    monkeypatch.setattr(sys, "argv", ["peer_sides.py", json.dumps(job)])
    peer_sides.main()
    assert calls == ["kept"] * keeps_memory
    assert json.loads(capsys.readouterr().out)["losses"] == [5.0, 5.0]


@pytest.mark.slow
def test_same_losses(peers, tmp_path):
    """plainlora, Trainer and TRL train the same; a step in parts is the same step."""
    sides = ("plainlora, fp32", "Trainer, defaults (fp32)", "Trainer in halves, fp32")
    work = peers.Work(sides, control=sides[1:], shape="tiny", steps=3)
    peers.run(work, None, str(tmp_path), 1)
    losses = [peers.run(work, peers.SIDES[side], str(tmp_path), 1)["losses"] for side in sides]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
