"""Load a base for full fine-tuning on several processes: the first process alone reads it."""

import copy

import torch

from lora.config.schema import Config
from lora.distributed import fsdp, process_group
from lora.distributed.collectives import broadcast_from_rank_zero, on_rank_zero
from lora.model.load import build_model, load_task, set_max_length
from lora.model.task import Task
from lora.model.weights import load_shape
from lora.target_modules import is_tied, make_all_trainable, untie


def load_for_sharding(config: Config, dtype: torch.dtype) -> Task:
    """Return the task with its weights in the first process, and on `meta` in the others.

    `shard` scatters the weights. Raises UserError as load_task does, and for what cannot be
    sharded.
    """
    fsdp.require_supported(dtype, config.training.optimizer)
    task = on_rank_zero(load_task, config, torch.float32)
    packed, tied = broadcast_from_rank_zero(lambda: (task.packed, is_tied(task.model)))
    if process_group.rank() > 0:
        with torch.device("meta"):
            task = build_empty_task(config, packed)
            # transformers does not tie a head of which the files hold other weights.
            if not tied:
                untie(task.model)
                make_all_trainable(task.model)
    return task


def build_empty_task(config: Config, packed: bool) -> Task:
    settings = copy.deepcopy(config)
    settings.model.init_from = "scratch"  # no file is read
    shape, base_dtype, tokenizer = load_shape(config.model.base_model)
    model = build_model(settings, shape, tokenizer, torch.float32, packed)
    head_dropout, score_loss = config.model.head_dropout, config.model.score_loss
    task = Task(model, tokenizer, base_dtype, head_dropout, score_loss)
    task.packed = packed
    set_max_length(config, shape, task.first_position)
    return task
