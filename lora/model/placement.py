"""Prepare a loaded model for training: wrap its layers, move it to its device, shard it."""

from functools import partial

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lora.common.errors import UserError
from lora.distributed import process_group, sharding
from lora.model.compatibility import find_incompatibility
from lora.target_modules import decoder_layers


def prepare_layers(model, training):
    """Wrap the forward of every decoder layer as `training` asks: compiled; computed again when its
    gradient is asked for, so that only its input is kept; what is kept moved to main memory. The
    gradients stay what they are. Raises UserError.
    """
    asked = [
        key
        for key in ("compile", "gradient_checkpointing", "offload_activations")
        if getattr(training, key)
    ]
    layers = decoder_layers(model)
    if asked and not layers:
        raise UserError(f"{asked[0]}: this model has no list of layers to do it to; leave it out.")
    for layer in layers:
        if training.compile:  # for any length: else every new one would be compiled
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if training.gradient_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if training.offload_activations:
            layer.forward = partial(offloaded, layer.forward)


def place_on_device(task, config, device, dtype):
    """Bring a task to where it is trained: `device`, in parts if several processes train all
    weights. Raises UserError.
    """
    if process_group.world_size() > 1 and not config.lora:
        sharding.shard(task, dtype, config.training.optimizer, device)
    task.to(device)
    if device.type != "cpu" and not any(map(sharding.is_sharded, task.parameters())):
        # It has been tried on the CPU, but for the device's own kernels
        problem = find_incompatibility(task, dtype)
        if problem:
            raise UserError(f"device {device}: {problem}; use --device cpu, or another --dtype.")


def offloaded(forward, *args, **kwargs):
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return forward(*args, **kwargs)
