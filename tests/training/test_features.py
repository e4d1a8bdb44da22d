"""A head on a frozen base: trained from features that are computed once = trained with the base
asked at every step.
"""

import json

import numpy as np
import pytest
from safetensors.torch import load_file
import torch

from lora.common.checkpoint_folders import adapter_folder, model_folder
from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.config.command_line import read_command_line
from lora.config.schema import get_lora_config
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.data.token_cache import load_or_tokenise
from lora.model.load import load_task
from lora.model.run import Run
from lora.model.task import Task
from lora.training import cached_features
from lora.training.base_integrity import warn_other_base
from lora.training.log import Log
from tests.conftest import run, script
from tests.distributed.test_distributed import run_of
from tests.training.test_resume import metrics

HEAD = "final_artifact/mlp_head.safetensors"


def counted(monkeypatch):
    """A list to which each micro-batch that a backbone reads from now on adds its number of
    targets.
    """
    undisturbed, calls = Task.hidden_states, []

    def hidden_states(self, batch):
        calls.append(batch.num_targets)
        return undisturbed(self, batch)

    monkeypatch.setattr(Task, "hidden_states", hidden_states)
    return calls


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "bfloat16"}, {"score_loss": "bce", "head_dropout": 0.2}], ids=str
)
def test_features_that_are_kept_train_the_head_that_the_base_asked_every_time_does(
    configure, monkeypatch, settings
):
    kept = run(configure(True, "kept", lora_r=0, **settings))
    monkeypatch.setattr(cached_features, "cache_features", lambda *_: None)
    asked = run(configure(True, "asked", lora_r=0, **settings))
    # The rows share other micro-batches: sums in another order, in bfloat16 rounded to 8 bits, and
    # 12 updates.
    limit = 1e-2 if settings.get("dtype") else 1e-5
    for one, other in zip(metrics(kept), metrics(asked), strict=True):
        assert one == pytest.approx(other, rel=limit, abs=limit)
    ours, theirs = load_file(kept / HEAD), load_file(asked / HEAD)
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 10 * limit


def test_the_base_reads_every_row_once_however_long_the_run_is(configure, monkeypatch):
    calls = counted(monkeypatch)
    run(configure(True, "short", lora_r=0, max_steps=8))  # of 8 rows each: 60 rows and a little
    once = sum(calls)
    calls.clear()
    run(configure(True, "long", lora_r=0, max_steps=40))
    assert sum(calls) == once


@pytest.fixture
def frozen(configure):
    """(a task whose model is frozen, its data, its configuration)."""
    config = configure(True, lora_r=0)
    task = load_task(config, torch.float32)
    task.model.requires_grad_(False)
    rows, held_out, _ = load_or_tokenise(RawData(config), task)
    return task, TrainingData(rows, held_out, config), config


def cache(task, data, config, steps):
    run = Run(task, config, data, torch.device("cpu"), torch.float32)
    log = Log(f"{config.output.output_dir}/features", config, steps)
    cached_features.cache_features(run, steps, log)
    log.close()


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_brings_the_features_of_its_own_targets(frozen, packed):
    task, data, config = frozen
    task.packed = data.packed = packed
    task.model.set_attn_implementation("packed" if packed else "sdpa")
    task.eval()
    order = np.random.default_rng(0).permutation(len(data.rows))[:9]
    expected = task.target_hidden_states(data.rows.batch(order, packed))
    cache(task, data, config, 8)
    batch = data.rows.batch(order, packed)
    assert (
        batch.features.requires_grad is False and task.target_hidden_states(batch) is batch.features
    )
    # Other rows beside them: another order
    torch.testing.assert_close(batch.features, expected, rtol=0, atol=1e-5)
    assert len(data.rows.batch(order, packed, with_targets=False).features) == 0


def test_a_run_shorter_than_an_epoch_computes_what_it_asks_for(frozen):
    task, data, config = frozen
    cache(task, data, config, 2)
    asked = np.concatenate([data.rows_at(0), data.rows_at(1), data.longest_rows])
    assert data.rows.features.keys() == {*asked.tolist()} and len(data.rows.features) < len(
        data.rows
    )
    assert data.held_out.features.keys() == {*range(len(data.held_out))}


