"""Resumed = uninterrupted, bit for bit; the best three and the last checkpoint stay."""

import errno
import json
import math
import multiprocessing
import os
from pathlib import Path
import shutil
import signal
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch

from lora.common.atomic_files import remove_leftovers
from lora.common.checksums import find_damage, write_checksums
from lora.common.errors import UserError
from lora.common.exit_status import RunStatus
from lora.common.paths import ROOT
from lora.config.command_line import Command, read_command_line
from lora.config.run_folder import newest_checkpoint
from lora.config.schema import Config, get_lora_config
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.export.final_artifact import best_undamaged, loss_before_training
from lora.model.load import load_task
from lora.training import best_checkpoints
from lora.training.log import Log, cut_metrics_after
from lora.training.remove_optimizer import remove_optimizer
from tests.conftest import run
import train_lora

CHATS = ROOT / "assets" / "samples" / "chat.jsonl"


def files(folder):
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert found
    return found


def metrics(folder):
    """The metrics of a run without what a clock decides."""
    lines = [
        json.loads(line)
        for line in (folder / "logs" / "train_metrics.jsonl").read_text().splitlines()
    ]
    return [
        {k: v for k, v in line.items() if k not in ("timestamp", "train/tokens_per_second")}
        for line in lines
    ]


# No chain has 100 tokens, and a micro-batch holds at most batch_size x max_length.
SEVERAL_MICRO_BATCHES = {"batch_size": 1, "gradient_accumulation_steps": 8, "max_length": 100}


@pytest.mark.parametrize(
    "lora, settings",
    [
        (True, {"lora_dropout": 0.3, "head_dropout": 0.2, **SEVERAL_MICRO_BATCHES}),
        (True, {"task": "lm", "lora_dropout": 0.3}),
        (False, {"head_dropout": 0.2}),
        (False, {"task": "lm", "init_from": "scratch"}),
        (True, {"lora_dropout": 0.3, "dtype": "bfloat16"}),
        (True, {"lora_r": 0, "head_dropout": 0.2, **SEVERAL_MICRO_BATCHES}),
        (False, {"dtype": "float16"}),
    ],
    ids=[
        "lora scorer",
        "lora lm",
        "full scorer",
        "full lm from scratch",
        "lora scorer in bfloat16",
        "head alone",
        "full scorer in float16",
    ],
)
def test_resumed_equals_uninterrupted_bitwise(configure, monkeypatch, lora, settings):
    """Killed twice: once saved between evaluations, then saved at one, in the second epoch."""
    settings = settings | {"max_steps": 8, "train_data": ["arithmetic:train:40"]}  # 1.6 epochs
    whole = run(configure(lora, "whole", **settings))
    config = configure(lora, "cut", save_steps=4, **settings)
    checkpoints = Path(config.output.output_dir) / "cut" / "checkpoints"
    run_until(5, config, monkeypatch)
    config.output.save_steps = 6
    torch.manual_seed(12345)  # whatever the generator's state is
    run_until(7, config, monkeypatch, checkpoints / "checkpoint_step_4")
    torch.manual_seed(54321)
    cut = run(config, checkpoints / "checkpoint_step_6")
    last = "checkpoints/checkpoint_step_8"
    assert files(cut / last) == files(whole / last)
    assert metrics(cut) == metrics(whole)
    states = [best_checkpoints.trainer_state(folder / last) for folder in (cut, whole)]
    for state in states:
        assert state.pop("config")
        state["totals"] = state["totals"]["tokens"]  # time and memory differ
    assert states[0] == states[1]


def interrupted_at(stop):
    """batch_at of a run that is killed in its step `stop`."""
    undisturbed = TrainingData.batch_at

    def batch_at(self, step):
        if step == stop:
            raise KeyboardInterrupt
        return undisturbed(self, step)

    return batch_at


