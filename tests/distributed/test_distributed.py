"""Two processes = one, at the same examples per step; a run goes on with any number of processes,
and after a lost one.
"""

from contextlib import nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import partial
import json
import multiprocessing
import os
from pathlib import Path
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

from filelock import FileLock
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
import torch

from lora.common import exit_status
from lora.common.errors import Stopped, UserError
from lora.common.exit_status import one_line_errors
from lora.common.paths import ROOT
from lora.config.command_line import Command, read_command_line
from lora.config.schema import Config
from lora.data.batches import shard_rows
from lora.data.raw_data import RawData
from lora.distributed import process_group
from lora.model.task import Task
from tests.conftest import run
from tests.training.test_resume import files
import train
import train_lora

STEPS = 8
LEARNED = ["arithmetic:train:60"]  # on what is trained on the last step is the best
SMOOTH = {
    "task": "lm",
    "eval_data": LEARNED,
    "eval_steps": 4,
}  # the scorer's ReLU has kinks, at which rounding is not small
LAST = "checkpoints/checkpoint_step_60/lora_adapter/adapter_model.safetensors"


def torchrun(script, config, processes, folder, *flags, more=()):
    """A call of a script under torchrun that has begun, with the configuration in a file."""
    path = folder / f"{config.output.experiment_name}.toml"
    config.save(path)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *more,
    ]
    command += [script, "--config", str(path), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_of(
    processes, config, folder, resume_from="", prepare=lambda rank: None, status=0, start=run
):
    """A whole run of several processes without torchrun: forks of this one, which has loaded torch.
    What they printed; all end with the same exit status, or each with its own of a list.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / f"{config.output.experiment_name}.txt"

    def run_process(rank):
        values = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
        values |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ |= {name: str(value) for name, value in values.items()}
        torch.set_num_threads(1)  # makes the pool of threads anew, which a fork does not inherit
        prepare(rank)
        with open(out, "a") as file, redirect_stdout(file), redirect_stderr(file):
            with one_line_errors() if status else nullcontext():
                start(config, resume_from)

    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=run_process, args=(rank,), daemon=True) for rank in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(180)
    statuses = status if isinstance(status, list) else [status] * processes
    assert [child.exitcode for child in children] == statuses, out.read_text()
    return out.read_text()


def finish(process):
    """What a call of torchrun printed that has ended well."""
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    return out


def weights(folder, steps=STEPS):
    """The last ones: an adapter's from its checkpoint, a model's from the artifact, which holds the
    best.
    """
    last = folder / "checkpoints" / f"checkpoint_step_{steps}"
    if not (last / "lora_adapter").is_dir():
        assert (
            json.loads((folder / "logs" / "final_results.json").read_text())["best"]["step"]
            == steps
        )
        last = folder / "final_artifact"
    files = [path for path in last.rglob("*.safetensors") if path.name != "optimizer.safetensors"]
    return {
        f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()
    }


def layout(checkpoint):
    """The files of a checkpoint, and the shapes of its tensors."""
    shapes = {
        (path.name, name): tensor.shape
        for path in checkpoint.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    return {path.relative_to(checkpoint) for path in checkpoint.rglob("*")}, shapes


def losses(folder):
    lines = [
        json.loads(line)
        for line in (folder / "logs" / "train_metrics.jsonl").read_text().splitlines()
    ]
    keys = ("train/loss", "train/grad_norm", "val/loss")
    found = torch.tensor(
        [[line[key] for key in keys if key in line] for line in lines if "train/loss" in line]
    )
    assert found.isfinite().all() and len(found) > 0
    return found


def assert_close(one, other):
    """Sums in another order, carried through the updates."""
    assert one and one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method, sizes",
    [
        ("lora", (2, 4)),
        ("full", (2, 4)),
        ("qlora", (2,)),  # its gradients are summed by the code of "lora"
        pytest.param("qlora", (4,), marks=pytest.mark.slow),
    ],
)
def test_two_and_four_processes_equal_one_at_the_same_examples_per_step(
    configure, tmp_path, method, sizes
):
    settings = dict(max_steps=4, learning_rate=2e-3, **SMOOTH)
    if method == "qlora":
        settings |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
    configure = partial(configure, method != "full", gradient_accumulation_steps=2, **settings)
    one = run(configure(name="one", batch_size=4))
    for processes in sizes:
        name = f"on_{processes}"
        out = run_of(processes, configure(name=name, batch_size=4 // processes), tmp_path)
        # One of them talks
        assert out.count("loading base model") == out.count("steps of 8 examples") == 1
        torch.testing.assert_close(losses(one), losses(tmp_path / name), rtol=1e-5, atol=1e-6)
        assert_close(weights(one, 4), weights(tmp_path / name, 4))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_checkpoint_of_two_processes_goes_on_with_one_and_with_four(configure, tmp_path, lora):
    settings = dict(learning_rate=2e-3, save_steps=4, batch_size=3, **SMOOTH)
    settings |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = run(configure(lora, name="whole", max_steps=STEPS, **settings | {"batch_size": 6}))
    run_of(2, configure(lora, name="two", max_steps=4, **settings), tmp_path)
    saved = tmp_path / "two" / "checkpoints" / "checkpoint_step_4"
    last = whole / "checkpoints" / f"checkpoint_step_{STEPS}"
    assert layout(saved) == layout(last)  # that of one process
    for processes in (1, 4):
        on = configure(lora, name=f"on_{processes}", max_steps=STEPS, **settings)
        run_of(processes, on, tmp_path, resume_from=saved)
        assert_close(weights(whole), weights(tmp_path / f"on_{processes}"))


def test_sharded_over_two_processes_resumed_equals_uninterrupted_bitwise(configure, tmp_path):
    settings = dict(save_steps=2, batch_size=2, max_steps=4, eval_steps=2, save_optimizer="all")
    run_of(2, configure(False, name="whole", **settings), tmp_path)
    middle = tmp_path / "whole" / "checkpoints" / "checkpoint_step_2"
    run_of(2, configure(False, name="on", **settings), tmp_path, resume_from=middle)
    last = "checkpoints/checkpoint_step_4"
    assert files(tmp_path / "on" / last) == files(tmp_path / "whole" / last)


def test_a_full_run_of_one_process_goes_on_sharded_over_two(configure, tmp_path):
    settings = dict(learning_rate=2e-3, save_steps=4, batch_size=6, **SMOOTH)
    settings |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = run(configure(False, name="whole", max_steps=STEPS, **settings))
    start = (
        run(configure(False, name="start", max_steps=4, **settings))
        / "checkpoints"
        / "checkpoint_step_4"
    )
    run_of(2, configure(False, name="on", max_steps=STEPS, **settings), tmp_path, resume_from=start)
    assert_close(weights(whole), weights(tmp_path / "on"))


@pytest.mark.slow
def test_a_lost_process_costs_nothing_but_the_steps_since_the_last_checkpoint(configure, tmp_path):
    settings = dict(max_steps=60, eval_steps=20, save_steps=5, lora_dropout=0.1)
    finish(torchrun("train_lora.py", configure(True, name="calm", **settings), 2, tmp_path))
    config = configure(True, name="killed", **settings)
    flags = ["--resume_from", "auto", "--experiment_name", "killed"]
    process = torchrun("train_lora.py", config, 2, tmp_path, *flags, more=["--max_restarts=3"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint_step_10").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = subprocess.run(
        ["pgrep", "-f", f"{tmp_path}/killed.toml"], capture_output=True, text=True
    ).stdout.split()
    ranks = {}
    for pid in map(int, found):
        environment = open(f"/proc/{pid}/environ").read().split("\0")
        ranks |= {entry: pid for entry in environment if entry.startswith("RANK=")}
    os.kill(ranks["RANK=1"], signal.SIGKILL)
    out = finish(process)
    assert "SIGKILL" in out or "exitcode: -9" in out or "Signal 9" in out
    calm, killed = (load_file(tmp_path / name / LAST) for name in ("calm", "killed"))
    assert calm.keys() == killed.keys() and all(
        torch.equal(calm[name], killed[name]) for name in calm
    )


def test_sharded_weights_compute_in_bfloat16_as_one_process_does(configure, tmp_path):
    settings = dict(dtype="bfloat16", max_steps=2, learning_rate=2e-3, **SMOOTH)
    one = run(configure(False, name="one", batch_size=4, **settings))
    run_of(2, configure(False, name="two", batch_size=2, **settings), tmp_path)
    # bfloat16 rounds to 4e-3, and a layer whose weights are gathered in it also normalises in it.
    torch.testing.assert_close(losses(one), losses(tmp_path / "two"), rtol=2e-2, atol=0)


def test_a_process_without_a_part_of_the_evaluation_computes_in_the_same_type(configure, tmp_path):
    """In another one gloo would end the run, or add up what is none of its numbers."""
    settings = dict(dtype="bfloat16", eval_data=["arithmetic:validation:1"], max_steps=1)
    one = run(configure(False, name="one", batch_size=8, **settings))
    run_of(2, configure(False, name="two", **settings), tmp_path)
    best = [
        json.loads((folder / "logs" / "final_results.json").read_text())["best"]
        for folder in (one, tmp_path / "two")
    ]
    assert best[1]["loss"] == pytest.approx(best[0]["loss"], rel=0.05)  # of states of 8 bits


def test_processes_that_start_in_different_seconds_write_to_one_folder(configure, tmp_path):
    config = configure(False, name="", max_steps=1)
    config.save(tmp_path / "a_run.toml")

    def start_late(config, resume_from):
        time.sleep(1.1 * process_group.rank())
        command = read_command_line(["--config", str(tmp_path / "a_run.toml")], Config(), "", "")
        train.main(command, RawData(command.config))

    run_of(2, config, tmp_path, start=start_late)
    assert (
        len(list(tmp_path.glob("*/checkpoints")))
        == len(list(tmp_path.glob("*/final_artifact")))
        == 1
    )


def test_the_artifact_of_sharded_weights_has_the_chat_template_of_its_training(
    configure, tiny_base, tmp_path
):
    base, chats = tmp_path / "base", tmp_path / "chats.jsonl"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("chat_template*"))
    turns = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    chats.write_text(8 * (json.dumps({"messages": turns}) + "\n"))
    settings = dict(
        base_model=str(base),
        task="lm",
        train_data=[str(chats)],
        eval_data=[str(chats)],
        max_steps=1,
    )
    out = run_of(2, configure(False, **settings), tmp_path)
    assert (
        "using ChatML" in out
        and (tmp_path / "run" / "final_artifact" / "chat_template.jinja").is_file()
    )


def test_a_head_that_the_files_untie_is_sharded_as_one_of_its_own(configure, tiny_base, tmp_path):
    """transformers ties a head by config.json, unless the files hold another one."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    settings = dict(base_model=str(base), task="lm", max_steps=2, eval_steps=1)
    one = run(configure(False, "one", **settings | dict(gradient_accumulation_steps=4)))
    run_of(2, configure(False, "two", **settings), tmp_path)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(one), rtol=1e-4, atol=0)


