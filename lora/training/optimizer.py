"""AdamW, in 32 bits or with bitsandbytes' 8-bit state, over all that is trained."""

import torch

from lora.distributed.sharding import local_tensor, sharded_like
from lora.quantization import import_bitsandbytes


def make_optimizer(parameters, config, device):
    """The optimizer that `config` names over `parameters` (name -> parameter). Raises UserError
    where it cannot be had.

    With `loraplus_lr_ratio` the LoRA B's learn faster than the rest (LoRA+, Hayou et al. 2024):
    each group's "lr_ratio" multiplies the learning rate of the schedule.
    """
    settings, ratio = config.training, config.lora.loraplus_lr_ratio if config.lora else 1.0
    ratios = {name: ratio if ".lora_B." in name else 1.0 for name in parameters}
    groups = [
        {
            "params": [parameters[name] for name in parameters if ratios[name] == value],
            "lr_ratio": value,
        }
        for value in dict.fromkeys(ratios.values())
    ]
    values = {"lr": 0.0, "betas": (0.9, settings.adam_beta2), "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **values)
    bnb = import_bitsandbytes(f"optimizer {settings.optimizer}", device)
    paged = settings.optimizer == "paged_adamw_8bit"
    if paged and device.type == "cpu":
        print(
            "optimizer paged_adamw_8bit: on the CPU there is nothing to page to; it is adamw_8bit here"
        )
        paged = False
    return (bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit)(groups, **values)


def optimizer_bytes(parameters, optimizer):
    """How much memory the optimizer of that name will hold for `parameters`, from the first step
    on.
    """
    sizes = [local_tensor(parameter).numel() for parameter in parameters]
    if optimizer == "adamw":
        return sum(8 * size for size in sizes)
    # A byte for each of two values, and a scale for 256 of them; small tensors are kept in 32 bits.
    return sum(8 * size if size < 4096 else 2 * size + 8 * (size // 256) for size in sizes)


def state_of(optimizer):
    """Parameter -> {name: tensor}: what the optimizer remembers of it. Empty before the first step."""
    return {parameter: tensors_of(state) for parameter, state in optimizer.state.items()}


def tensors_of(state):
    """{name: tensor} of one parameter's state, without bitsandbytes' tables of constants."""
    return {
        key: torch.as_tensor(value) for key, value in state.items() if not key.startswith("qmap")
    }


def set_state(optimizer, tensors):
    """Put back what `state_of` gave. Raises KeyError(parameter, names that are absent, too many or
    of another shape).
    """
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            mine = local_tensor(parameter)
            saved, state = tensors[parameter], {"step": 0.0, "exp_avg": mine, "exp_avg_sq": mine}
            if not isinstance(optimizer, torch.optim.AdamW):
                # Paged memory must be bitsandbytes' own
                optimizer.init_state(group, parameter, i, j)
                state = optimizer.state[parameter]
            shapes = {key: tensor.shape for key, tensor in tensors_of(state).items()}
            wrong = [
                key
                for key in {**saved, **shapes}
                if key not in saved or saved[key].shape != shapes.get(key)
            ]
            if wrong:  # torch's fused step does not look at shapes
                raise KeyError(parameter, *sorted(wrong))
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[parameter] = {
                    key: sharded_like(parameter, tensor) for key, tensor in saved.items()
                }
            else:
                for key, tensor in saved.items():
                    state[key] = tensor.item() if key == "step" else state[key].copy_(tensor)