def test_what_is_trained_in_the_base_keeps_no_features(configure, monkeypatch):
    monkeypatch.setattr(cached_features, "cache_features", None)  # calling it would be an error
    run(configure(True, max_steps=1))


def test_what_is_saved_is_the_head_and_it_is_evaluated_merged_and_compared(
    configure, monkeypatch, capsys, tmp_path
):
    folder = run(configure(True, lora_r=0, learning_rate=3e-2))
    said = capsys.readouterr().out
    assert (
        "base model weights unchanged: " in said
        and "targets are computed once and kept in 0.000 GB of main memory" in said
    )
    artifact, merged = folder / "final_artifact", tmp_path / "merged"
    for saved in (artifact, folder / "checkpoints" / "checkpoint_step_12"):
        assert not adapter_folder(saved) and not model_folder(saved)
        assert (saved / "mlp_head.safetensors").is_file()
    assert json.loads((artifact / "metadata.json").read_text())["method"] == "head"
    assert "does not hold the weights" in warn_other_base(
        artifact, "another", {"model.safetensors": "0"}
    )
    best = json.loads((folder / "logs" / "final_results.json").read_text())["best"]
    assert (
        script(monkeypatch, capsys, ROOT / "merge.py", "--adapter", artifact, "--output", merged)[0]
        == 0
    )
    for checkpoint in (artifact, merged):
        output = tmp_path / f"{checkpoint.name}.json"
        status, _, errors = script(
            monkeypatch, capsys, ROOT / "eval.py", "--checkpoint", checkpoint, "--output", output
        )
        assert status == 0, errors
        # Other micro-batches
        assert json.loads(output.read_text())["mse"] == pytest.approx(best["mse"], abs=1e-6)


def test_stages_before_and_after_a_head_alone(configure, tmp_path):
    head = run(configure(True, "head", lora_r=0))
    last = [line["val/loss"] for line in metrics(head) if "val/loss" in line]
    begun = str(head / "checkpoints" / "checkpoint_step_12")
    for name, lora, rank in (("lora", True, 4), ("full", False, 4), ("again", True, 0)):
        after = run(
            configure(
                lora, name, init_from=begun, max_steps=1, **({"lora_r": rank} if lora else {})
            )
        )
        # Other micro-batches
        assert metrics(after)[0]["val/loss"] == pytest.approx(last[-1], abs=1e-6)
    flags = [
        "--base_model=embedded",
        "--train_data=arithmetic:train:9",
        "--task=score",
        "--lora_r=0",
    ]
    for earlier in ("lora", "full"):
        start = tmp_path / earlier / "final_artifact"
        with pytest.raises(
            UserError,
            match="holds more than a head, and lora_r 0 begins from a head; name the merged",
        ):
            read_command_line([*flags, f"--init_from={start}"], get_lora_config(), "none.toml", "")
        with pytest.raises(
            UserError,
            match="but with lora_r 0 only the head is trained; name the merged base_model",
        ):
            run(configure(True, f"after_{earlier}", lora_r=0, init_from=str(start)))
    with pytest.raises(UserError, match="neither an adapter nor a model in it; expected"):
        run(configure(True, "text", task="lm", init_from=begun))


def test_two_processes_share_the_work_and_have_the_features_of_one(configure, tmp_path):
    settings = dict(lora_r=0, learning_rate=1e-3, max_steps=6)
    one = run(configure(True, name="one", batch_size=4, gradient_accumulation_steps=2, **settings))
    run_of(2, configure(True, name="two", batch_size=2, **settings), tmp_path)
    for first, second in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-6)


def test_a_dry_run_counts_one_pass_over_the_data(configure, monkeypatch, capsys, tmp_path):
    configure(True, lora_r=0, max_steps=4000).save(tmp_path / "run.toml")
    status, said, errors = script(
        monkeypatch, capsys, ROOT / "train_lora.py", "--config", tmp_path / "run.toml", "--dry_run"
    )
    assert status == 0 and "4000 steps of 8 examples" in said, errors
    # Later ones take next to no time.
    assert ": 8 steps of" in said and "and 1 evaluation of" in said
