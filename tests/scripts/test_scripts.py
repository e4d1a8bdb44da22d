"""The four scripts as their users run them: exit status, one-line errors, what a run leaves; and
the shape of the loop.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import peft
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
import torch
from transformers import AutoModel, AutoModelForCausalLM

import eval as evaluation
from lora.common.errors import Stopped, UserError
from lora.common.paths import ROOT
from lora.layer import lora_layers, merge
from lora.model.task import Task
import merge as merging
from tests.conftest import run, script


def call(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.py", "--lora_r=4"], "--lora_r: train.py trains all weights"),
        (
            ["train.py", "--base_model=/no/such", "--train_data=arithmetic:train:9"],
            "base_model /no/such: no such folder",
        ),
        (["eval.py"], "nothing to evaluate"),
        (["merge.py", "--adapter=x", "--output=tests"], "--output tests exists"),
    ],
)
def test_a_users_mistake_is_one_line_exit_2_and_nothing_written(arguments, message, tmp_path):
    program, *flags = arguments
    done = (
        call(ROOT / program, *flags, cwd=tmp_path)
        if "--output=tests" not in flags
        else call(program, *flags)
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and done.stderr.startswith(f"error: {message}")
    )
    assert not any(tmp_path.iterdir())


def test_a_rank_that_no_layer_has_room_for_is_one_line(monkeypatch, capsys, tmp_path):
    flags = ["--base_model=embedded", "--task=score", "--train_data=arithmetic:train:9"]
    flags += ["--max_length=512", "--lora_r=999", f"--output_dir={tmp_path / 'out'}"]
    status, _, errors = script(monkeypatch, capsys, ROOT / "train_lora.py", *flags)
    expected = "error: lora_r = 999: expected 1..128, for which the largest layer has room.\n"
    assert status == 2 and errors == expected
    assert not any(tmp_path.iterdir())


def test_flags_and_data_are_checked_before_torch_is_loaded():
    run_script = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    blocked = f"import sys, runpy; sys.modules['torch'] = None; {run_script}"
    for program in ("train.py", "train_lora.py"):
        done = call("-c", blocked, program, "--base_model=embedded", "--train_data=/nowhere.jsonl")
        assert done.returncode == 2 and "No such file" in done.stderr
        assert call("-c", blocked, program, "--help").returncode == 0
    done = call("-c", blocked, "merge.py", "--adapter=/nowhere", "--output=merged")
    assert done.returncode == 2 and done.stderr == "error: --adapter /nowhere: no such folder.\n"


def test_a_loss_that_is_not_finite_stops_before_the_update(configure, monkeypatch):
    undisturbed, tasks, weights = Task.forward, [], []

    def forward(self, batch):
        loss, count = undisturbed(self, batch)
        tasks.append(self)
        weights.append([p.detach().clone() for p in self.parameters()])
        # Of the probe, and steps 0 to 4
        return loss * (float("nan") if len(weights) == 6 else 1), count

    monkeypatch.setattr(Task, "forward", forward)
    with pytest.raises(Stopped, match=r"step 4: loss nan.*; stopped before the update") as error:
        run(configure(True, batch_size=8, gradient_accumulation_steps=1))
    assert (
        error.value.status == 3
        and error.value.facts["step"] == 4
        and len(error.value.facts["rows"]) == 8
    )
    assert all(
        torch.equal(now, before)
        for now, before in zip(tasks[-1].parameters(), weights[-1], strict=True)
    )
    assert not all(
        torch.equal(now, before) for now, before in zip(weights[-1], weights[0], strict=True)
    )


# -------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(params=[True, False], ids=["lora", "full"])
def finished(request, configure):
    """(config, folder) of a finished run of a scorer."""
    config = configure(request.param, max_steps=6)
    return config, run(config)


def test_a_run_leaves_what_the_readme_names(finished):
    config, folder = finished
    weights = (
        "lora_adapter/adapter_model.safetensors" if config.lora else "backbone/model.safetensors"
    )
    last = "checkpoints/checkpoint_step_6"
    for name in (
        *(
            "logs/config.json",
            "logs/config.toml",
            "logs/train_metrics.jsonl",
            "logs/final_results.json",
        ),
        *(
            f"{last}/{weights}",
            f"{last}/mlp_head.safetensors",
            f"{last}/optimizer.safetensors",
            f"{last}/trainer_state.json",
        ),
        *(
            f"final_artifact/{weights.split('/')[1]}",
            "final_artifact/training_config.toml",
            "final_artifact/tokenizer.json",
        ),
    ):
        assert (folder / name).is_file(), name
    lines = [
        json.loads(line)
        for line in (folder / "logs" / "train_metrics.jsonl").read_text().splitlines()
    ]
    assert {"step", "timestamp", "val/loss", "val/mse", "val/mae", "val/r2"} == lines[
        0
    ].keys() and lines[0]["step"] == 0
    assert {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
    } < lines[1].keys()
    assert not list(folder.rglob(".tmp*"))


def test_held_out_data_that_was_trained_on_is_pointed_out(configure, capsys):
    run(configure(True, max_steps=1, eval_data=["arithmetic:train:5"]))
    assert (
        "warning: 5 prompts or texts are both in the training and in the held-out data"
        in capsys.readouterr().out
    )


def test_of_two_runs_with_one_folder_the_second_is_refused(configure):
    run(configure(True, max_steps=1))
    with pytest.raises(UserError, match="run: File exists"):  # both had found the folder absent
        run(configure(True, max_steps=1))


def test_eval_repeats_the_validation_of_the_best_step_and_scores_a_prompt(
    finished, tmp_path, capsys
):
    config, folder = finished
    results = json.loads((folder / "logs" / "final_results.json").read_text())
    out = tmp_path / "numbers.json"
    arguments = evaluation.read_arguments(
        ["--checkpoint", str(folder / "final_artifact"), "--output", str(out)]
    )
    evaluation.main(*arguments, evaluation.read_request(*arguments))
    numbers = json.loads(out.read_text())
    assert numbers["mse"] == pytest.approx(results["best"]["mse"], abs=1e-6)
    assert {"mae", "r2", "pearson", "spearman"} < numbers.keys()
    capsys.readouterr()
    prompt = "From left to right: 1+2+1\n1+2=3\n\n3+1=5"
    arguments = evaluation.read_arguments(
        ["--checkpoint", str(folder / "final_artifact"), "--prompt", prompt]
    )
    evaluation.main(*arguments, evaluation.read_request(*arguments))
    shown = capsys.readouterr().out.strip().split("\n")
    assert [re.fullmatch(r"[01]\.\d{3}  (.*)", line)[1] for line in shown] == ["1+2=3", "3+1=5"]


def test_merge_into_a_bfloat16_base_is_rounded_once_and_written_as_bfloat16(
    configure, tmp_path, capsys
):
    artifact = (
        run(configure(True, base_model="embedded", max_steps=3, learning_rate=3e-2))
        / "final_artifact"
    )
    capsys.readouterr()
    merging.main(
        merging.read_arguments(["--adapter", str(artifact), "--output", str(tmp_path / "m")])
    )
    effect, fp32, rounded = map(
        float, re.findall(r"(?:base|fp32|bfloat16): +(\S+)", capsys.readouterr().out)
    )
    assert fp32 < 1e-4 < rounded < effect
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert {kind for name, kind in types.items() if not name.startswith("score.")} == {"BF16"}


@pytest.mark.parametrize("task", ["lm", "score"])
def test_merge_writes_a_plain_folder_that_says_what_base_and_adapter_say(
    configure, tiny_base, tmp_path, task
):
    config = configure(True, task=task, max_steps=6)
    artifact = run(config) / "final_artifact"
    merged = tmp_path / "merged"
    merging.main(merging.read_arguments(["--adapter", str(artifact), "--output", str(merged)]))
    model = AutoModelForCausalLM.from_pretrained(merged)
    reference = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), artifact
    )
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=0, atol=1e-5)
    assert not any("lora" in name for name in load_file(merged / "model.safetensors"))
    # The head goes along, and the folder is a checkpoint for eval.py, wherever it is
    if task == "score":
        moved = merged.rename(tmp_path / "moved")
        best = json.loads((artifact / "training_metrics.json").read_text())["best"]["mse"]
        arguments = evaluation.read_arguments(
            ["--checkpoint", str(moved), "--output", str(tmp_path / "n.json")]
        )
        evaluation.main(*arguments, evaluation.read_request(*arguments))
        assert json.loads((tmp_path / "n.json").read_text())["mse"] == pytest.approx(best, abs=1e-6)


def test_merge_refuses_when_rounding_would_swallow_the_adapter(configure, tmp_path):
    artifact = (
        run(configure(True, task="lm", max_steps=1, learning_rate=1e-6, warmup_steps=0))
        / "final_artifact"
    )
    arguments = merging.read_arguments(
        ["--adapter", str(artifact), "--output", str(tmp_path / "m"), "--dtype=bfloat16"]
    )
    with pytest.raises(UserError, match="add --dtype float32"):
        merging.main(arguments)
    assert not (tmp_path / "m").exists()


def test_merge_refuses_a_merged_model_that_differs(configure, tmp_path, monkeypatch):
    def half(model):
        for layer in lora_layers(model).values():
            layer.alpha /= 2
        merge(model)

    artifact = run(configure(True, task="lm", max_steps=3)) / "final_artifact"
    monkeypatch.setattr(merging, "merge", half)
    with pytest.raises(UserError, match="differs from base . adapter by .* more than rounding"):
        merging.main(
            merging.read_arguments(["--adapter", str(artifact), "--output", str(tmp_path / "m")])
        )
    assert not (tmp_path / "m").exists()


def test_merge_refuses_what_has_no_base_or_no_adapter(configure, tmp_path):
    full = run(configure(False, "full", max_steps=1)) / "final_artifact"
    scratch = run(configure(True, "scratch", init_from="scratch", max_steps=1)) / "final_artifact"
    part = scratch.parent / "checkpoints" / "checkpoint_step_1" / "lora_adapter"
    alone = shutil.copytree(part, tmp_path / "alone")
    for folder, message in (
        (full, "there is no adapter in it"),
        (scratch, "trained on random weights"),
        (alone, "add --base_model"),
    ):
        with pytest.raises(UserError, match=message):
            merging.main(
                merging.read_arguments(["--adapter", str(folder), "--output", str(tmp_path / "m")])
            )


def test_an_encoder_trained_on_pairs_is_merged_as_peft_has_it(configure, tiny_encoder, tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"sentence1": "ab" * (i % 5 + 1), "sentence2": "cd", "score": i % 5} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    values = dict(
        base_model=str(tiny_encoder),
        train_data=[str(data)],
        eval_data=[],
        label_max=4.0,
        eval_fraction=0.2,
    )
    folder = run(configure(True, **values))
    artifact, merged = folder / "final_artifact", tmp_path / "merged"
    merging.main(merging.read_arguments(["--adapter", str(artifact), "--output", str(merged)]))
    theirs = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(tiny_encoder), artifact
    ).eval()
    hidden = [
        model(torch.arange(30)[None]).last_hidden_state
        for model in (AutoModel.from_pretrained(merged), theirs)
    ]
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-5)  # fp32, sums in another order


def test_the_final_model_is_in_the_type_of_the_base(configure):
    """The embedded base is bfloat16 on disk, is trained in fp32, and its successor is bfloat16 on
    disk again.
    """
    config = configure(False, base_model="embedded", task="lm", init_from="scratch", max_steps=1)
    folder = run(config)
    for place, dtype in (
        ("final_artifact", "BF16"),
        ("checkpoints/checkpoint_step_1/backbone", "F32"),
    ):
        with safe_open(folder / place / "model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {dtype}


# ----------------------------------------------------------------------------------------- the loop


def test_the_loop_is_short_and_names_no_mode():
    source = (ROOT / "train.py").read_text()
    loop = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    )
    text = ast.get_source_segment(source, loop)
    assert len(text.splitlines()) < 130
    assert not re.findall(r"lora|token|score|cuda|rank", text, re.IGNORECASE)
    assert len((ROOT / "train_lora.py").read_text().splitlines()) < 60  # one screen


def test_the_embedded_base_is_small():
    folder = ROOT / "assets" / "tiny_base"
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()}
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert {kind for name, kind in types.items() if not name.startswith("score.")} == {"BF16"}
    assert sum(sizes.values()) <= 2.4e6 and sum(p.stat().st_size for p in folder.iterdir()) <= 5e6


@pytest.mark.parametrize("program", ["eval.py", "merge.py"])
def test_what_runs_in_one_process_says_so_under_torchrun(program):
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, program], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert (
        done.returncode == 2
        and done.stderr == f"error: {program} runs in one process; call it without torchrun.\n"
    )
