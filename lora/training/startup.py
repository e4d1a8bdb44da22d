"""What happens between a loaded task and its first step: what the run prints and records."""

import torch

from lora.data.summary import describe
from lora.distributed import collectives, process_group
from lora.distributed.process_group import world
from lora.layer import lora_layers
from lora.quantization import share_4bit
from lora.training import base_integrity
from lora.training.best_checkpoints import recover
from lora.training.log import Log


def begin(opening, task, command, source, before, device, dtype):
    """Make the folder of a run and say what it is about to do: (its Log, the base's hashes, facts).
    Raises UserError.

    opening: what `describe_run` gave; before: the state of the checkpoint that the run goes on
    from, or None. The facts (JSON) go into the checkpoints: what a run that goes on from one must
    have in common with this. Of several processes the first has the hashes; the others have None.
    """
    config, first, base = command.config, process_group.rank() == 0, None
    if first:
        base = base_integrity.measure(task, config)
        command.require_same({"base_model": base["files"], "dtype": str(dtype)})
    place = place_of(device, before)
    facts = {
        **source.files,
        "base_model": base and base["files"],
        "dtype": str(dtype),
        "place": place,
    }
    # Of a run that was given no name it holds the second
    run_dir = collectives.of_first(str, command.run_dir)
    log = Log(run_dir, config, before["step"] if before else 0, command.continues)
    if first:
        base_integrity.record(log.run_dir, config, base)
        other = base_integrity.other_base(
            config.model.init_from, config.model.base_model, base["files"]
        )
        for line in filter(None, [*recover(log.run_dir), other, moved(before, place)]):
            log.say(line)
    log.say(f"{opening}; in {log.run_dir}")
    return log, base, facts


def describe_run(task, config, data, facts, total, device, dtype):
    """What a run is about to do. facts: what `tokenised` says of its data; total: its steps."""
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    every = sum(p.numel() for p in task.parameters())
    lines = [
        f"base: {config.model.base_model} on {device}, computing in {str(dtype).removeprefix('torch.')}",
        f"trainable parameters: {trained:,} of {every:,} ({trained / every:.2%})",
    ]
    if config.lora and not task.frozen:
        lines += [describe_lora(task, config.lora)]
    if config.lora:
        lines += [base_integrity.only_adapters_train(task, config.lora.modules_to_save)]
    lines += [describe("train", facts["train"]), describe("eval", facts["eval"])]
    if task.frozen:
        count, width = (
            facts["train"]["targets"] + facts["eval"]["targets"],
            task.head.layers[0].in_features,
        )
        size = f"{4e-9 * count * width:.3f} GB of main memory"
        lines += [
            f"the base reads every row once: its hidden states at up to {count} targets are kept, in {size}"
        ]
    if facts["repeated"]:
        lines += [f"warning: {facts['repeated']} training examples are repeated word for word"]
    if facts["overlap"]:
        lines += [
            f"warning: {facts['overlap']} prompts or texts are in the training data and in the held-out data"
        ]
    if process_group.world() > 1:
        held = (
            "the model, and they sum their gradients once a step"
            if config.lora
            else "a part of every layer"
        )
        lines += [f"{process_group.world()} processes: each holds {held}"]
    if not task.packed:
        lines += [
            "this model's attention cannot be told where documents end: rows are sorted by length and padded"
        ]
    if config.training.max_steps and config.training.num_train_epochs:
        lines += ["max_steps and num_train_epochs are both given: the smaller ends the run"]
    examples = data.examples_per_step
    tokens, targets = (
        facts["train"][name] / facts["train"]["rows"] * examples for name in ("tokens", "targets")
    )
    a_step = f"{examples} examples ({tokens:.0f} tokens, {targets:.0f} targets)"
    lines += [f"{total} steps of {a_step}, {data.steps_per_epoch:.1f} to an epoch"]
    return "\n".join(lines)


def describe_lora(task, lora):
    """What is trained in the place of the base. `lora` is the [lora] table of the configuration."""
    bits = (
        f", {share_4bit(task.model):.0%} of it in 4 bits ({lora.bnb_4bit_quant_type})"
        if lora.load_in_4bit
        else ""
    )
    whole = f", and {' '.join(lora.modules_to_save)} whole" if lora.modules_to_save else ""
    shape = f"rank {lora.lora_r}, alpha {lora.lora_alpha:g}"
    return f"LoRA: {shape}, over {len(lora_layers(task.model))} linear layers{whole}; the base is frozen{bits}"


def place_of(device, before):
    """Where the sums are made, which decides their bits. A run that goes on from a checkpoint takes
    as many threads.
    """
    if before and before["facts"]["place"]["processes"] == world():
        torch.set_num_threads(before["facts"]["place"]["threads"])
    versions = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return {
        "device": device.type,
        "processes": world(),
        "threads": torch.get_num_threads(),
        **versions,
    }


def moved(before, place):
    """What is to be said where a run goes on from a checkpoint (its state, or None) in another
    place; else "".
    """
    was = before["facts"]["place"] if before else place
    changed = [f"{name} {was[name]} -> {now}" for name, now in place.items() if now != was[name]]
    return (
        f"resumed with {', '.join(changed)}: the same examples and targets a step, not the same bits"
        if changed
        else ""
    )
