"""Write a plain Hugging Face folder as one GGUF file for llama.cpp.

What llama.cpp would silently compute otherwise than transformers is refused in one line. It knows
no sliding window in these families, so the window is written as the context length: within it both
attend to everything. Source: conversion/base.py and conversion/llama.py of llama.cpp.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import math
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora.common.atomic_files import atomic_file
from lora.common.errors import UserError
from lora.export.gguf_tokenizer import add_tokenizer
from lora.model.weights import load_shape

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ROPE_SETTINGS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_fast", "beta_slow", "original_max_position_embeddings"},
}


@dataclass
class NamedTensor:
    name: str  # llama.cpp's
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # returns its values, fp32; one tensor at a time is in memory


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write the model in `folder` to a file: matrices as `kind` (of FILE_TYPES), vectors as f32."""
    config, _, tokenizer = load_shape(str(folder))
    writer = make_writer(config, tokenizer, kind)
    tensors = named_tensors(folder, config)
    for tensor in tensors:
        stored = stored_type(tensor.shape, kind)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(gguf.quantize(tensor.read(), stored_type(tensor.shape, kind)))
        writer.close()


def make_writer(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, kind: str
) -> gguf.GGUFWriter:
    """Return a writer that holds all that llama.cpp is told besides the tensors."""
    refuse_other_computation(config)
    writer = gguf.GGUFWriter(None, family(config))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    window = getattr(config, "sliding_window", None) or math.inf
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_rope(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    return writer


def family(config: PretrainedConfig) -> str:
    """Return llama.cpp's name for the model's family, which must be one of FAMILIES."""
    name = (config.architectures or [config.model_type])[0]
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"gguf: {name} is not written for llama.cpp here; {known} are.")
    return FAMILIES[name]


def refuse_other_computation(config: PretrainedConfig) -> None:
    architecture, size = family(config), head_size(config)
    if config.hidden_act != "silu":
        found = f"hidden_act is {config.hidden_act}"
        raise UserError(f"gguf: {found}; llama.cpp computes silu in this family.")
    if architecture == "qwen2" and size * config.num_attention_heads != config.hidden_size:
        known = "llama.cpp's qwen2 has hidden_size / num_attention_heads"
        raise UserError(f"gguf: head_dim is {size}; {known}.")
    if architecture == "qwen3" and config.attention_bias:
        raise UserError("gguf: attention_bias is true; llama.cpp's qwen3 has none.")


def head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_rope(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Add how positions rotate queries and keys; Llama 3's scaling is a tensor instead."""
    settings = {name: value for name, value in config.rope_parameters.items() if value is not None}
    kind, theta = settings.pop("rope_type"), settings.pop("rope_theta")
    settings.pop("type", None)
    known_kinds = list(ROPE_SETTINGS)
    if family(config) != "llama":  # only that family reads the tensor of Llama 3's scaling
        known_kinds.remove("llama3")
    if kind not in known_kinds or not settings.keys() <= ROPE_SETTINGS[kind]:
        known = f"llama.cpp knows {', '.join(known_kinds)} in their plain form"
        raise UserError(f"gguf: rope_parameters {config.rope_parameters}: {known}.")
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(theta)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(settings["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(settings.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(settings.get("beta_slow", 1.0))


def named_tensors(folder: Path, config: PretrainedConfig) -> list[NamedTensor]:
    """Return every weight in the folder, under llama.cpp's names."""
    architecture = gguf.MODEL_ARCH[family(config).upper()]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # llama.cpp reads the embeddings where there is no output layer
                known = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if known is None:
                    where = f"llama.cpp's {family(config)}"
                    raise UserError(f"gguf: {file.name}: {name} has no place in {where}.")
                shape = tuple(weights.get_slice(name).get_shape())
                tensors.append(NamedTensor(known, shape, partial(read_tensor, file, name, config)))
    if config.rope_parameters["rope_type"] == "llama3":
        shape = (head_size(config) // 2,)
        tensors.append(NamedTensor("rope_freqs.weight", shape, partial(rope_factors, config)))
    return tensors


def read_tensor(file: Path, name: str, config: PretrainedConfig) -> np.ndarray:
    """Return a weight, with the rows of queries and keys in llama.cpp's order.

    Its llama rotates the neighbours (0, 1), (2, 3), ... of a head; transformers rotates (0, d/2),
    (1, d/2 + 1), ...
    """
    with safe_open(file, "pt") as weights:
        tensor = weights.get_tensor(name).float()
    if family(config) == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
        halves = tensor.unflatten(0, (-1, 2, head_size(config) // 2))
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return tensor.numpy()


def rope_factors(config: PretrainedConfig) -> np.ndarray:
    """Return what llama.cpp divides each frequency by for Llama 3's scaling, [head_dim / 2]."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = head_size(config)
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    return (plain / scaled).numpy()


def stored_type(shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32  # llama.cpp adds and multiplies vectors in f32
    if kind == "q8_0" and shape[-1] % 32:  # its rows are not whole blocks
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]
