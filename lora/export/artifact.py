"""final_artifact/: what a finished run hands on, whole or absent, with a record of what it was made
of.

the weights and the tokenizer   Task.save_artifact
training_config.toml            with whole paths, so that eval.py and merge.py find base and data from any folder
training_metrics.json           the best step and the last
metadata.json                   base, data, versions, hardware: `metadata` below
README.md                       lora/export/model_card.py
checksums.json                  of all of these; lora/common/checksums.py
"""

import copy
from importlib.metadata import version
import json
import os
from pathlib import Path
import platform
import re
import subprocess
import sys
import time

import torch

from lora.common.atomic_files import atomic_folder, write_text_atomically
from lora.common.base_files import locate_base
from lora.common.checksums import find_damage, write_checksums
from lora.common.errors import Stopped
from lora.common.paths import ROOT
from lora.distributed.sharding import is_sharded
from lora.export.model_card import model_card
from lora.model.load import load_task
from lora.training.best_checkpoints import best_first, saved_states
from lora.training.checkpoint import trainable_parameters
from lora.training.log import peak_memory

ARTIFACT_VERSION = 1


def write_final_artifact(run, log, base_files, data_files, started):
    """Write the results and the artifact of a run that has ended: the weights of its best
    checkpoint. Raises Stopped.
    """
    task, config, device = run.task, run.config, run.device
    states = saved_states(log.run_dir / "checkpoints")
    best, last = (
        next(
            (s for s in best_first(states) if not find_damage(s["path"], "trainer_state.json")),
            None,
        ),
        states[-1],
    )
    if not best:
        raise Stopped(
            f"{log.run_dir}: no checkpoint has a finite validation loss; try a lower --learning_rate."
        )
    if any(map(is_sharded, task.parameters())):
        tokenizer, task = task.tokenizer, load_task(config, torch.float32)
        task.tokenizer = tokenizer  # it may have been given a chat template
    task.load(best["path"])
    results = {
        name: {"step": state["step"], **state["val"]}
        for name, state in (("best", best), ("last", last))
    }
    results |= {
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_gb": round(peak_memory(device) / 1e9, 3),
    }
    write_text_atomically(
        log.run_dir / "logs" / "final_results.json", json.dumps(results, indent=2) + "\n"
    )
    write(log.run_dir / "final_artifact", task, config, results, base_files, data_files)
    shown = ", ".join(
        f"{name} {value:.4f}"
        for name, value in best["val"].items()
        if value is not None and "/" not in name
    )
    log.say(
        f"best: step {best['step']}, {shown}; {results['seconds']} s; weights in {log.run_dir / 'final_artifact'}"
    )
    return results


def write(folder, task, config, results, base_files, data_files):
    """Write the artifact of a run whose base was found unchanged; the hashes are those of before
    its training.
    """
    with atomic_folder(folder) as temporary:
        task.save_artifact(temporary)
        config = with_whole_paths(config)
        config.save(temporary / "training_config.toml")
        facts = metadata(task, config, results, base_files, data_files)
        (temporary / "training_metrics.json").write_text(json.dumps(results, indent=2) + "\n")
        (temporary / "metadata.json").write_text(json.dumps(facts, indent=2) + "\n")
        (temporary / "README.md").write_text(model_card(task, config, facts), encoding="utf-8")
        write_checksums(temporary)


def with_whole_paths(config):
    config = copy.deepcopy(config)
    if config.model.base_model != "embedded":
        source, local = locate_base(config.model.base_model)
        config.model.base_model = os.path.abspath(source) if local else source
    whole = lambda path: os.path.abspath(path) if Path(path).is_file() else path
    for key in ("train_data", "eval_data"):
        setattr(config.data, key, [*map(whole, getattr(config.data, key))])
    for key in ("prm800k_path", "eqasc_path", "reveal_path"):
        setattr(config.data, key, whole(getattr(config.data, key)))
    return config


def metadata(task, config, results, base_files, data_files):
    return {
        "artifact_version": ARTIFACT_VERSION,
        "task": config.model.task,
        "method": config.method,
        "base_model": config.model.base_model,
        "base_files": base_files,
        # A run that changed it has no artifact
        "base_unchanged": True if base_files or config.lora else None,
        **data_files,
        "best": results["best"],
        "seed": config.training.seed,
        "seconds": results["seconds"],
        "trainable_parameters": sum(p.numel() for p in trainable_parameters(task).values()),
        "parameters": sum(p.numel() for p in task.parameters()),
        "versions": versions(),
        "git_commit": git_commit(),
        "hardware": hardware(next(task.parameters()).device),
    }


def versions():
    names = [
        name
        for name in ("torch", "transformers", "safetensors", "tokenizers", "bitsandbytes")
        if name in sys.modules
    ]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_commit():
    """The commit of this code, with "-dirty" behind it where files differ from it; None outside of
    a checkout.
    """
    if not (ROOT / ".git").exists():  # git would go on to look for a checkout around this folder
        return None
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device):
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def cpu_name():
    info = Path("/proc/cpuinfo")
    named = (
        re.search("^model name.*: (.+)$", info.read_text(), re.MULTILINE)
        if os.access(info, os.R_OK)
        else None
    )
    return named[1] if named else platform.processor() or platform.machine()
