"""What happens between a loaded task and its first step: what the run prints and records."""

import torch

from lora.config.command_line import Command
from lora.config.schema import LoraConfig
from lora.data.raw_data import RawData
from lora.data.summary import describe_data
from lora.distributed import process_group
from lora.distributed.collectives import broadcast_from_rank_zero
from lora.distributed.process_group import world_size
from lora.layer import lora_layers
from lora.model.run import Run
from lora.model.task import Task
from lora.quantization import share_4bit
from lora.training.base_integrity import (
    BaseSums,
    measure_base,
    only_adapters_train,
    record_base,
    warn_other_base,
)
from lora.training.best_checkpoints import recover
from lora.training.log import Log
from lora.training.schedule import total_steps


def begin(
    run: Run, command: Command, raw_data: RawData, state: dict | None, description: str
) -> tuple[Log, BaseSums | None, dict]:
    """Make the folder of a run, and log what it is about to do.

    Args:
        run: what is about to be trained.
        command: names the folder and the checkpoint that is resumed.
        raw_data: its files' hashes are recorded.
        state: of the checkpoint that is resumed, or None.
        description: what `describe_run` returned.

    Returns:
        The log; the hashes of the base (None but on rank 0); and the facts that go into the
        checkpoints, which must be the same in a run that resumes one (UserError).
    """
    config = run.config
    base = None
    if process_group.rank() == 0:
        base = measure_base(run.task, config)
        command.require_same({"base_model": base.files, "dtype": str(run.dtype)})
    keep_number_of_threads(state)
    place = describe_place(run.device)
    facts = {
        **raw_data.files,
        "base_model": base and base.files,
        "dtype": str(run.dtype),
        "place": place,
    }
    # The name of a run that was given none holds the second at which its process read the clock.
    run_dir = broadcast_from_rank_zero(str, command.run_dir)
    log = Log(run_dir, config, state["step"] if state else 0, command.continues)
    command.status.run_dir = log.run_dir
    if base is not None:
        command.status.write(None)
        record_base(log.run_dir, config, base)
        for line in recover(log.run_dir):
            log.say(line)
        warning = warn_other_base(config.model.init_from, config.model.base_model, base.files)
        moved = describe_moved(state["facts"]["place"], place) if state else ""
        for line in (warning, moved):
            if line:
                log.say(line)
    log.say(f"{description}; in {log.run_dir}")
    return log, base, facts


def describe_run(run: Run, data_facts: dict) -> str:
    """Describe what a run is about to do. `data_facts` is what `load_or_tokenise` returned."""
    task, config, data = run.task, run.config, run.data
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    total = sum(p.numel() for p in task.parameters())
    dtype = str(run.dtype).removeprefix("torch.")
    train_facts, eval_facts = data_facts["train"], data_facts["eval"]
    lines = [
        f"base: {config.model.base_model} on {run.device}, computing in {dtype}",
        f"trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})",
    ]
    if config.lora and not task.frozen:
        lines.append(describe_lora(task, config.lora))
    if config.lora:
        lines.append(only_adapters_train(task, config.lora.modules_to_save))
    lines.append(describe_data("train", train_facts))
    lines.append(describe_data("eval", eval_facts))
    if task.frozen:
        count = train_facts["targets"] + eval_facts["targets"]
        size = 4e-9 * count * task.head.layers[0].in_features
        kept = f"its hidden states at up to {count} targets are kept"
        lines.append(f"the base reads every row once: {kept}, in {size:.3f} GB of main memory")
    repeated, overlap = data_facts["repeated"], data_facts["overlap"]
    if repeated:
        lines.append(f"warning: {repeated} training examples are repeated word for word")
    if overlap:
        both = "are in the training data and in the held-out data"
        lines.append(f"warning: {overlap} prompts or texts {both}")
    if world_size() > 1:
        held = "a part of every layer"
        if config.lora:
            held = "the model, and they sum their gradients once a step"
        lines.append(f"{world_size()} processes: each holds {held}")
    if not task.packed:
        reason = "this model's attention cannot be told where documents end"
        lines.append(f"{reason}: rows are sorted by length and padded")
    if config.training.max_steps and config.training.num_train_epochs:
        lines.append("max_steps and num_train_epochs are both given: the smaller ends the run")
    examples = data.examples_per_step
    tokens = train_facts["tokens"] / train_facts["rows"] * examples
    targets = train_facts["targets"] / train_facts["rows"] * examples
    a_step = f"{examples} examples ({tokens:.0f} tokens, {targets:.0f} targets)"
    max_steps = total_steps(config.training, data.steps_per_epoch)
    lines.append(f"{max_steps} steps of {a_step}, {data.steps_per_epoch:.1f} to an epoch")
    return "\n".join(lines)


def describe_lora(task: Task, lora: LoraConfig) -> str:
    """Describe what is trained in the place of the base."""
    layers = len(lora_layers(task.model))
    text = f"LoRA: rank {lora.lora_r}, alpha {lora.lora_alpha:g}, over {layers} linear layers"
    if lora.modules_to_save:
        text += f", and {' '.join(lora.modules_to_save)} whole"
    text += "; the base is frozen"
    if lora.load_in_4bit:
        share = share_4bit(task.model)
        text += f", {share:.0%} of it in 4 bits ({lora.bnb_4bit_quant_type})"
    return text


def keep_number_of_threads(state: dict | None) -> None:
    """Use as many threads as the checkpoint's run had, if it had as many processes.

    The number of threads decides the order of sums, and so the last bits of a resumed run.
    """
    if state and state["facts"]["place"]["processes"] == world_size():
        torch.set_num_threads(state["facts"]["place"]["threads"])


def describe_place(device: torch.device) -> dict[str, str | int]:
    """Return what decides the bits of sums: device, processes, threads, torch and instructions."""
    return {
        "device": device.type,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def describe_moved(before: dict, now: dict) -> str:
    """Say that a run resumes in another place than the checkpoint's; "" where it is the same."""
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if now[name] != before[name]]
    if not changed:
        return ""
    listed = ", ".join(changed)
    return f"resumed with {listed}: the same examples and targets a step, not the same bits"
