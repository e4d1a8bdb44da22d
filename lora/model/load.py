"""Load a base model with the head that its task needs."""

import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from lora.common.base_files import locate_base
from lora.common.errors import UserError
from lora.model.compatibility import find_incompatibility
from lora.model.device import choose_device
from lora.model.heads import MLPHead
from lora.model.pretrained_heads import initialise_head
from lora.model.task import Task
from lora.model.weights import add_tokens, four_bits, load_shape, load_weights, weight_files
from lora.target_modules import require_all_grads


def load_task(config, dtype, packed=None):
    """The base of `config` with the head its task needs, on the CPU, weights in `dtype`, trainable.
    Raises UserError.

    With `init_from = "scratch"` the weights are random (seeded), in the shape that the base's
    config.json gives. Rows are packed where the model's attention can be told where documents end,
    unless `packed` is given.
    """
    base_model, max_length = config.model.base_model, config.data.max_length
    shape, base_dtype, tokenizer = load_shape(base_model)
    if shape.is_encoder_decoder:
        raise UserError(
            f"base_model {base_model}: an encoder-decoder; expected a decoder or an encoder."
        )
    problems = []
    layouts = (True, False) if packed is None else (packed,)  # what cannot be packed is padded
    for layout in layouts:
        try:
            settings = config.model.head_dropout, config.model.score_loss
            task = Task(
                build(config, shape, tokenizer, dtype, layout), tokenizer, base_dtype, *settings
            )
            if config.model.task == "lm" and not task.causal:
                raise UserError(
                    f"base_model {base_model}: an encoder sees what it would have to predict; use --task score."
                )
            task.packed = layout
            problem = find_incompatibility(task)
        except KeyError as error:  # of a model that knows its own kinds of attention only
            problem = f"it has no attention {error}"
        if not problem:
            break
        problems.append(problem)
    if problem:
        raise UserError(
            f"base_model {base_model}: {shape.model_type} is not supported: {problems[0]}."
        )
    if isinstance(task.head, MLPHead) and config.model.init_from != "scratch":
        initialise_head(task, weight_files(config.model), config.model.head_tokens)
    longest = (getattr(shape, "max_position_embeddings", None) or max_length) - task.first_position
    if max_length > longest:
        raise UserError(
            f"max_length = {max_length}: {base_model} has {longest} positions; add --max_length {longest}."
        )
    return task


def build(config, shape, tokenizer, dtype, packed):
    """The model that `config` asks for, trainable, with packed attention or with the one that
    transformers chooses.
    """
    auto = AutoModelForCausalLM if config.model.task == "lm" else AutoModel
    attention = "packed" if packed else None
    torch.manual_seed(config.training.seed)
    quantization = four_bits(config.lora, choose_device(config.training.device))
    if config.model.init_from == "scratch":
        if quantization:
            raise UserError(
                "init_from scratch: random weights are not quantised; leave load_in_4bit out."
            )
        model = auto.from_config(shape, dtype=dtype, attn_implementation=attention)
        model.config.name_or_path = locate_base(config.model.base_model)[0]
    else:
        model = load_weights(auto, config.model.base_model, dtype, attention, quantization)
        if quantization:
            model.to(quantization.device)  # where its 4-bit weights are already
    if config.model.add_special_tokens:
        add_tokens(model, tokenizer, config.model.add_special_tokens)
    require_all_grads(model)
    return model


logging.disable_progress_bar()


# What it would warn of while it loads is looked at here, and refused or right
logging.set_verbosity_error()
