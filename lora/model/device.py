"""Choose the device and the dtype to compute in."""

import os

import torch

from lora.common.errors import UserError
from lora.config.schema import Config
from lora.model.weights import read_shape

# Width of a base from which on a CPU computes in bfloat16: it was 2.4 times as fast there, and
# between 0.7 and 1.6 times as fast at a width of 128 (LOG.md).
BFLOAT16_WIDTH = 512


def choose_device(name: str) -> torch.device:
    """Return a device; "auto" is DEVICE_PREFERENCE's, else the first there is of cuda, mps, cpu."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    where = "device"
    if name == "auto":
        name = os.environ.get("DEVICE_PREFERENCE") or "auto"
        where = "DEVICE_PREFERENCE"
    if name == "auto":
        name = available[0]
    if name not in available:
        listed = ", ".join(available)
        raise UserError(f"{where} {name} is not available here; there is {listed}.")
    return torch.device(name)


def set_determinism(deterministic: bool, device: torch.device) -> None:
    """On a GPU, choose algorithms with or without a fixed order of sums.

    cuBLAS reads its variable once, when it starts. So it is set for every run: a later one in this
    process, or a part of `--check`, may be deterministic.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Return the type to compute in; "auto" is bfloat16 where the hardware is faster with it.

    That is on CUDA, where older cards get float16, and on CPUs with AVX512_BF16 or AMX if the base
    is wide enough: in a small one the casts can cost more than the products save. MPS gets float32,
    because there was no such machine to measure on.
    """
    if config.training.dtype != "auto":
        return getattr(torch, config.training.dtype)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        width = read_shape(config.model.base_model).get_text_config().hidden_size
        return torch.bfloat16 if width >= BFLOAT16_WIDTH else torch.float32
    return torch.float32


def cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
