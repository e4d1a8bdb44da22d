"""A plain Hugging Face folder -> one GGUF file for llama.cpp: what it is told of the model, and the
tensors.

What llama.cpp would compute otherwise than transformers, in silence, is refused in one line. One
thing it leaves out is written so that it does no harm: it knows no sliding window in these
families, so that the context length of a model that has one is written as the window, within which
both attend to everything. Source: conversion/base.py and conversion/llama.py of llama.cpp.
"""

import math
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora.common.atomic_files import atomic_file
from lora.common.errors import UserError
from lora.export.gguf_tokenizer import tokenizer_keys
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


def write_gguf(folder, path, kind):
    """Write the model in `folder` to the file `path`, matrices as `kind` (of FILE_TYPES), vectors
    as f32.

    A matrix whose rows are not whole blocks of 32 is f16 in a q8_0 file. One tensor is in memory at
    a time. Raises UserError.
    """
    config, _, tokenizer = load_shape(str(folder))
    keys = gguf_keys(config, tokenizer)
    writer = gguf.GGUFWriter(None, family(config))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for method, value in keys.items():
        getattr(writer, method)(value)
    tensors = [
        (*tensor, stored_type(tensor[1], kind)) for tensor in named_tensors(Path(folder), config)
    ]
    for name, shape, _, stored in tensors:
        shape = gguf.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, read, stored in tensors:
            writer.write_tensor_data(gguf.quantize(read(), stored))
        writer.close()


def family(config):
    """llama.cpp's name for the model's family. Raises UserError where it is not one of FAMILIES."""
    name = (config.architectures or [config.model_type])[0]
    if name not in FAMILIES:
        raise UserError(
            f"gguf: {name} is not written for llama.cpp here; {', '.join(FAMILIES)} are."
        )
    return FAMILIES[name]


def gguf_keys(config, tokenizer):
    """{method of GGUFWriter: its argument}, all that llama.cpp is told besides the tensors. Raises
    UserError.
    """
    architecture, size = family(config), head_size(config)
    if config.hidden_act != "silu":
        raise UserError(
            f"gguf: hidden_act is {config.hidden_act}; llama.cpp computes silu in this family."
        )
    if architecture == "qwen2" and size * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"gguf: head_dim is {size}; llama.cpp's qwen2 has hidden_size / num_attention_heads."
        )
    if architecture == "qwen3" and config.attention_bias:
        raise UserError("gguf: attention_bias is true; llama.cpp's qwen3 has none.")
    return {
        "add_context_length": min(
            config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf
        ),
        "add_block_count": config.num_hidden_layers,
        "add_embedding_length": config.hidden_size,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": config.num_attention_heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_key_length": size,
        "add_value_length": size,
        "add_layer_norm_rms_eps": config.rms_norm_eps,
        "add_vocab_size": config.vocab_size,
        **rope_keys(config),
        **tokenizer_keys(tokenizer, config.vocab_size),
    }


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_keys(config):
    """How positions turn queries and keys; Llama 3's scaling is a tensor instead. Raises UserError."""
    rope = {
        name: value
        for name, value in config.rope_parameters.items()
        if value is not None and name != "type"
    }
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    if not rope.keys() <= ROPE_SETTINGS.get(kind, set()) or kind not in known_ropes(config):
        known = ", ".join(known_ropes(config))
        raise UserError(
            f"gguf: rope_parameters {config.rope_parameters}: llama.cpp knows {known} in their plain form."
        )
    keys = {"add_rope_dimension_count": head_size(config), "add_rope_freq_base": theta}
    if kind in ("linear", "yarn"):
        keys |= {
            "add_rope_scaling_type": gguf.RopeScalingType(kind),
            "add_rope_scaling_factor": rope["factor"],
        }
    if kind == "yarn":
        keys["add_rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
        keys["add_rope_scaling_yarn_beta_fast"] = rope.get("beta_fast", 32.0)
        keys["add_rope_scaling_yarn_beta_slow"] = rope.get("beta_slow", 1.0)
    return keys


def known_ropes(config):
    """Only llama.cpp's llama reads the tensor that Llama 3's scaling is written as."""
    return [kind for kind in ROPE_SETTINGS if kind != "llama3" or family(config) == "llama"]


def named_tensors(folder, config):
    """[(llama.cpp's name, shape, a function that reads it: fp32 array)] of every weight in the
    folder.
    """
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[family(config).upper()], config.num_hidden_layers
    )
    tensors = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # llama.cpp reads the embeddings where there is no output layer
                known = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if known is None:
                    raise UserError(
                        f"gguf: {file.name}: {name} has no place in llama.cpp's {family(config)}."
                    )
                read = lambda file=file, name=name: read_tensor(file, name, config)
                tensors.append((known, tuple(weights.get_slice(name).get_shape()), read))
    if config.rope_parameters["rope_type"] == "llama3":
        tensors.append(
            ("rope_freqs.weight", (head_size(config) // 2,), lambda: rope_factors(config))
        )
    return tensors


def read_tensor(file, name, config):
    """A weight as an fp32 array, with the rows of queries and keys in llama.cpp's order.

    Its llama turns neighbours, (0, 1), (2, 3), ..., where transformers turns (0, d/2), (1, d/2 +
    1), ... of a head.
    """
    with safe_open(file, "pt") as weights:
        tensor = weights.get_tensor(name).float()
    if family(config) == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
        halves = tensor.unflatten(0, (-1, 2, head_size(config) // 2))
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return tensor.numpy()


def rope_factors(config):
    """[head_dim / 2]: by how much Llama 3's scaling slows each frequency down; what llama.cpp
    divides it by.
    """
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = head_size(config)
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    return (plain / slowed).numpy()


def stored_type(shape, kind):
    """How a tensor of this shape is stored in a file of this kind."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32  # llama.cpp adds and multiplies vectors in f32
    if kind == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]
