"""final_artifact/: what a finished run hands on, complete or absent, and what it was made of.

the weights and the tokenizer   Task.save_artifact, at the top
training_config.toml            with absolute paths, so that eval.py and merge.py find base and data
                                from any folder
training_metrics.json           the best step and the last
metadata.json                   base, data, versions, hardware: `metadata` below
README.md                       lora/export/model_card.py
checksums.json                  of all of these; lora/common/checksums.py
"""

from collections.abc import Iterable
import copy
from importlib.metadata import version
import json
import math
import os
from pathlib import Path
import platform
import re
import shlex
import subprocess
import sys

import torch

from lora.common.atomic_files import atomic_folder, write_text_atomically
from lora.common.base_model_files import locate_base
from lora.common.checkpoint_folders import FORMAT_VERSION
from lora.common.checksums import CHECKSUMS_FILE, file_sha256, find_damage, write_checksums
from lora.common.errors import Stopped, UserError
from lora.common.operating_system import physical_memory_bytes
from lora.common.paths import ROOT, script_call
from lora.common.toml_json import to_json
from lora.config.schema import Config
from lora.config.set_keys import saved_config
from lora.data.file_kinds import HUB
from lora.data.files import local_files
from lora.distributed.sharding import any_sharded
from lora.evaluation.stop_tokens import set_stop_tokens
from lora.export.model_card import model_card
from lora.model.load import load_task
from lora.model.run import Run
from lora.model.task import Task
from lora.quantization import count_parameters
from lora.training.best_checkpoints import best_first, saved_states
from lora.training.checkpoint import trainable_parameters
from lora.training.log import Log
from lora.training.schedule import stops_early

FEW_STEPS = 50  # of a run, after which its loss often still falls
LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "bitsandbytes")


def finished_results(run_dir: Path, config: Config, state: dict, max_steps: int) -> dict | None:
    """Return the results of a run that has ended at a checkpoint's `state` with its artifact.

    Raises UserError where its artifact has another artifact_version than `config`.
    """
    folder = run_dir / "final_artifact"
    if not folder.is_dir() or find_damage(folder, "metadata.json"):
        return None
    from lora.common.saved_files import RESULTS, read_table  # where a run is started again

    results = read_table(folder / "training_metrics.json", RESULTS)
    has_stopped = stops_early(config.training, state["without_best"])
    is_of_state = results["last"]["step"] == state["step"]
    has_ended = is_of_state and (state["step"] >= max_steps or has_stopped)
    # Not from metadata.json, where version 1 has the number of its format under this name.
    saved = saved_config(folder).output.artifact_version
    wanted = config.output.artifact_version
    if has_ended and saved != wanted:
        problem = f"artifact_version {wanted!r}, and it is complete as {saved!r}"
        raise UserError(f"{run_dir}: {problem}; take another --experiment_name.")
    return results if has_ended else None


def write_final_artifact(run: Run, log: Log, base_files: dict, data_files: dict) -> dict:
    """Write the results and the artifact, with the best checkpoint's weights; return the results.

    Args:
        run: a run that has ended, and whose base was found unchanged.
        base_files: sha256 of the base's weight files.
        data_files: sha256 of the data's files, as `RawData.files`.
    """
    states = saved_states(log.run_dir / "checkpoints")
    best = best_undamaged(states, log)
    if best is None:
        found = "no checkpoint has a finite validation loss"
        raise Stopped(f"{log.run_dir}: {found}; try a lower --learning_rate.")
    task = run.task
    if any_sharded(task.parameters()):
        task = load_task(run.config, torch.float32)
        task.tokenizer = run.task.tokenizer  # it may have been given a chat template
    task.load(best["path"])
    last, totals = states[-1], log.totals(run.device)
    peak = totals["peak_memory"]
    results = {
        "best": {"step": best["step"], **best["val"]},
        "last": {"step": last["step"], **last["val"]},
        "seconds": totals["seconds"],
        "tokens": totals["tokens"],
        "peak_memory_gb": peak and round(peak / 1e9, 3),
    }
    results_text = to_json(results)
    write_text_atomically(log.run_dir / "logs" / "final_results.json", results_text)

    folder = log.run_dir / "final_artifact"
    config = with_absolute_paths(run.config)
    facts = metadata(task, config, results, base_files, data_files)
    facts["hardware"] = hardware(run.device)
    set_stop_tokens(task.model, task.tokenizer)
    with atomic_folder(folder) as temporary:
        task.save_artifact(temporary)
        config.save(temporary / "training_config.toml")
        (temporary / "training_metrics.json").write_text(results_text, encoding="utf-8")
        (temporary / "metadata.json").write_text(to_json(facts), encoding="utf-8")
        (temporary / "README.md").write_text(model_card(task, config, facts), encoding="utf-8")
        write_checksums(temporary)

    metrics = [f"step {best['step']}"]
    for name, value in best["val"].items():
        if value is not None and "/" not in name:  # "/": of one of several held-out sets
            metrics.append(f"{name} {value:.4f}")
    log.say(f"best: {', '.join(metrics)}; {results['seconds']} s; weights in {folder}")
    if config.method == "full" and task.base_dtype != torch.float32:
        dtype = str(task.base_dtype).removeprefix("torch.")
        log.say(
            f"note: the artifact is rounded to the base's {dtype}; these numbers are of float32"
        )
    log_doubts(best, last["step"], log)
    log.say(f"sha256 of its {CHECKSUMS_FILE}: {file_sha256(folder / CHECKSUMS_FILE)}")
    log.say(next_commands(folder, config))
    return results


