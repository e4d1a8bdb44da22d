"""Full fine-tuning on several processes: weights sharded by FSDP2.

The first process reads the weights, and sends each process its rows. This is imported only where
there are several processes: FSDP2 takes a second to import.
"""

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from lora.common.errors import UserError
from lora.common.operating_system import c_library_function
from lora.distributed.collectives import on_rank_zero
from lora.distributed.process_group import hide_bar, world_size
from lora.distributed.sharding import copy_into
from lora.target_modules import decoder_layers


def require_supported(dtype: torch.dtype, optimizer: str) -> None:
    """Raise UserError for a dtype or an optimizer that does not support sharded weights."""
    method = "full fine-tuning on several processes"
    if dtype == torch.float16:
        raise UserError(f"dtype float16: {method} computes in bfloat16 or float32; name one.")
    if optimizer != "adamw":
        raise UserError(f"optimizer {optimizer}: {method} has adamw only; leave it out.")


def shard(task: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Shard the weights of `task` over the processes: each holds some rows of every layer (FSDP2).

    The first process has the weights, and scatters them. A layer is gathered in `dtype` when it is
    computed. Shards, gradients and optimizer states are in fp32.
    """
    on_rank_zero(lambda: None)  # the others wait until it has the weights
    parameters = {name: parameter.detach() for name, parameter in task.named_parameters()}
    buffers = dict(task.named_buffers())
    move_to_meta(task)
    # Without a mesh, fully_shard would choose the GPUs of a machine even for a run on its CPU.
    mesh = init_device_mesh(device.type, (world_size(),))
    param_dtype = None if dtype == torch.float32 else dtype
    # A batch keeps its own dtypes: its weights and scores are not cast to what layers compute in.
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*decoder_layers(task.model), task):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # The loss is already divided by the number of targets over all processes.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    fsdp.register_fsdp_forward_method(task, "predict")
    task.to_empty(device=device)
    scatter_weights(task, parameters, buffers)


def move_to_meta(module: nn.Module) -> None:
    """Replace every parameter by one without memory, in place; tied ones stay tied."""
    replaced: dict[Tensor, nn.Parameter] = {}
    for submodule in module.modules():
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            if parameter not in replaced:
                empty = torch.empty_like(parameter, device="meta")
                replaced[parameter] = nn.Parameter(empty, parameter.requires_grad)
            setattr(submodule, name, replaced[parameter])


def scatter_weights(
    task: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]
) -> None:
    """Fill the sharded parameters of `task`, and its buffers, from the first process's values.

    The values are by name. The other processes' are not read, and may be on `meta`. Parameters are
    removed one by one, so that their memory is free as soon as they are sent.
    """
    malloc_trim = c_library_function("malloc_trim")
    named = list(task.named_parameters())
    for name, parameter in tqdm(named, "sharding weights", disable=hide_bar()):
        if malloc_trim:  # otherwise `keep_freed_memory` keeps what was freed before and sent
            malloc_trim(0)
        copy_into(parameter, parameters.pop(name), from_rank_zero=True)
    for name, buffer in task.named_buffers():
        copy_into(buffer, buffers[name], from_rank_zero=True)
