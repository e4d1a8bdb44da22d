"""Load a base model and its tokenizer; choose the device and the type to compute in."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lora.attention  # noqa: F401  (registers the attention called "packed")
from lora.config import ROOT
from lora.errors import UserError
from lora.heads import Task

EMBEDDED = ROOT / "assets" / "tiny_base"
logging.disable_progress_bar()


def choose_device(name):
    """The device called `name`; "auto" is the first of cuda, mps and cpu that is there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device in present if present[device]]
    if name not in ("auto", *available):
        raise UserError(f"device {name} is not available here; there is {', '.join(available)}.")
    return torch.device(available[0] if name == "auto" else name)


def choose_dtype(name, device):
    """The type to compute in. "auto": bfloat16 on CUDA that has it, float16 on older CUDA, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def locate(base_model):
    """(where transformers finds the base, whether that is a folder). Something that looks like a path is never a Hub name."""
    path = EMBEDDED if base_model == "embedded" else Path(base_model).expanduser()
    if path.is_dir():
        return str(path), True
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") > 1:
        raise UserError(f"base_model {base_model}: no such folder (and no Hub name OWNER/NAME).")
    return base_model, False


def load_task(config, dtype):
    """The base of `config` with the head its task needs, on the CPU, weights in `dtype`, trainable. Raises UserError.

    With `init_from = "scratch"` the weights are random (seeded), in the shape the base's config.json gives.
    """
    source, local = locate(config.model.base_model)
    common = {"trust_remote_code": False, "local_files_only": local}
    auto = AutoModelForCausalLM if config.model.task == "lm" else AutoModel
    torch.manual_seed(config.training.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        shape = AutoConfig.from_pretrained(source, **common)
        base_dtype = shape.dtype or torch.float32
        if shape.is_encoder_decoder:
            raise UserError(f"base_model {config.model.base_model}: encoder-decoder models are not supported.")
        if config.model.init_from == "scratch":
            model = auto.from_config(shape, dtype=dtype, attn_implementation="packed")
            model.config.name_or_path = source
        else:
            model, info = auto.from_pretrained(
                source, dtype=dtype, attn_implementation="packed", use_safetensors=True, output_loading_info=True, **common
            )
            if info["missing_keys"] or info["mismatched_keys"]:
                missing = ", ".join(map(str, sorted([*info["missing_keys"], *info["mismatched_keys"]])[:5]))
                raise UserError(f"base_model {config.model.base_model}: no weights, or of another shape, for {missing}.")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"base_model {config.model.base_model}: {reason}") from None
    longest = getattr(shape, "max_position_embeddings", None)
    if longest and config.data.max_length > longest:
        found = f"max_length = {config.data.max_length}: {config.model.base_model} has {longest} positions"
        raise UserError(f"{found}; add --max_length {longest}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name.split("."))  # no head reads it, so it would only go stale
    return Task(model, tokenizer, base_dtype, config.model.head_dropout)
