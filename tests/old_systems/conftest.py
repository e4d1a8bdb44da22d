"""Small data, and a run of a script in a folder of its own, as the users of older systems do it."""

import json

import pytest

from lora.common.paths import ROOT
from tests.conftest import script

CHATS = [("2+2?", "4"), ("3+4?", "7"), ("5+1?", "6"), ("1+8?", "9"), ("0+2?", "2"), ("4+4?", "8")]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """`call("train_lora.py", "--config", "a.yaml")`: (exit status, what it printed)."""
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "more_chats.jsonl"):
        rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in CHATS
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = "".join(f"{number} plus 1 is {number + 1}.\n\n" for number in range(40))
    (tmp_path / "corpus.txt").write_text(corpus)

    def call(name, *flags):
        status, out, error = script(monkeypatch, capsys, ROOT / name, *flags)
        return status, out + error

    return call


def losses(run):
    """The losses of a run's own file, by step."""
    lines = (run / "logs" / "train_metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
