"""Slow: the checks that docs/nothing_silent.md and benchmarks/results/chat_masks.md are made by."""

import re
import sys

import pytest

from benchmarks import chat_masks, nothing_silent

pytestmark = pytest.mark.slow


def test_no_chat_of_a_few_hundred_has_a_wrong_target():
    trl = chat_masks.compare(chat_masks.templates_of_trl(), 152, seed=1)
    hostile = chat_masks.compare(chat_masks.hostile_templates(), 116, seed=2)
    wrong = []
    for name, tally in (trl | hostile).items():
        wrong += [(name, *found) for found in tally.wrong + tally.undecided]
    assert wrong == []
    assert sum(tally.right for tally in trl.values()) > 100


def test_nothing_of_the_table_is_silent(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["nothing_silent.py", "--output", str(page)])
    assert nothing_silent.main() == 0, capsys.readouterr().out
    tried = re.findall(r"^(\| [AB]\d+ \|.*\|) `", page.read_text(), re.M)
    assert tried == re.findall(r"^(\| [AB]\d+ \|.*\|) `", nothing_silent.PAGE.read_text(), re.M)
