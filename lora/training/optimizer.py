"""AdamW, in 32 bits or with bitsandbytes' 8-bit state, over all that is trained."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora.config.schema import Config
from lora.distributed.sharding import local_tensor
from lora.quantization import import_bitsandbytes

Parameters = dict[str, nn.Parameter]  # by name


def make_optimizer(parameters: Parameters, config: Config, device: torch.device) -> Optimizer:
    settings = config.training
    groups = parameter_groups(parameters, config.lora.loraplus_lr_ratio if config.lora else 1.0)
    values = {"lr": 0.0, "betas": (0.9, settings.adam_beta2), "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **values)
    bnb = import_bitsandbytes(f"optimizer {settings.optimizer}", device)
    if settings.optimizer == "paged_adamw_8bit" and device.type != "cpu":
        return bnb.optim.PagedAdamW8bit(groups, **values)
    return bnb.optim.AdamW8bit(groups, **values)


def parameter_groups(parameters: Parameters, lora_b_ratio: float) -> list[dict]:
    """Group the parameters by their "lr_ratio", which multiplies the schedule's learning rate.

    With LoRA+ (Hayou et al. 2024) the matrices B learn faster than the rest.
    """
    groups: dict[float, dict] = {}
    for name, parameter in parameters.items():
        ratio = lora_b_ratio if ".lora_B." in name else 1.0
        if ratio not in groups:
            groups[ratio] = {"params": [], "lr_ratio": ratio}
        groups[ratio]["params"].append(parameter)
    return list(groups.values())


def optimizer_bytes(parameters: list[nn.Parameter], optimizer: str) -> int:
    """Return the memory that the optimizer of that name takes at its first step."""
    total = 0
    for parameter in parameters:
        size = local_tensor(parameter).numel()
        if optimizer == "adamw" or size < 4096:  # bitsandbytes keeps small tensors in 32 bits
            total += 8 * size
        else:  # a byte for each of two values, and for each a scale of 4 bytes to 256 of them
            total += 2 * size + 8 * (size // 256)
    return total


def state_tensors(optimizer: Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """Return {"parameter/key": what the optimizer remembers of it}, after its first step."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if not key.startswith("qmap"):  # bitsandbytes' tables of constants
                tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


def init_state(optimizer: Optimizer) -> None:
    """Make what the optimizer's first step would make, with zeros, where nothing is made yet."""
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if optimizer.state[parameter]:
                continue
            if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            else:
                optimizer.init_state(group, parameter, i, j)  # makes paged memory


def set_numbers(optimizer: Optimizer, parameters: Parameters, tensors: dict[str, Tensor]) -> None:
    """Put back what is a number in the state: bitsandbytes' step. Tensors were filled in place."""
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                state[key] = tensors[f"{name}/{key}"].item()
