"""The worked examples of CONTRIBUTING.md, taken out of the page and run as they stand there."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, HeliumConfig, HeliumForCausalLM

from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.paths import ROOT
from tests.conftest import script
from tests.model.test_families import GROUPED
from tests.processes import run_programs

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
DIALOGUES = [{"dialogue": [f"What is {n} and {n}?", f"It is {2 * n}."]} for n in range(40)]


def blocks(section):
    """The (words behind the opening fence, text) of each code block in the section whose title
    begins so.
    """
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return [
        (info.split(), body)
        for info, body in re.findall(r"^```(.*?)\n(.*?)^```$", text, re.M | re.S)
    ]


def commands(section):
    return [
        line.split() for info, body in blocks(section) if not info for line in body.splitlines()
    ]


def edit(root, path, diff):
    """Replace the lines of a diff without -, which the file must hold exactly once, by those
    without +.
    """
    old, new = (
        "".join(line[1:] for line in diff.splitlines(True) if line[0] != other)
        for other in ("+", "-")
    )
    text = (root / path).read_text()
    assert text.count(old) == 1, f"{path} has {text.count(old)} times: {old}"
    (root / path).write_text(text.replace(old, new))


def changed(tmp_path, section):
    """What the section's commands print in a copy of the program with the files and edits that it
    shows.
    """
    for name in ("lora", "configs", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "train_lora.py", "eval.py", "merge.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "assets" / "samples" / "questions.jsonl", tmp_path)
    (tmp_path / "dialogues.jsonl").write_text("\n".join(map(json.dumps, DIALOGUES)))
    for (kind, *path), body in filter(lambda block: block[0], blocks(section)):
        if kind == "diff":
            edit(tmp_path, path[0], body)
        else:
            assert not (tmp_path / path[0]).exists()
            (tmp_path / path[0]).write_text(body)
    return run_programs([words for _, *words in commands(section)], tmp_path)


def test_a_new_data_format_is_a_file_and_its_name(tmp_path):
    out = changed(tmp_path, "Add a data format")
    assert "What is 1 and 1?" in out and "⟦It is 2.<|im_end|>⟧" in out
    assert "train: 36 examples" in out and "Step 1/1 (100.0%)" in out


def test_a_new_schedule_is_a_choice_and_a_formula(tmp_path):
    changed(tmp_path, "Add a flag, or a learning-rate schedule")
    (metrics,) = tmp_path.glob("outputs/*/logs/train_metrics.jsonl")
    lines = map(json.loads, metrics.read_text().splitlines())
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    assert rates == pytest.approx([rates[0] * (1 - (step / 3) ** 0.5) for step in range(3)])


def test_a_new_optimizer_resumes(tmp_path):
    changed(tmp_path, "Add an optimizer")
    for run in ("adam", "resumed"):
        results = (tmp_path / "outputs" / run / "logs" / "final_results.json").read_text()
        assert json.loads(results)["last"]["step"] == {"adam": 2, "resumed": 3}[run]


def test_a_new_metric_is_a_line(tmp_path):
    changed(tmp_path, "Add a metric")
    assert 0 <= json.loads((tmp_path / "results.json").read_text())["not_empty"] <= 1


def test_a_new_exporter_writes_the_merged_weights(tmp_path):
    changed(tmp_path, "Add an exporter")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    with np.load(tmp_path / "merged.npz") as exported:
        assert exported.keys() == merged.keys()
        for name, tensor in merged.items():
            assert np.array_equal(exported[name], tensor.float().numpy())


@pytest.fixture(scope="module")
def helium(tmp_path_factory):
    """A folder with a random tiny Helium and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "helium"
    HeliumForCausalLM(HeliumConfig(**GROUPED, head_dim=8)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder)
    return folder


def test_a_new_family_is_proved_by_a_line(tmp_path):
    ((_, body),) = [block for block in blocks("Add an architecture") if block[0]]
    exec(body, {"folder": tmp_path})


def test_a_new_family_passes_the_check_on_a_users_data(helium, monkeypatch, capsys):
    ((_, name, *flags),) = commands("Add an architecture")
    known = {"helium": helium, "chats.jsonl": ROOT / "assets" / "samples" / "chat.jsonl"}
    status, out, err = script(
        monkeypatch, capsys, ROOT / name, *(known.get(flag, flag) for flag in flags)
    )
    assert status == 0 and out.count("PASS") > 15 and "FAIL" not in out, err


def test_a_new_head_is_a_script_of_its_own(tmp_path, monkeypatch, capsys):
    ((_, name), body), _ = blocks("Add a head")
    (tmp_path / name).write_text(body)
    ((_, called, *flags),) = commands("Add a head")
    assert called == name
    monkeypatch.chdir(ROOT)
    flags += [
        "--output_dir",
        tmp_path,
        "--experiment_name=run",
        "--eval_data=arithmetic:validation:8",
    ]
    status, _, err = script(monkeypatch, capsys, tmp_path / name, *flags)
    assert status == 0, err
    best = json.loads((tmp_path / "run" / "logs" / "final_results.json").read_text())["best"]
    assert best["loss"] == best["mae"] != best["mse"]