def test_the_others_wait_for_a_first_process_that_writes_for_long(configure, tmp_path):
    """Longer than the ten minutes, here two seconds, after which a collective gives up."""

    def prepare(rank):
        process_group.TIMEOUT = timedelta(seconds=2)
        if rank == 0:
            save = Task.save
            Task.save = lambda *arguments: (save(*arguments), time.sleep(3))

    config = configure(False, "run", max_steps=2, eval_steps=2, save_steps=2)
    run_of(2, config, tmp_path, prepare=prepare)
    assert (tmp_path / "run/checkpoints/checkpoint_step_2/optimizer.safetensors").is_file()


@pytest.mark.parametrize("limit", [100_000, 400_000], ids=["weights", "optimizer"])
def test_where_the_first_process_cannot_write_all_end_in_one_line(configure, tmp_path, limit):
    def limit_files(rank):
        exit_status.PATIENCE = 0  # nobody ends the others here
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    config = configure(False, name="full", task="lm", max_steps=1)
    out = run_of(2, config, tmp_path, prepare=limit_files, status=4)
    assert out.count("checkpoint_step_1: no room for it; nothing of it is kept") == 2
    assert "Traceback" not in out and not list((tmp_path / "full" / "checkpoints").iterdir())


SHORT_OF_MEMORY = """
import os
import torch
from lora.model.task import Task
forward = Task.forward
def limited(self, batch):
    if os.environ["RANK"] == "1" and batch.input_ids.numel() > 150:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return forward(self, batch)
Task.forward = limited
"""