def log_doubts(best: dict, last_step: int, log: Log) -> None:
    """Say where a model may have learned nothing, or too little."""
    more = "more epochs or a higher --learning_rate may help"
    untrained = loss_before_training(log.run_dir)
    r2 = best["val"].get("r2")  # None: of a language model, or of labels that are all equal
    if untrained < best["val"]["loss"]:
        before = f"its value before training ({untrained:.4f}); try a lower --learning_rate"
        log.say(f"warning: the validation loss never fell below {before}")
    elif r2 is not None and r2 <= 0:
        same = "no better than if every step had the mean label as its score"
        log.say(f"warning: r2 is {r2:.4f}, {same}; {more}")
    elif best["step"] == last_step and last_step < FEW_STEPS:
        log.say(f"note: the loss was lowest after the last of only {last_step} steps; {more}")


def loss_before_training(run_dir: Path) -> float:
    """Return the validation loss at step 0; infinite where there is none.

    A run that was resumed in a folder of its own has none, and perhaps no metrics at all.
    """
    with open(run_dir / "logs" / "train_metrics.jsonl", encoding="utf-8") as file:
        line = file.readline()
    if not line:
        return math.inf
    first = json.loads(line)
    is_evaluated = first["step"] == 0 and first["val/loss"] is not None
    return first["val/loss"] if is_evaluated else math.inf


def next_commands(folder: Path, config: Config) -> str:
    """Return the calls that try an artifact, and merge its adapter."""
    prompt = "'A question'" if config.model.task == "lm" else r"$'A problem\nA step\nA step'"
    artifact = shlex.quote(folder.as_posix())
    call = shlex.join(script_call("eval.py"))
    lines = [f"try it:   {call} --checkpoint {artifact} --prompt {prompt}"]
    # Random weights are in no folder, and only whole models are merged.
    is_merged = config.model.init_from != "scratch" and not config.model.score_layer
    if config.lora and is_merged:
        call = shlex.join(script_call("merge.py"))
        lines.append(f"merge it: {call} --adapter {artifact} --output merged")
    return "\n".join(lines)


def best_undamaged(states: list[dict], log: Log) -> dict | None:
    for state in best_first(states):
        damage = find_damage(state["path"], "trainer_state.json")
        if not damage:
            return state
        log.say(f"warning: {state['path']}: damaged ({damage}); the next best is taken")
    return None


def with_absolute_paths(config: Config) -> Config:
    config = copy.deepcopy(config)
    model, data = config.model, config.data
    if model.base_model != "embedded":
        source, is_folder = locate_base(model.base_model)
        model.base_model = os.path.abspath(source) if is_folder else source
    if model.init_from != "scratch":
        model.init_from = absolute_if_file(model.init_from)
    data.train_data = [absolute_if_file(path) for path in data.train_data]
    data.eval_data = [absolute_if_file(path) for path in data.eval_data]
    for key in ("prm800k_path", "eqasc_path", "reveal_path"):
        setattr(data, key, absolute_if_file(getattr(data, key)))
    return config


def absolute_if_file(path: str) -> str:
    """Return the absolute path of a file, a folder or a glob, and other paths as they are."""
    is_local = path and not path.startswith((HUB, "arithmetic:"))
    return os.path.abspath(path) if is_local else path


def hub_revisions(paths: Iterable[str]) -> dict[str, str]:
    """Return {path: commit} of those of the data's paths that are of the Hub."""
    commits = {}
    for path in paths:
        if path.startswith(HUB):
            in_cache = next(iter(local_files(path).values())).parts
            commits[path] = in_cache[in_cache.index("snapshots") + 1]
    return commits


def metadata(task: Task, config: Config, results: dict, base_files: dict, data_files: dict) -> dict:
    versions = {name: version(name) for name in LIBRARIES if name in sys.modules}
    return {
        "format_version": FORMAT_VERSION,
        "artifact_version": config.output.artifact_version or None,
        "task": config.model.task,
        "method": config.method,
        "base_model": config.model.base_model,
        "base_files": base_files,
        # A run whose base has changed stops before this; None: there was nothing to compare.
        "base_unchanged": True if base_files or config.lora else None,
        **data_files,
        "data_revisions": hub_revisions(data_files["train_data"] | data_files["eval_data"]),
        "best": results["best"],
        "seed": config.training.seed,
        "seconds": results["seconds"],
        "trainable_parameters": sum(p.numel() for p in trainable_parameters(task).values()),
        "parameters": count_parameters(task),
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the commit of this code, with "-dirty" where files differ; None without a checkout."""
    if not (ROOT / ".git").exists():  # git would go on to look for a checkout around this folder
        return None
    options = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(ROOT), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: torch.device) -> dict:
    memory = physical_memory_bytes()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gb": memory and round(memory / 1e9, 1),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if os.access(info, os.R_OK):
        text = info.read_text(encoding="utf-8")
        model_name = re.search("^model name.*: (.+)$", text, re.MULTILINE)
        if model_name:
            return model_name[1]
    return platform.processor() or platform.machine()
