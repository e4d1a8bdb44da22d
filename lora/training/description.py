"""What a run prints before its first step."""

from lora.common.base_model_files import describe_base
from lora.config.schema import LoraConfig
from lora.data.assistant_mask import turn_format_of
from lora.data.counts import describe_data
from lora.distributed.process_group import world_size
from lora.layer import LoRALayer, lora_layers
from lora.model.attention import why_without_flash
from lora.model.run import Run
from lora.model.task import Task
from lora.quantization import count_parameters, share_4bit
from lora.target_modules import decoder_layers, stacked_weights
from lora.training.base_integrity import only_adapters_train
from lora.training.schedule import total_steps, warmup_steps

MANY_EPOCHS = 20


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
    lines += describe_computation(run, checkpointing)
    lines += describe_length(run, train_facts)
    return "\n".join(lines)


def describe_computation(run: Run, checkpointing: bool) -> list[str]:
    """Return lines about how a step is computed: processes, attention, optimizer, recomputation."""
    task, config = run.task, run.config
    lines = []
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
    return lines


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
    if data_facts["chats"]:
        turn_format = turn_format_of(task.tokenizer, task.tokenizer.chat_template)
        if not turn_format.answers_follow_prompt:
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
        advice = "most of the time is wasted, or the data are memorised"
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
