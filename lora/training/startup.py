"""From the command to the first step: loading, what a resumed run must share, the run's folder."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
import os
import signal
from typing import Any

import torch

from lora.common.base_model_files import describe_base, locate_base
from lora.common.errors import UserError
from lora.common.printable_text import printable
from lora.common.signals import end_on_sigterm, handling
from lora.common.toml_json import read_file
from lora.config.command_line import Command
from lora.config.resume import EVALUATION_KEYS, INTERVAL_KEYS, PLACE_KEYS
from lora.config.schema import Config
from lora.data.raw_data import RawData, digest
from lora.distributed import process_group
from lora.distributed.collectives import broadcast_from_rank_zero, gather_objects, wait_for_all
from lora.distributed.process_group import world_size
from lora.model.device import choose_device, choose_dtype, set_determinism
from lora.model.run import Run
from lora.model.tokenizer_file import base_file
from lora.model.weights import model_files, weight_files
from lora.training import base_integrity
from lora.training.base_integrity import BaseSums, warn_other_base
from lora.training.best_checkpoints import recover
from lora.training.log import Log
from lora.training.schedule import total_steps


def start_loading(
    command: Command,
) -> tuple[torch.device, torch.dtype, Future[dict[str, str]] | None]:
    """Join the run's processes, and say that the base is being loaded.

    Returns:
        The device to load it to, the dtype of the computation, and the hashes of its weight files,
        which the first process makes meanwhile (None where none are needed).
    """
    config, model = command.config, command.config.model
    device = choose_device(config.training.device)
    set_determinism(config.training.deterministic, device)
    process_group.join(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of a run before it in this process
    dtype = choose_dtype(config, device)
    if command.dry_run:
        device = torch.device("cpu")  # what it counts may not fit on the device
    if process_group.rank() > 0:
        return device, dtype, None
    size = sum(path.stat().st_size for path in weight_files(model))
    base = describe_base(model.base_model)
    print(f"loading base model {printable(base)} ({size / 1e9:.1f} GB) ...", flush=True)
    if command.check or command.dry_run:
        return device, dtype, None
    return device, dtype, ThreadPoolExecutor(1).submit(base_integrity.file_sums, model)


def input_facts(run: Run, raw_data: RawData, data_facts: dict) -> dict[str, Any]:
    """Return hashes of what this process reads beside weights: data, their tokens, config.json.

    Raises UserError, on every process, where one reads other data or another base than the first.
    """
    model = run.config.model
    config_file = base_file(locate_base(model.base_model)[0], "config.json")
    assert config_file is not None, "the base has been loaded"
    facts: dict[str, Any] = dict(raw_data.files)
    settings = read_file(config_file)
    for name in ("transformers_version", "_name_or_path"):  # who wrote it, and from where
        settings.pop(name, None)
    facts["base_config"] = {"config.json": digest(sorted(settings.items()))}
    for part in ("train", "eval"):
        arrays = [sha256 for name, sha256 in data_facts["sha256"].items() if name.startswith(part)]
        facts[f"{part}_tokens"] = digest(arrays)[:16]

    compared = dict(facts)
    if run.config.lora:  # a sharded base is read by the first process alone
        files = [] if model.init_from == "scratch" else model_files(model.base_model)
        compared["base_model"] = {path.name: path.stat().st_size for path in files}
    first, *others = gather_objects(compared)
    for i, other in enumerate(others, 1):
        different = [name for name in first if other[name] != first[name]]
        if different:
            mend = "copy the same files to every machine"
            raise UserError(f"process {i} has other {', '.join(different)} than process 0; {mend}.")
    return facts


@contextmanager
def begin(
    run: Run,
    command: Command,
    inputs: dict[str, Any],
    state: dict | None,
    hashing: Future[dict[str, str]] | None,
) -> Iterator[tuple[Log, BaseSums | None, dict]]:
    """Make the folder of a run, and log what it continues or differs from.

    Args:
        inputs: what `input_facts` returned.
        state: of the checkpoint that is resumed.
        hashing: what `start_loading` returned.

    Yields:
        The log, closed at the end; the hashes of the base (None but on rank 0); and the facts that
        go into the checkpoints, which must be the same in a run that resumes one (UserError).
    """
    config = run.config
    base, base_files = None, None
    if process_group.rank() == 0:
        files = hashing.result() if hashing else None
        base = base_integrity.measure_base(run.task, config, files)
        base_files = base.files
        command.require_same({"base_model": base_files, **inputs, "dtype": str(run.dtype)})
    # The number of threads decides the order of sums, and so the last bits of a resumed run.
    # torchrun sets OMP_NUM_THREADS itself; in one process it is what the user asked for.
    is_chosen = "OMP_NUM_THREADS" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ
    if state and state["facts"]["place"]["processes"] == world_size() and not is_chosen:
        torch.set_num_threads(state["facts"]["place"]["threads"])
    place = describe_place(run.device)
    run_facts = {"base_model": base_files, "dtype": str(run.dtype), "place": place}
    # The name of a run that was given none holds the second at which its process read the clock.
    run_dir = broadcast_from_rank_zero(str, command.run_dir)
    max_steps = total_steps(config.training, run.data.steps_per_epoch)
    with (
        handling([signal.SIGTERM], end_on_sigterm),  # also while a tracker ends with the log
        Log(run_dir, config, max_steps, state, command.continues) as log,
    ):
        wait_for_all()  # the folder may be another run's, and the first process alone finds out
        command.status.run_dir = log.run_dir
        if base is not None:
            command.status.write(None)
            base_integrity.record_base(log.run_dir, config, base)
            lines = recover(log.run_dir, state["step"] if state else 0)
            model = config.model
            if model.init_from:
                lines.append(warn_other_base(model.init_from, model.base_model, base_files))
            if state:
                lines.append(describe_moved(state["facts"]["place"], place))
                lines.append(describe_changed_keys(state["config"], config))
            for line in lines:
                if line:
                    log.say(line)
        yield log, base, {**inputs, **run_facts}


def choose_checkpointing(run: Run, state: dict | None) -> bool:
    """Return whether layers are computed again in the backward pass, to keep less of them.

    "auto" is yes where a GPU could not hold the run without it. A resumed run does as before.
    """
    setting = run.config.training.gradient_checkpointing
    if setting != "auto":
        return setting
    if state:  # checkpoints from before "auto" hold true or false in their configuration
        before = state["config"]["training"]["gradient_checkpointing"]
        return state["facts"].get("gradient_checkpointing", before)
    if run.device.type != "cuda":
        return False
    from lora.training.memory_plan import needs_checkpointing

    return needs_checkpointing(run, torch.cuda.get_device_properties(run.device).total_memory)


def describe_place(device: torch.device) -> dict[str, str | int]:
    """Return what decides the bits of sums: device, processes, threads, torch and instructions."""
    place = {
        "device": device.type,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        place["gpu"] = torch.cuda.get_device_name(device)
    return place


def describe_changed_keys(before: dict, config: Config) -> str:
    """Name the changed keys of a resumed run that can change its numbers, or return ""."""
    changed = []
    for title, table in config.as_dict().items():
        for name, value in table.items():
            old = before.get(title, {}).get(name, value)  # older ones do not have all keys
            if old != value and name not in (*INTERVAL_KEYS, *PLACE_KEYS, *EVALUATION_KEYS):
                changed.append(f"{name} {old} -> {value}")
    return f"changed on resume: {', '.join(changed)}" if changed else ""


def describe_moved(before: dict, now: dict) -> str:
    """Say that a run resumes in another place than the checkpoint's; "" where it is the same."""
    # A checkpoint of the CPU has no "gpu", nor have older ones.
    differing = [name for name in now if now[name] != before.get(name, now[name])]
    if not differing:
        return ""
    changed = [f"{name} {before[name]} -> {now[name]}" for name in differing]
    what = "steps have the same examples and targets, but results differ by rounding"
    if "processes" in differing:
        what += ", and with dropout by its random numbers"
    return f"resumed with {', '.join(changed)}: {what}"