def test_where_one_process_runs_out_of_memory_all_cut_the_step_anew(configure, tmp_path):
    settings = dict(
        max_steps=3, task="lm", learning_rate=1e-3, batch_size=4, gradient_accumulation_steps=1
    )
    run_of(2, configure(True, name="whole", **settings), tmp_path)
    out = run_of(
        2,
        configure(True, name="short", **settings),
        tmp_path,
        prepare=lambda rank: exec(SHORT_OF_MEMORY, {}),
    )
    assert out.count("out of memory on") >= 1
    torch.testing.assert_close(
        losses(tmp_path / "short"), losses(tmp_path / "whole"), rtol=1e-6, atol=0
    )


def test_where_weights_are_sharded_one_process_out_of_memory_ends_the_run_in_one_line(
    configure, tmp_path
):
    def prepare(rank):
        exec(SHORT_OF_MEMORY, {})
        exit_status.PATIENCE = 0.1

    config = configure(False, task="lm", max_steps=1)
    out = run_of(2, config, tmp_path, prepare=prepare, status=4)
    assert "error: CUDA out of memory. Tried" in out and "--batch_size 1" in out
    assert "Traceback" not in out.split("error: CUDA")[0]


def run_with_status(config, resume_from=""):
    """As the scripts do: the run's folder gets its status files."""
    folder = Path(config.output.output_dir) / config.output.experiment_name
    command = Command(config, folder, str(resume_from), False)
    with one_line_errors(command.status):
        train_lora.main(command, RawData(config))


