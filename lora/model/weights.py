"""The files of a base model: config.json, weights, tokenizer."""

from pathlib import Path

from huggingface_hub import hf_hub_download
import torch
from torch import Tensor
import transformers
from transformers.utils import logging

from lora.common.base_files import check_weight_files, locate_base
from lora.common.errors import UserError, library_errors, raise_if_any
from lora.config.schema import LoraConfig, ModelConfig
from lora.quantization import FourBitSettings, import_bitsandbytes
from lora.target_modules import is_pooler


def quiet_transformers() -> None:
    """Turn off the warnings and progress bars of transformers.

    What it warns of while it loads a model is checked here, and is an error or intended.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def read_shape(base_model: str) -> transformers.PreTrainedConfig:
    """Read config.json. Every program begins with it, so transformers is quiet from here on."""
    quiet_transformers()
    source, local = locate_base(base_model)
    with library_errors(f"base_model {base_model}"):
        shape = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=local
        )
    if getattr(shape, "quantization_config", None):
        expected = "name the dense base (load_in_4bit quantises it)"
        raise UserError(f"base_model {base_model}: its files are quantised; {expected}.")
    return shape


def load_shape(
    base_model: str,
) -> tuple[transformers.PreTrainedConfig, torch.dtype, transformers.PreTrainedTokenizerBase]:
    """Return what config.json says, the type of the weights on disk, and the tokenizer."""
    shape = read_shape(base_model)
    return shape, shape.dtype or torch.float32, load_tokenizer(base_model)


def load_tokenizer(base_model: str) -> transformers.PreTrainedTokenizerBase:
    source, local = locate_base(base_model)
    with library_errors(f"base_model {base_model}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, local_files_only=local
        )
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
        source = Path(hf_hub_download(source, "config.json", local_files_only=True)).parent
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
) -> transformers.PreTrainedModel:
    """Return a model with all weights of a base, in `dtype` or quantised. Raises UserError."""
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
            ignore_mismatched_sizes=True,  # they are reported below
            trust_remote_code=False,
            local_files_only=local,
        )
    mismatched = [name for name, _, _ in info["mismatched_keys"]]
    absent = [name for name in [*info["missing_keys"], *mismatched] if not is_pooler(name)]
    raise_if_any(absent, f"base_model {base_model}: no weights, or of another shape, for")
    floats = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    not_finite = [name for name, parameter in floats.items() if not is_finite(parameter)]
    raise_if_any(
        not_finite, f"base_model {base_model}: not finite (copy it again, or take another base)"
    )
    if quantization:
        raise_if_any(model.hf_quantizer.quantization_config.damaged, f"base_model {base_model}")
        # Whatever is saved of the model has the base's own config.
        model.hf_quantizer.remove_quantization_config(model)
    return model


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, without a copy of the tensor."""
    return tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.detach().aminmax())


def add_tokens(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    tokens: list[str],
) -> None:
    """Add tokens to the tokenizer, and rows to the embeddings, drawn around the mean of the others.

    The tokens that the chat template writes are special, so in the contents of a chat they are
    read as text. The others are meant to be used in contents.
    """
    # A tokenizer without a template will be given ChatML's, by use_chatml.
    template = str(tokenizer.chat_template or "<|im_start|> <|im_end|>")
    for token in tokens:
        special = token in template
        tokenizer.add_tokens(transformers.AddedToken(token, special=special, normalized=False))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
