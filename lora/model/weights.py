"""The files of a base model: config.json, weights, tokenizer."""

from pathlib import Path

from huggingface_hub import hf_hub_download
import torch
from transformers import AddedToken, AutoConfig, AutoTokenizer

from lora.common.base_files import check_weight_files, locate_base
from lora.common.errors import UserError, library_errors, raise_if_any
from lora.quantization import FourBitSettings, bitsandbytes
from lora.target_modules import is_pooler


def weight_files(model):
    """The base's files of weights, on this disk. `model` is the [model] table of a configuration."""
    if model.init_from == "scratch":
        return []
    source, local = locate_base(model.base_model)
    if not local:  # its config.json was read a moment ago; the weights lie beside it
        source = Path(hf_hub_download(source, "config.json", local_files_only=True)).parent
    return sorted(Path(source).glob("*.safetensors"))


def four_bits(lora, device):
    """How the base is to be quantised, or None where the [lora] table does not ask for it. Raises
    UserError.
    """
    if not (lora and lora.load_in_4bit):
        return None
    bitsandbytes("load_in_4bit", device)
    compute_dtype = getattr(torch, lora.bnb_4bit_compute_dtype)
    return FourBitSettings(
        lora.bnb_4bit_quant_type, lora.bnb_4bit_use_double_quant, compute_dtype, device
    )


def load_weights(model_class, base_model, dtype, attention, quantization=None):
    """A model of transformers with the weights of `base_model`, all of them, in `dtype` or
    quantised. Raises UserError.
    """
    source, local = locate_base(base_model)
    if local:
        check_weight_files(source)
    with library_errors(f"base_model {base_model}"):
        model, info = model_class.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            trust_remote_code=False,
            local_files_only=local,
        )
    absent = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    absent = [name for name in absent if not is_pooler(name)]
    raise_if_any(absent, f"base_model {base_model}: no weights, or of another shape, for")
    odd = [
        name for name, p in model.named_parameters() if p.is_floating_point() and not is_finite(p)
    ]
    raise_if_any(odd, f"base_model {base_model}: not finite (copy it again, or take another base)")
    if quantization:
        raise_if_any(model.hf_quantizer.quantization_config.damaged, f"base_model {base_model}")
        # What is saved of it is the base's own config
        model.hf_quantizer.remove_quantization_config(model)
    return model


def is_finite(tensor):
    """Whether all its numbers are, without a copy of it."""
    return not tensor.numel() or all(bound.isfinite() for bound in tensor.detach().aminmax())


def read_shape(base_model):
    """config.json as transformers reads it. Raises UserError."""
    source, local = locate_base(base_model)
    with library_errors(f"base_model {base_model}"):
        shape = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    if getattr(shape, "quantization_config", None):
        raise UserError(
            f"base_model {base_model}: its files are quantised; name the dense base (load_in_4bit quantises it)."
        )
    return shape


def load_shape(base_model):
    """(config.json as transformers reads it, the type of the weights on disk, tokenizer). Raises
    UserError.
    """
    shape = read_shape(base_model)
    return shape, shape.dtype or torch.float32, load_tokenizer(base_model)


def load_tokenizer(base_model):
    source, local = locate_base(base_model)
    with library_errors(f"base_model {base_model}"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, local_files_only=local
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"base_model {base_model}: its tokenizer has no fast version (no tokenizer.json), which is needed."
        )
    return tokenizer


def add_tokens(model, tokenizer, tokens):
    """Add tokens to the tokenizer, and rows for them to the embeddings, drawn around the mean of
    the others.

    Those that the chat template writes are special: where a chat's contents hold them, they are
    text. The others are there for contents to hold.
    """
    # ChatML's, which use_chatml will give it
    template = str(tokenizer.chat_template or "<|im_start|> <|im_end|>")
    tokenizer.add_tokens(
        [AddedToken(token, special=token in template, normalized=False) for token in tokens]
    )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
