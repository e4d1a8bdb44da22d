"""What a language model is measured by, and how its rows are shown, on the few rows that the repository holds."""

import json
import subprocess
import sys

import pytest

import eval as evaluation
from lora import show
from lora.config import ROOT

SAMPLES = ROOT / "assets" / "samples"


def test_loss_and_perplexity_do_not_depend_on_the_batch_size(tmp_path):
    numbers = []
    for batch_size in (1, 3, 16):
        out = tmp_path / f"{batch_size}.json"
        flags = ["--base_model=embedded", "--eval_data", str(SAMPLES / "chat.jsonl"), f"--batch_size={batch_size}"]
        flags += ["--max_length=512", "--output", str(out)]
        evaluation.main(*(parsed := evaluation.read_arguments(flags)), evaluation.read_examples(*parsed))
        numbers.append(json.loads(out.read_text()))
    for other in numbers[1:]:  # fp32 sums in another order
        assert other == pytest.approx(numbers[0], rel=1e-5)
    assert {"loss", "perplexity", "token_accuracy", "bits_per_byte"} == numbers[0].keys()


def test_render_shows_the_targets_and_what_the_file_amounts_to(capsys):
    show.main([str(SAMPLES / "questions.jsonl"), "--rows=2", "--max_length=512"])
    out = capsys.readouterr().out
    assert out.count("---") == 2 and "questions.jsonl:2" in out and "questions.jsonl:3" not in out
    row = json.loads((SAMPLES / "questions.jsonl").read_text().splitlines()[0])
    assert f"<|im_start|>assistant\n⟦{row['answer']}<|im_end|>⟧" in out and f"user\n{row['question']}<|im_end|>" in out
    assert "data: 8 examples in 8 rows" in out and "tokens" in out and "lengths: half up to" in out


def test_render_shows_every_label_behind_its_step(capsys):
    show.main(["arithmetic:validation:1", "--task=score", "--rows=1", "--max_length=512"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("From left to right") and all(line[-3:] in ("⟦0⟧", "⟦1⟧") for line in lines[2:5])


def test_render_is_a_command_with_one_line_errors():
    done = subprocess.run([sys.executable, "-m", "lora.render", "/no.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: /no.jsonl: No such file or directory.\n"
