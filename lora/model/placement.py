"""Prepare a loaded model for training: wrap its layers, move it to its device, shard it."""

from functools import partial

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lora.common.errors import UserError
from lora.config.schema import Config, TrainingConfig
from lora.distributed import process_group
from lora.model.task import Task
from lora.target_modules import decoder_layers


def prepare_layers(model: nn.Module, training: TrainingConfig, checkpointing: bool) -> None:
    """Wrap the forward of every decoder layer, without changing its gradients.

    checkpointing: it keeps only its input, and is computed again in the backward pass.
    offload_activations: that input is moved to main memory.
    """
    layers = decoder_layers(model)
    if not layers and (training.compile or checkpointing):
        key = "compile" if training.compile else "gradient_checkpointing"
        raise UserError(f"{key}: this model has no list of layers to do it to; leave it out.")
    for layer in layers:
        if training.compile:  # for any length, or every new length would be compiled
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if checkpointing and training.offload_activations:
            layer.forward = partial(offloaded, layer.forward)


def offloaded(forward, *args, **kwargs):
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return forward(*args, **kwargs)


def place_on_device(task: Task, config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Move a task to its device, sharded if several processes train all weights."""
    if process_group.world_size() > 1 and not config.lora:
        from lora.distributed.fsdp import shard

        shard(task, dtype, device)
    task.to(device)
