"""Choose the device and the dtype to compute in."""

import os

import torch

from lora.common.errors import UserError
from lora.model.weights import read_shape

# On a CPU: 2.4 times as fast from there on, in a base of 128 between 0.7 and 1.6 times (LOG.md)
BFLOAT16_WIDTH = 512


def choose_device(name):
    """The device called `name`; "auto" is what DEVICE_PREFERENCE says, else the first of cuda, mps
    and cpu.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available = [device for device in present if present[device]]
    preferred = os.environ.get("DEVICE_PREFERENCE") or "auto"
    for wanted, where in ((name, "device"), (preferred, "DEVICE_PREFERENCE")):
        if wanted not in ("auto", *available):
            raise UserError(
                f"{where} {wanted} is not available here; there is {', '.join(available)}."
            )
    name = preferred if name == "auto" else name
    return torch.device(available[0] if name == "auto" else name)


def choose_dtype(config, device):
    """The type to compute in. "auto": bfloat16 where the hardware multiplies it faster, else
    float32.

    That is on CUDA (where older cards have float16), and on CPUs with AVX512_BF16 or AMX if the
    base is wide enough: in a small one the casts can cost more than the products save. MPS has
    float32: no such machine was at hand to measure.
    """
    if config.training.dtype != "auto":
        return getattr(torch, config.training.dtype)
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    able = torch.cpu.get_capabilities()
    if device.type == "cpu" and (able.get("avx512_bf16") or able.get("amx_bf16")):
        width = read_shape(config.model.base_model).get_text_config().hidden_size
        return torch.bfloat16 if width >= BFLOAT16_WIDTH else torch.float32
    return torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