def run_until(stop, config, monkeypatch, resume_from=""):
    """Run until the run is killed in its step `stop`."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingData, "batch_at", interrupted_at(stop))
        run(config, resume_from)


def test_a_run_that_is_shortened_to_where_it_was_stopped_ends_as_a_run_of_that_length(
    configure, monkeypatch
):
    settings = dict(save_steps=4, eval_steps=3, lr_scheduler_type="constant", warmup_steps=0)
    whole = run(configure(True, "whole", max_steps=4, **settings))
    config = configure(True, "cut", **settings)
    run_until(5, config, monkeypatch)
    config.training.max_steps = 4
    checkpoint = f"{config.output.output_dir}/cut/checkpoints/checkpoint_step_4"
    cut = run(config, checkpoint, auto=True)
    assert metrics(cut) == metrics(whole) and files(cut) == files(whole)


def test_a_resumed_run_logs_the_keys_that_it_changes(configure, capsys):
    folder = run(configure(True, max_steps=1, logging_steps=1))
    capsys.readouterr()
    checkpoint = folder / "checkpoints" / "checkpoint_step_1"
    run(configure(True, max_steps=2, logging_steps=2, learning_rate=1e-3), checkpoint)
    changed = "changed on resume: learning_rate 0.01 -> 0.001, max_steps 1 -> 2\n"
    assert changed in capsys.readouterr().out


def test_a_run_without_its_artifact_is_ended_by_the_command_that_the_program_prints(configure):
    config = configure(True, max_steps=4)
    folder = run(config)
    before = files(folder)
    shutil.rmtree(folder / "final_artifact")
    assert files(run(config, folder / "checkpoints" / "checkpoint_step_4")) == before


def test_early_stopping_that_is_added_on_resume_waits_for_the_next_evaluation(
    configure, monkeypatch
):
    settings = dict(learning_rate=1.0, eval_steps=2, save_steps=5, max_steps=8)
    whole = run(configure(True, "whole", early_stopping_patience=1, **settings))
    config = configure(True, "cut", **settings)
    run_until(5, config, monkeypatch)
    config.training.early_stopping_patience = 1
    checkpoints = Path(config.output.output_dir) / "cut" / "checkpoints"
    cut = run(config, checkpoints / "checkpoint_step_5", auto=True)
    assert metrics(cut)[-1]["step"] >= 6 and (cut / "final_artifact").is_dir()
    # In a folder of its own, a run that had stopped goes on to its first evaluation.
    last = max(best_checkpoints.checkpoints_by_step(whole / "checkpoints").values())
    own = configure(True, "own", early_stopping_patience=1, **settings)
    assert (run(own, last) / "final_artifact").is_dir()


def test_a_run_whose_every_update_was_skipped_is_resumed(configure, monkeypatch, capsys):
    """A first step of float16 may overflow, and then the optimizer has no state of its own."""
    settings = dict(dtype="float16", optimizer="adamw_8bit", save_steps=1, max_steps=3)
    config = configure(False, **settings)
    with monkeypatch.context() as patch:
        overflow = torch.full((), math.inf)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: overflow)
        patch.setattr(torch.amp.GradScaler, "step", lambda *_: None)
        run_until(1, config, monkeypatch)
    said = "step 0: gradient norm inf; float16 skips the update and lowers its loss scale"
    assert said in capsys.readouterr().out
    checkpoint = Path(config.output.output_dir) / "run" / "checkpoints" / "checkpoint_step_1"
    assert run(config, checkpoint, auto=True).is_dir()


def test_a_float32_run_is_resumed_in_float16(configure, monkeypatch):
    config = configure(True, save_steps=4, max_steps=5, dtype="float32")
    run_until(4, config, monkeypatch)
    folder = Path(config.output.output_dir) / "run"
    config.training.dtype = "float16"
    checkpoint = str(folder / "checkpoints" / "checkpoint_step_4")
    command = Command(config, folder, checkpoint, allowed=("dtype",))
    with pytest.raises(UserError, match="^dtype changed: validation losses .* --experiment_name"):
        train_lora.main(command, RawData(config))
    command.run_dir = folder.with_name("float16")
    assert train_lora.main(command, RawData(config))["last"]["step"] == 5


@pytest.mark.parametrize(
    "name, old, new, found",
    [
        (
            "config.json",
            "1e-06",
            "1e-03",
            r"base_config \(config.json \w{8} -> config.json \w{8}\)",
        ),
        (
            "chat_template.jinja",
            "{%",
            "Be brief.{%",
            r"train_tokens \(\w+ -> \w+\), eval_tokens \(.*\): of another tokenizer",
        ),
    ],
)
def test_a_base_that_is_read_otherwise_is_refused(
    configure, tiny_base, tmp_path, name, old, new, found
):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    settings = dict(base_model=str(base), task="lm", max_steps=1)
    settings |= dict(train_data=[str(CHATS)], eval_data=[str(CHATS)], max_length=256)
    folder = run(configure(True, **settings))
    last = folder / "checkpoints" / "checkpoint_step_1"
    text = (base / name).read_text(encoding="utf-8")
    (base / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    assert (base / name).read_text(encoding="utf-8") != text

    config = configure(True, **settings | dict(max_steps=2))
    refused = f"not what it was made with: {found}.*; --allow_change base_model allows it"
    with pytest.raises(UserError, match=refused):
        run(config, last)
    command = Command(config, folder, str(last), allowed=("base_model",))
    with pytest.raises(UserError, match="changed: validation losses .* a new --experiment_name"):
        train_lora.main(command, RawData(config))
    command.run_dir = tmp_path / "other"
    assert train_lora.main(command, RawData(config))["last"]["step"] == 2

    # The checkpoints of older versions do not record it.
    state = best_checkpoints.trainer_state(last)
    for fact in ("base_config", "train_tokens", "eval_tokens"):
        del state["facts"][fact]
    (last / "trainer_state.json").write_text(json.dumps(state))
    write_checksums(last)
    assert (run(config, last) / "checkpoints" / "checkpoint_step_2").is_dir()


def test_the_three_best_and_the_last_stay_and_survive_a_resume(configure):
    folder = run(configure(True, max_steps=24, learning_rate=3e-2))  # evaluated at 3, 6, .. 24
    losses = {
        line["step"]: line["val/loss"]
        for line in metrics(folder)
        if "val/loss" in line and line["step"]
    }
    best = sorted(losses, key=losses.get)[:3]
    kept = {state["step"] for state in best_checkpoints.saved_states(folder / "checkpoints")}
    assert kept == {*best, 24}
    run(
        configure(True, max_steps=28, learning_rate=3e-2),
        folder / "checkpoints" / "checkpoint_step_24",
    )
    losses |= {
        line["step"]: line["val/loss"]
        for line in metrics(folder)
        if "val/loss" in line and line["step"]
    }
    assert {s["step"] for s in best_checkpoints.saved_states(folder / "checkpoints")} == {
        *sorted(losses, key=losses.get)[:3],
        28,
    }


def steps_with_optimizer(folder):
    return {
        int(path.parent.name.rpartition("_")[2])
        for path in folder.glob("checkpoints/*/optimizer.safetensors")
    }


def test_of_full_fine_tuning_the_last_checkpoint_alone_holds_the_optimizer(configure, capsys):
    """And a run resumed from it makes the best ones anew that are later."""
    settings = dict(task="lm", eval_data=["arithmetic:train:60"], learning_rate=1e-3)
    settings |= dict(eval_steps=2, save_steps=4, max_steps=13, warmup_steps=0)
    whole = run(configure(False, "whole", **settings))
    assert f"Saved {whole}/checkpoints/checkpoint_step_13: " in capsys.readouterr().out
    steps = {state["step"] for state in best_checkpoints.saved_states(whole / "checkpoints")}
    assert steps == {10, 12, 13} and steps_with_optimizer(whole) == {13}  # 12 has lost it
    assert not any(find_damage(path, "trainer_state.json") for path in whole.glob("checkpoints/*"))

    config = configure(False, "cut", **settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingData, "batch_at", interrupted_at(11))
        run(config)
    cut = Path(config.output.output_dir) / "cut"
    assert (cut / "checkpoints" / "checkpoint_step_10").is_dir()
    assert steps_with_optimizer(cut) == {8}
    command = ["--resume_from", str(cut / "checkpoints" / "checkpoint_step_10")]
    with pytest.raises(UserError, match="no optimizer, only weights; resume checkpoint_step_8, "):
        read_command_line(command, Config(), "", "")
    assert newest_checkpoint(config) == str(cut / "checkpoints" / "checkpoint_step_8")

    run(config, newest_checkpoint(config))
    assert "checkpoint_step_10: later than step 8; deleted" in capsys.readouterr().out
    assert metrics(cut) == metrics(whole)
    for path in whole.glob("checkpoints/*"):
        assert files(cut / "checkpoints" / path.name) == files(path)


def test_full_fine_tuning_that_is_lost_before_its_first_save_goes_on_from_its_first_best(configure):
    settings = dict(task="lm", eval_data=["arithmetic:train:60"], learning_rate=1e-3)
    settings |= dict(eval_steps=2, save_steps=100, max_steps=8, warmup_steps=0)
    whole = run(configure(False, "whole", **settings))
    assert steps_with_optimizer(whole) == {8}
    config = configure(False, "cut", **settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingData, "batch_at", interrupted_at(5))
        run(config)
    first_best = Path(newest_checkpoint(config))
    assert first_best.name == "checkpoint_step_2"
    cut = run(config, first_best, auto=True)
    assert metrics(cut) == metrics(whole) and steps_with_optimizer(cut) == {8}


def test_an_optimizer_is_removed_without_a_moment_of_damage(configure, tmp_path):
    folder = run(configure(False, max_steps=2, save_steps=1, save_optimizer="all"))
    (written,) = folder.glob("checkpoints/*")
    weights = {name: text for name, text in files(written).items() if name.stem != "optimizer"}
    for point in range(1, 1000):
        saved = tmp_path / "checkpoints" / written.name
        shutil.copytree(written, saved)
        child = multiprocessing.get_context("fork").Process(target=killed_at, args=(point, saved))
        child.start()
        child.join()
        remove_leftovers(saved.parent)
        assert [saved] == list(saved.parent.iterdir())
        assert not find_damage(saved, "trainer_state.json")
        assert weights.items() <= files(saved).items()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        shutil.rmtree(saved)
    assert files(saved) == weights and point > 20


def killed_at(point, checkpoint):
    """Remove the optimizer, and die at the `point`-th call that changes a file."""
    calls = []

    def hook(event, arguments):
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        changes = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod")
        if writes or event in changes:
            calls.append(event)
            if len(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    remove_optimizer(checkpoint)


def test_the_artifact_and_the_results_are_those_of_the_best_step(configure):
    folder = run(configure(True))
    best = best_checkpoints.best_first(best_checkpoints.saved_states(folder / "checkpoints"))[0]
    results = json.loads((folder / "logs" / "final_results.json").read_text())
    assert (
        results["best"] == {"step": best["step"], **best["val"]} and results["last"]["step"] == 12
    )
    artifact = folder / "final_artifact"
    for place, name in ((".", "mlp_head"), ("lora_adapter", "adapter_model")):
        of_best = best["path"] / place / f"{name}.safetensors"
        assert (artifact / of_best.name).read_bytes() == of_best.read_bytes()


def test_a_best_checkpoint_that_is_damaged_is_passed_over_with_a_warning(
    configure, tmp_path, capsys
):
    config = configure(True)
    states = best_checkpoints.saved_states(run(config) / "checkpoints")
    best, second, *_ = best_checkpoints.best_first(states)
    (best["path"] / "notes.txt").write_text("the best so far")
    log = Log(tmp_path / "log", config, max_steps=1)
    assert best_undamaged(states, log) == second
    log.close()
    warning = f"warning: {best['path']}: damaged ('notes.txt': extra); the next best is taken"
    assert warning in capsys.readouterr().out
    # This log has no metrics, as of a run that ends where it is resumed.
    assert loss_before_training(tmp_path / "log") == math.inf


def test_early_stopping_counts_evaluations_without_a_new_best_also_over_a_resume(
    configure, monkeypatch, capsys
):
    settings = dict(
        max_steps=300, learning_rate=1.0, early_stopping_patience=3, eval_steps=2, save_steps=2
    )

    def evaluations(folder):
        return [
            (line["step"], line["val/loss"])
            for line in metrics(folder)
            if "val/loss" in line and line["step"]
        ]

    whole = evaluations(run(configure(True, "whole", **settings)))
    stop, losses = whole[-1][0], [loss for _, loss in whole]
    # Three in a row were no better
    assert stop < 300 and losses.index(min(losses)) == len(losses) - 4
    config = configure(True, "cut", **settings)
    run_until(stop - 2, config, monkeypatch)
    checkpoints = Path(config.output.output_dir) / "cut" / "checkpoints"
    folder = run(config, checkpoints / f"checkpoint_step_{stop - 2}")
    assert evaluations(folder) == whole

    # It has ended, with or without its artifact, and goes on with more patience.
    shutil.rmtree(folder / "final_artifact")
    last = checkpoints / f"checkpoint_step_{stop}"
    capsys.readouterr()
    assert evaluations(run(config, last)) == whole
    assert (folder / "final_artifact").is_dir()
    had_stopped = f"this run stopped early at step {stop}; raise --early_stopping_patience"
    assert had_stopped in capsys.readouterr().out
    # In a new folder, where no loss is to be beaten, it goes on.
    assert len(evaluations(run(configure(True, "other", **settings), last))) >= 1
    assert had_stopped not in capsys.readouterr().out
    capsys.readouterr()
    run(config, last, auto=True)
    assert f"complete since step {stop}; nothing to do" in capsys.readouterr().out
    config.training.early_stopping_patience = 4
    assert len(evaluations(run(config, last, auto=True))) > len(whole)


def test_a_checkpoint_without_its_optimizer_state_is_refused(configure):
    config = configure(True, max_steps=2)
    checkpoint = run(config) / "checkpoints" / "checkpoint_step_2"
    tensors = load_file(checkpoint / "optimizer.safetensors")
    gone = next(name for name in tensors if name.endswith("exp_avg"))
    save_file(
        {name: t for name, t in tensors.items() if name != gone},
        checkpoint / "optimizer.safetensors",
    )
    write_checksums(checkpoint)
    config.training.max_steps = 3
    with pytest.raises(UserError, match=f"not the optimizer's state of this model: .*{gone}"):
        run(config, checkpoint)


def test_a_complete_run_has_nothing_to_resume(configure):
    config = configure(True, max_steps=2)
    with pytest.raises(UserError, match="that run of 2 steps is complete; raise --max_steps"):
        run(config, run(config) / "checkpoints" / "checkpoint_step_2")


def test_what_bounds_a_complete_run_is_named(configure):
    last = run(configure(True, num_train_epochs=1.0)) / "checkpoints" / "checkpoint_step_8"
    for max_steps in (None, 30):
        longer = configure(True, num_train_epochs=1.0, max_steps=max_steps)
        with pytest.raises(UserError, match="of 8 steps is complete; raise --num_train_epochs"):
            run(longer, last)


@pytest.mark.parametrize("key, value", [("max_eval_batches", "1"), ("load_in_4bit", "true")])
def test_losses_over_other_examples_or_another_base_do_not_choose_the_best(configure, key, value):
    last = run(configure(True, max_steps=4)) / "checkpoints" / "checkpoint_step_4"
    flags = [f"--resume_from={last}", "--max_steps=8", f"--{key}={value}"]
    with pytest.raises(UserError, match=key):
        read_command_line(flags, get_lora_config(), "", "")
    with pytest.raises(UserError, match=f"{key} changed: validation losses .* a new"):
        read_command_line([*flags, f"--allow_change={key}"], get_lora_config(), "", "")
    other = [*flags, f"--allow_change={key}", "--experiment_name=other"]
    assert not read_command_line(other, get_lora_config(), "", "").continues


def test_a_tensor_that_never_gets_a_gradient_does_not_keep_a_run_from_being_resumed(
    configure, monkeypatch
):
    """As the biases by which some experts are only chosen."""

    def with_unused(*arguments, **options):
        task = load_task(*arguments, **options)
        task.head.unused = torch.nn.Parameter(torch.zeros(3))
        return task

    monkeypatch.setattr("train.load_task", with_unused)
    config = configure(False, max_steps=4)
    last = run(config) / "checkpoints" / "checkpoint_step_4"
    config.training.max_steps = 5
    assert (run(config, last) / "checkpoints" / "checkpoint_step_5").is_dir()


def test_a_dry_run_of_a_resumed_run_counts_what_that_run_would_do(configure, capsys):
    config = configure(True, max_steps=2)
    last = run(config) / "checkpoints" / "checkpoint_step_2"
    complete = read_command_line([f"--resume_from={last}", "--dry_run"], get_lora_config(), "", "")
    train_lora.main(complete, RawData(complete.config))
    state = json.loads((last / "trainer_state.json").read_text())
    state["examples_per_step"] = 16  # as of two processes
    (last / "trainer_state.json").write_text(json.dumps(state))
    write_checksums(last)
    flags = [f"--resume_from={last}", "--max_steps=20", "--dry_run"]
    flags += ["--train_data=arithmetic:train:70", "--allow_change=train_data"]
    command = read_command_line(flags, get_lora_config(), "none.toml", "")
    capsys.readouterr()
    train_lora.main(command, RawData(command.config))
    assert "20 steps of 16 examples" in capsys.readouterr().out


def test_a_finished_run_without_checkpoints_is_not_begun_again(configure, tmp_path):
    folder = run(configure(True, max_steps=1))
    shutil.rmtree(folder / "checkpoints")
    config = configure(True, max_steps=1)
    with pytest.raises(UserError, match="has an artifact and no checkpoint"):
        newest_checkpoint(config)


def test_resuming_with_another_configuration_is_refused_and_a_longer_run_is_not(
    configure, tmp_path
):
    config = configure(True)
    saved = run(config) / "checkpoints" / "checkpoint_step_12"

    def resume(*flags):
        return read_command_line(
            [f"--resume_from={saved}", *flags], get_lora_config(), "unused.toml", ""
        )

    with pytest.raises(UserError, match=r"lora_r \(16 -> 8\), learning_rate \(0.01 -> 0.02\)"):
        resume("--lora_r=8", "--learning_rate", "0.02")
    command = resume("--max_steps=20", "--eval_steps=5")
    assert command.run_dir == saved.parent.parent and command.config.training.max_steps == 20
    assert resume("--experiment_name=branch").run_dir == tmp_path / "branch"
    with pytest.raises(UserError, match="final_artifact: no checkpoint; expected RUN"):
        read_command_line(
            [f"--resume_from={saved.parent.parent}/final_artifact"],
            get_lora_config(),
            "unused.toml",
            "",
        )
    # Hugging Face's Trainer calls its own so
    (tmp_path / "trainer_state.json").write_text('{"epoch": 1.0}')
    with pytest.raises(UserError, match="damaged: checksums.json: no such file"):
        read_command_line([f"--resume_from={tmp_path}"], get_lora_config(), "unused.toml", "")
    earlier = min(s["step"] for s in best_checkpoints.saved_states(saved.parent))
    with pytest.raises(UserError, match="checkpoint_step_12 is later"):
        read_command_line(
            [f"--resume_from={saved.parent}/checkpoint_step_{earlier}"],
            command.config,
            "unused.toml",
            "",
        )


def test_a_run_whose_checkpoints_lie_on_another_disk_goes_on_in_its_own_folder(configure, tmp_path):
    folder = run(configure(True, max_steps=1))
    disk = (folder / "checkpoints").rename(tmp_path / "checkpoints")
    (folder / "checkpoints").symlink_to(disk)
    (tmp_path / "last").symlink_to(folder / "checkpoints" / "checkpoint_step_1")
    for checkpoint in (folder / "checkpoints" / "checkpoint_step_1", tmp_path / "last"):
        flags = [f"--resume_from={checkpoint}", "--max_steps=2"]
        command = read_command_line(flags, get_lora_config(), "", "")
        assert command.run_dir == folder and command.continues


@pytest.mark.parametrize(
    "damage", ["<html>\n", "[1]\n", '{"loss": 1}\n', '{"step": "x"}\n', b"\xff"]
)
def test_metrics_that_are_none_are_refused_when_a_run_is_resumed(tmp_path, damage):
    path = tmp_path / "train_metrics.jsonl"
    content = damage if isinstance(damage, bytes) else damage.encode()
    path.write_bytes(b'{"step": 1}\n' + content)
    with pytest.raises(UserError, match="train_metrics.jsonl: no metrics of a run"):
        cut_metrics_after(1, path)
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(UserError, match="train_metrics.jsonl: no plain file"):
        cut_metrics_after(1, path)


def test_a_run_goes_on_where_its_terminal_is_closed(configure, monkeypatch):
    def closed(line):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("lora.training.log.tqdm.write", closed)
    folder = run(configure(True, max_steps=2))
    (log,) = folder.glob("logs/train_*.log")
    assert "Saved" in log.read_text()


def test_a_run_in_an_odd_folder_writes_through_no_link(configure, tmp_path):
    config = configure(True)
    folder = tmp_path / "odd"
    names = ["logs/config.json", "logs/config.toml", "status.json", "error.log"]
    (folder / "logs").mkdir(parents=True)
    (tmp_path / "private").write_text("mine")
    for name in names:
        (folder / name).symlink_to(tmp_path / "private")
    Log(folder, config, 1, may_exist=True).close()
    status = RunStatus()
    status.run_dir = folder
    try:
        raise ValueError
    except ValueError:
        status.write(1)
    assert (tmp_path / "private").read_text() == "mine"
    assert not any((folder / name).is_symlink() for name in names)
    metrics_file = folder / "logs" / "train_metrics.jsonl"
    metrics_file.unlink()
    metrics_file.symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="train_metrics.jsonl: a link that leads out") as kept:
        Log(folder, config, 1, may_exist=True)
    metrics_file.unlink()
    Log(folder, config, 1, may_exist=True).close()  # the traceback does not keep the folder locked
    assert kept.value


def test_a_run_that_fails_before_its_first_step_leaves_its_folder_unlocked(configure):
    """In a notebook, whose last traceback is kept."""
    folder = run(configure(True, max_steps=1))
    last = folder / "checkpoints" / "checkpoint_step_1"
    (folder / "baseline_checksums.json").unlink()
    (folder / "baseline_checksums.json").mkdir()
    with pytest.raises(IsADirectoryError) as kept:
        run(configure(True, max_steps=2), last)
    (folder / "baseline_checksums.json").rmdir()
    run(configure(True, max_steps=2), last)
    assert kept.value
