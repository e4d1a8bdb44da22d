"""The files of a base model: config.json, weights, tokenizer."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
import torch
from torch import Tensor
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lora.common.base_model_files import check_weight_files, locate_base
from lora.common.errors import UserError, library_errors, raise_if_any
from lora.config.schema import LoraConfig, ModelConfig
from lora.quantization import FourBitSettings, import_bitsandbytes
from lora.target_modules import is_pooler


def from_pretrained(loader: Any, base_model: str, options: dict | None = None) -> Any:
    """Call from_pretrained of one of transformers' classes. Its errors become UserErrors."""
    source, local = locate_base(base_model)
    with library_errors(f"base_model {base_model}"):
        return loader.from_pretrained(
            source, trust_remote_code=False, local_files_only=local, **(options or {})
        )


def read_shape(base_model: str) -> PreTrainedConfig:
    """Read config.json. Every program begins with it, so transformers is quiet from here on."""
    # What it warns of while it loads a model is checked here, and is an error or intended.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    shape = from_pretrained(transformers.AutoConfig, base_model)
    if getattr(shape, "quantization_config", None):
        expected = "name the dense base (load_in_4bit quantises it)"
        raise UserError(f"base_model {base_model}: its files are quantised; {expected}.")
    return shape


def load_shape(base_model: str) -> tuple[PreTrainedConfig, torch.dtype, PreTrainedTokenizerBase]:
    """Return what config.json says, the type of the weights on disk, and the tokenizer."""
    shape = read_shape(base_model)
    return shape, shape.dtype or torch.float32, load_tokenizer(base_model)


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    tokenizer = from_pretrained(transformers.AutoTokenizer, base_model)
    if not tokenizer.is_fast:
        problem = "its tokenizer has no fast version (no tokenizer.json), which is needed"
        raise UserError(f"base_model {base_model}: {problem}.")
    return tokenizer


def weight_files(model: ModelConfig) -> list[Path]:
    """Return the base's weight files on this disk; none where the weights are random."""
    if model.init_from == "scratch":
        return []
    source, local = locate_base(model.base_model)
    if not local:  # config.json was read before; the weights are in the same folder
        source = str(Path(hf_hub_download(source, "config.json", local_files_only=True)).parent)
    return sorted(Path(source).glob("*.safetensors"))


def four_bits(lora: LoraConfig | None, device: torch.device) -> FourBitSettings | None:
    """Return how the base is to be quantised; None without load_in_4bit."""
    if not (lora and lora.load_in_4bit):
        return None
    import_bitsandbytes("load_in_4bit", device)
    compute_dtype = getattr(torch, lora.bnb_4bit_compute_dtype)
    double_quant = lora.bnb_4bit_use_double_quant
    return FourBitSettings(lora.bnb_4bit_quant_type, double_quant, compute_dtype, device)


def load_weights(
    model_class: type[transformers.AutoModel],
    base_model: str,
    dtype: torch.dtype,
    attention: str | None,
    quantization: FourBitSettings | None = None,
) -> PreTrainedModel:
    """Return a model with all weights of a base, in `dtype` or quantised. Raises UserError."""
    source, local = locate_base(base_model)
    if local:
        check_weight_files(source)
    options = {"dtype": dtype, "attn_implementation": attention}
    options["quantization_config"] = quantization
    options["use_safetensors"] = True
    options["ignore_mismatched_sizes"] = True  # they are reported below
    options["output_loading_info"] = True
    model, info = from_pretrained(model_class, base_model, options)
    mismatched = [name for name, _, _ in info["mismatched_keys"]]
    absent = [name for name in [*info["missing_keys"], *mismatched] if not is_pooler(name)]
    raise_if_any(absent, f"base_model {base_model}: no weights, or of another shape, for")
    not_finite = []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter):
            not_finite.append(name)
    mend = "copy it again, or take another base"
    raise_if_any(not_finite, f"base_model {base_model}: not finite ({mend})")
    if quantization:
        raise_if_any(model.hf_quantizer.quantization_config.damaged, f"base_model {base_model}")
        # Whatever is saved of the model has the base's own config.
        model.hf_quantizer.remove_quantization_config(model)
    return model


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, without a copy of the tensor."""
    return tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.detach().aminmax())


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]
) -> None:
    """Add tokens to the tokenizer, and rows to the embeddings, drawn around the mean of the others.

    The tokens that the chat template writes are special, so contents of a chat read them as text.
    """
    # A tokenizer without a template will be given ChatML's, by use_chatml.
    template = str(tokenizer.chat_template or "<|im_start|> <|im_end|>")
    for token in tokens:
        special = token in template
        tokenizer.add_tokens(transformers.AddedToken(token, special=special, normalized=False))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
