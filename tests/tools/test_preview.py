"""`python -m lora render`: rows with their targets marked, and what a file amounts to."""

import json
import shutil

import pytest

from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.tools import preview
from tests.conftest import script
from tests.model.test_families import ENCODERS, base

SAMPLES = ROOT / "assets" / "samples"


def test_render_shows_the_targets_and_what_the_file_amounts_to(capsys):
    preview.main([str(SAMPLES / "questions.jsonl"), "--rows=2", "--max_length=512"])
    out = capsys.readouterr().out
    assert out.count("---") == 2 and "questions.jsonl:2" in out and "questions.jsonl:3" not in out
    row = json.loads((SAMPLES / "questions.jsonl").read_text().splitlines()[0])
    assert (
        f"<|im_start|>assistant\n⟦{row['answer']}<|im_end|>⟧" in out
        and f"user\n{row['question']}<|im_end|>" in out
    )
    assert "data: 8 examples in 8 sequences" in out and "tokens" in out and "lengths: median" in out


def test_render_shows_every_label_behind_its_step(capsys):
    preview.main(["arithmetic:validation:1", "--task=score", "--rows=1", "--max_length=512"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("From left to right") and all(
        line[-3:] in ("⟦0⟧", "⟦1⟧") for line in lines[2:5]
    )


def test_a_marker_that_is_an_added_token_is_rendered(capsys):
    flags = ["--task=score", "--step_marker=<x>", "--step_format={step}{marker}", "--rows=1"]
    data = ["arithmetic:validation:1", "--max_length=512"]
    with pytest.raises(UserError, match="add --add_special_tokens '<x>'"):
        preview.main([*data, *flags])
    preview.main([*data, *flags, "--add_special_tokens=<x>"])
    assert "<x> ⟦1⟧\n" in capsys.readouterr().out


def test_render_is_a_command_with_one_line_errors(monkeypatch, capsys):
    status, _, err = script(
        monkeypatch, capsys, ROOT / "lora" / "__main__.py", "render", "/no.jsonl"
    )
    assert status == 2 and err == "error: /no.jsonl: No such file or directory.\n"
    with pytest.raises(
        UserError, match="directory; several files are separate words, or a list in a config"
    ):
        preview.main(["/no.jsonl,/nor.jsonl"])


def test_the_name_of_a_file_has_no_commands_for_the_terminal(tmp_path, capsys):
    file = tmp_path / "a\x1b[31m\u202eb.jsonl"
    shutil.copy(SAMPLES / "questions.jsonl", file)
    preview.main([str(file), "--rows=1", "--max_length=512"])
    out = capsys.readouterr().out
    assert "/ab.jsonl:1, " in out and "\x1b" not in out and "\u202e" not in out


def test_render_says_by_which_keys_a_file_is_read_and_finds_its_task(tmp_path, capsys):
    lines = {
        "steps.jsonl": {"prompt": "p", "steps": ["s"], "labels": [1]},
        "asked.jsonl": {"id": 1, "ask": "q", "reply": "a"},
    }
    for name, row in lines.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    path = str(tmp_path / "steps.jsonl")
    preview.main([path, "--max_length=64"])
    out = capsys.readouterr().out
    assert f"{path}: 1 rows of prompt, steps, labels (--task score)\n" in out and "⟦1⟧" in out
    path = str(tmp_path / "asked.jsonl")
    preview.main([path, "--max_length=64", "--columns", "prompt=ask", "completion=reply"])
    out = capsys.readouterr().out
    assert f"{path}: 1 rows of prompt, completion (--task lm)\n" in out
    assert "keys not read: id (1 rows)" in out and "⟦a<|im_end|>⟧" in out


def test_render_reads_no_more_positions_than_training_does(tmp_path):
    """RoBERTa's positions begin behind its padding index."""
    folder = base("Roberta", ENCODERS["Roberta"], tmp_path / "base")
    flags = ["arithmetic:validation:1", "--task=score", f"--base_model={folder}"]
    preview.main([*flags, "--max_length=64"])
    with pytest.raises(UserError, match="has 64 positions"):
        preview.main([*flags, "--max_length=65"])
