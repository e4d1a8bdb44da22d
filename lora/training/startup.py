"""What happens around a task's loading, before its first step: what a run prints and records."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
import os
from typing import Any

import torch

from lora.common.base_model_files import describe_base, locate_base
from lora.common.errors import UserError
from lora.common.printable_text import printable
from lora.common.toml_json import read_file
from lora.config.command_line import Command
from lora.config.resume import EVALUATION_KEYS, INTERVAL_KEYS, PLACE_KEYS
from lora.config.schema import Config, LoraConfig
from lora.data.assistant_mask import answers_follow_prompt
from lora.data.counts import describe_data
from lora.data.raw_data import RawData, digest
from lora.distributed import process_group
from lora.distributed.collectives import broadcast_from_rank_zero, gather_objects
from lora.distributed.process_group import world_size
from lora.layer import LoRALayer, lora_layers
from lora.model.attention import why_without_flash
from lora.model.device import choose_device, choose_dtype, set_determinism
from lora.model.run import Run
from lora.model.task import Task
from lora.model.tokenizer_file import base_file
from lora.model.weights import model_files, weight_files
from lora.quantization import count_parameters, share_4bit
from lora.target_modules import decoder_layers, stacked_weights
from lora.training import base_integrity
from lora.training.base_integrity import BaseSums, only_adapters_train, warn_other_base
from lora.training.best_checkpoints import recover
from lora.training.log import Log
from lora.training.schedule import total_steps, warmup_steps

MANY_EPOCHS = 20


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
    with closing(Log(run_dir, config, max_steps, state, command.continues)) as log:
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


def describe_run(run: Run, data_facts: dict, checkpointing: bool) -> str:
    """Describe what a run is about to do. `data_facts` is what `load_or_tokenise` returned."""
    task, config = run.task, run.config
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    total = count_parameters(task)
    dtype = str(run.dtype).removeprefix("torch.")
    train_facts, eval_facts = data_facts["train"], data_facts["eval"]
    base = describe_base(config.model.base_model)
    lines = [
        f"base model: {base} on {run.device}, computing in {dtype}",
        f"trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})",
    ]
    if config.lora and not task.frozen:
        lines.append(describe_lora(task, config.lora))
    if config.lora:
        lines.append(only_adapters_train(task.model, config.lora.modules_to_save, task.head))
    lines.append(describe_data("train", train_facts))
    lines.append(describe_data("eval", eval_facts))
    if task.frozen:
        count = train_facts["targets"] + eval_facts["targets"]
        size = 4e-9 * count * task.head.layers[0].in_features
        states = f"the base's hidden states at up to {count} targets are computed once"
        lines.append(f"linear probing: {states} and kept in {size:.3f} GB of main memory")
    lines += data_warnings(run, data_facts)
    if world_size() > 1:
        held = "a part of every layer"
        if config.lora:
            held = "the whole model, and their gradients are summed once a step"
        lines.append(f"{world_size()} processes: each holds {held}")
    if run.device.type == "cuda" and task.packed:
        reason = why_without_flash(task.model, run.device, run.dtype)
        if reason:
            lines.append(f"attention without FlashAttention, which is slower: {reason}")
    if not task.packed:
        reason = "this model's attention does not support packing"
        lines.append(f"{reason}: sequences are sorted by length and padded")
    training = config.training
    if training.optimizer == "paged_adamw_8bit" and run.device.type == "cpu":
        reason = "on the CPU there is nothing to page to"
        lines.append(f"optimizer paged_adamw_8bit: {reason}; it is adamw_8bit here")
    if training.deterministic and run.device.type == "cuda":
        what = "a resumed run gives the same bits"
        lines.append(f"deterministic: {what}; sums in a fixed order make its steps slower")
    if training.gradient_checkpointing == "auto" and run.device.type == "cuda":
        reason = "off: the largest step fits without it, or cannot be counted"
        if checkpointing:
            reason = "on: the GPU could not hold a step without it"
        lines.append(f"gradient checkpointing (auto) is {reason}")
    lines += describe_length(run, train_facts)
    return "\n".join(lines)


def data_warnings(run: Run, data_facts: dict) -> list[str]:
    """Return a warning for each property of the data that makes the run worse than it could be."""
    task, config = run.task, run.config
    lines = []
    if data_facts["repeated"]:
        repeated = f"{data_facts['repeated']} training examples"
        lines.append(f"warning: {repeated} repeat an earlier one word for word")
    if data_facts["overlap"]:
        overlap = f"{data_facts['overlap']} prompts or texts"
        lines.append(f"warning: {overlap} are both in the training and in the held-out data")
    if data_facts["chats"] and not answers_follow_prompt(task.tokenizer):
        where = "answers do not follow the chat template's generation prompt"
        lines.append(f"warning: {where}: they are generated elsewhere than they are trained")
    rope = getattr(task.model.config.get_text_config(), "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and config.data.max_length > original:
        what = f"a sequence of more than {original} tokens changes the positions of those beside it"
        lines.append(f"warning: longrope: {what}; add --max_length {original}")
    return lines


def describe_length(run: Run, train_facts: dict) -> list[str]:
    """Return lines about the size of a step, and the number of steps and epochs."""
    data, training = run.data, run.config.training
    lines = []
    if training.max_steps and training.num_train_epochs:
        lines.append("max_steps and num_train_epochs given: the run ends at whichever comes first")
    examples = data.examples_per_step
    tokens = train_facts["tokens"] / train_facts["rows"] * examples
    targets = train_facts["targets"] / train_facts["rows"] * examples
    a_step = f"{examples} examples ({tokens:.0f} tokens, {targets:.0f} targets)"
    max_steps = total_steps(training, data.steps_per_epoch)
    epochs = max_steps / data.steps_per_epoch
    an_epoch = f"{data.steps_per_epoch:.1f} steps"
    lines.append(f"{max_steps} steps of {a_step}: {epochs:.3g} epochs of {an_epoch}")
    if data.steps_per_epoch < 1:
        lines.append(f"one step is {1 / data.steps_per_epoch:.3g} passes over the training data")
    if epochs > MANY_EPOCHS:
        advice = "most of the time is wasted, or the data are learned by heart"
        lines.append(f"warning: {epochs:.0f} epochs over the same data: {advice}")
    warmup = warmup_steps(max_steps, training)
    if warmup >= max_steps:
        lines.append(f"warning: {warmup} warmup steps: learning_rate is never reached")
    return lines


def describe_lora(task: Task, lora: LoraConfig) -> str:
    layers = len(lora_layers(task.model))
    text = f"LoRA: rank {lora.lora_r}, alpha {lora.lora_alpha:g}, on {layers} layers"
    if lora.modules_to_save:
        text += f"; trained in full: {' '.join(lora.modules_to_save)}"
    text += "; the base is frozen"
    if lora.load_in_4bit:
        text += f", {share_4bit(task.model):.0%} of it in 4 bits ({lora.bnb_4bit_quant_type})"
    if lora.lora_dropout and isinstance(task.model.get_output_embeddings(), LoRALayer):
        text += "\nwarning: lora_dropout is not applied to the output layer"
    stacked = stacked_weights(task.model)
    if "all-linear" in lora.target_modules and stacked:
        names = ", ".join(sorted({name.partition(".")[2] for name in stacked}))
        reached = 1 - sum(stacked.values()) / count_parameters(decoder_layers(task.model))
        left_out = "experts that are one tensor stay as they are"
        share = f"LoRA reaches {reached:.0%} of the layers' weights"
        text += f"\nwarning: {left_out} ({names}): {share}"
    return text


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
