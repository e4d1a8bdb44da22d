"""Slow: what docs/nothing_silent.md, docs/hostile.md and results/chat_masks.md are made by."""

import re
import sys

import pytest

from benchmarks import chat_masks, hostile, nothing_silent

pytestmark = pytest.mark.slow


def test_no_chat_of_a_few_hundred_has_a_wrong_target():
    trl = chat_masks.compare(chat_masks.templates_of_trl(), 152, seed=1)
    hostile = chat_masks.compare(chat_masks.hostile_templates(), 116, seed=2)
    wrong = []
    for name, tally in (trl | hostile).items():
        wrong += [(name, *found) for found in tally.wrong + tally.undecided]
    assert wrong == []
    assert sum(tally.right for tally in trl.values()) > 100


@pytest.mark.parametrize("script", [nothing_silent, hostile])
def test_every_line_of_the_table_is_answered(script, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["page", "--output", str(page)])
    assert script.main() == 0, capsys.readouterr().out
    row = re.compile(r"^(\|.*\|) `", re.M)  # without the answer, which has times and hashes
    rows = row.findall(page.read_text())
    assert rows and rows == row.findall(script.PAGE.read_text())