def test_where_the_first_process_does_not_get_the_folder_the_others_write_nothing_there(
    configure, tmp_path
):
    """As where a run is started again on several machines, and the first still trains there."""
    folder = run(configure(True, max_steps=1))
    status = '{"exit": null}'  # of a run that goes on
    (folder / "status.json").write_text(status)
    with FileLock(folder / "logs" / "lock"):
        out = run_of(
            2,
            configure(True, max_steps=2),
            tmp_path,
            folder / "checkpoints" / "checkpoint_step_1",
            prepare=lambda rank: setattr(exit_status, "PATIENCE", 0),
            status=[2, 4],
            start=run_with_status,
        )
    assert out.count("another process is training there") == 1 and "Traceback" not in out
    assert (folder / "status.json").read_text() == status
    assert not (folder / "error.log").exists()


def test_an_error_that_all_processes_have_is_said_once_however_late_the_first_one_ends(
    configure, tmp_path
):
    def prepare(rank):
        exit_status.PATIENCE = 3 * rank
        Task.forward = fail

    def fail(task, batch):
        raise Stopped("the same everywhere.")

    config = configure(True, max_steps=1)
    out = run_of(2, config, tmp_path, prepare=prepare, status=3, start=run_with_status)
    assert out.count("the same everywhere.") == 1 and "Traceback" not in out


def test_what_is_wrong_is_said_once(configure, tmp_path):
    config = configure(True, name="wrong", base_model=str(tmp_path / "nowhere"))
    process = torchrun("train_lora.py", config, 2, tmp_path)
    out, _ = process.communicate(timeout=180)
    assert process.returncode != 0 and out.count("error: base_model") == 1


@pytest.mark.parametrize(
    "path, lora, found",
    [
        ("data.jsonl", True, "train_data, train_tokens"),
        ("base/config.json", False, "base_config"),
        ("base/model.safetensors", True, "base_model"),
    ],
)
def test_processes_that_read_other_files_end_before_the_run_has_a_folder(
    configure, tiny_base, tmp_path, path, lora, found
):
    """As on machines that have copies of their own."""
    for i in range(2):
        shutil.copytree(tiny_base, tmp_path / f"machine_{i}" / "base")
        data = tmp_path / f"machine_{i}" / "data.jsonl"
        data.write_text(9 * '{"text": "one and two and three"}\n')
    different = tmp_path / "machine_1" / path
    if path.endswith("safetensors"):
        save_file(load_file(different), different, {"format": "pt", "of": "another version"})
    else:
        text = different.read_text().replace("1e-06", "1e-05").replace("three", "four", 1)
        different.write_text(text)

    def prepare(rank):
        os.chdir(tmp_path / f"machine_{rank}")
        exit_status.PATIENCE = 0  # nobody ends the others here

    settings = dict(base_model="base", task="lm", train_data=["data.jsonl"], max_steps=1)
    out = run_of(2, configure(lora, **settings), tmp_path, prepare=prepare, status=2)
    mend = "copy the same files to every machine"
    assert f"error: process 1 has other {found} than process 0; {mend}." in out
    assert "Traceback" not in out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("key, value", [("dtype", "float16"), ("optimizer", "adamw_8bit")])
def test_what_is_not_proven_on_sharded_weights_is_refused(
    configure, tmp_path, monkeypatch, key, value
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    # It is refused before the other one is needed
    monkeypatch.setattr(process_group, "join", lambda device: None)
    with pytest.raises(UserError, match=f"{key} {value}: full fine-tuning on several processes"):
        run(configure(False, **{key: value}))
    assert not (tmp_path / "run").exists()


def test_rows_are_dealt_so_that_the_processes_have_as_much_to_do():
    lengths = np.random.default_rng(0).integers(20, 500, 64)
    for world in (1, 2, 3, 8):
        owner = shard_rows(lengths, world)
        loads = np.bincount(owner, lengths, world)
        assert loads.max() <= 1.05 * loads.mean() and set(owner) == set(range(world))


def test_every_process_of_sharded_weights_knows_the_longest_example(configure, tmp_path):
    run_of(2, configure(False, task="lm", max_length="auto", max_steps=1), tmp_path)
    saved = json.loads((tmp_path / "run" / "logs" / "config.json").read_text())
    assert saved["data"]["max_length"] == 512  # the base's positions
