"""PEFT's adapter files: what adapter_config.json may hold, and the names and shapes of the tensors.

A folder has `adapter_config.json` and `adapter_model.safetensors`. Tensors are called
`base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], where <module> is
the name in the model *with* its head.
"""

from collections import Counter
import math
from pathlib import Path
import re

from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from lora.common.base_files import refuse_outside_link
from lora.common.errors import UserError, library_errors, raise_if_any
from lora.common.serialization import read_file
from lora.layer import LoRALinear
from lora.target_modules import by_pattern

# Keys of adapter_config.json that change what the tensors mean, with the values that this reader
# can honour. What only says which layers were chosen (target_modules, layers_to_transform, ...) the
# tensors' names say as well.
HONOURED = {
    "peft_type": ("LORA",),
    "use_qalora": (False,),
    "use_bdlora": (False, None),
    "target_parameters": (None, []),
    **dict.fromkeys(
        ("layer_replication", "trainable_token_indices", "alora_invocation_tokens"), (None,)
    ),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config"), (None,)),
}
DEFAULTS = {
    **dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern"), None),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), False),
    **{"lora_dropout": 0.0, "init_lora_weights": True},
}
# Whether A and B began at zero product on the base as it is. PiSSA and its like begin by taking B A
# out of the base.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
LINEAR, EMBEDDING = {"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}
FACTOR = r"(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?"


def trained_whole(model):
    """(name, parameter) of what is trained beside the LoRA factors; tied weights under each of
    their names.
    """
    every = model.named_parameters(remove_duplicate=False)
    return [
        (name, p) for name, p in every if p.requires_grad and not re.search(rf"\.{FACTOR}$", name)
    ]


def config_of(model, layers, prefix):
    """adapter_config.json of these LoRA layers; r and lora_alpha are those that most of them have."""
    r, alpha = (
        Counter(getattr(layer, key) for layer in layers.values()).most_common(1)[0][0]
        for key in ("r", "alpha")
    )
    linear = [layer for layer in layers.values() if isinstance(layer, LoRALinear)]
    endings = {name.rpartition(".")[2] for name in layers}
    # Endings alone say which layers are meant, unless a layer with such an ending is not wrapped.
    ambiguous = any(
        n.rpartition(".")[2] in endings and hasattr(m, "weight") for n, m in model.named_modules()
    )
    whole = [name for name, _ in trained_whole(model)]
    saved = {name.removesuffix(".weight") for name in whole if name.endswith(".weight")}
    biases = [
        name for name in whole if name.endswith(".bias") and name.removesuffix(".bias") not in saved
    ]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM"
        if prefix or hasattr(model, "prepare_inputs_for_generation")
        else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {
            re.escape(prefix + n): layer.r for n, layer in layers.items() if layer.r != r
        },
        "alpha_pattern": {
            re.escape(prefix + n): layer.alpha
            for n, layer in layers.items()
            if layer.alpha != alpha
        },
        "use_rslora": any(layer.rslora for layer in layers.values()),
        "use_dora": any(layer.lora_magnitude_vector is not None for layer in linear),
        "lora_bias": any(layer.lora_B.bias is not None for layer in linear),
        "lora_dropout": linear[0].dropout.p if linear else 0.0,
        "target_modules": sorted(prefix + name for name in layers)
        if ambiguous
        else sorted(endings),
        "modules_to_save": sorted(prefix + name for name in saved) or None,
        "bias": "none"
        if not biases
        else "lora_only"
        if all(".base_layer." in name for name in biases)
        else "all",
        "fan_in_fan_out": bool(linear) and isinstance(linear[0].base_layer, Conv1D),
        "inference_mode": True,
    }


def read_config(folder):
    """adapter_config.json, refused where it asks for something that this reader would have to
    ignore.
    """
    path = refuse_outside_link(Path(folder) / "adapter_config.json")
    config = DEFAULTS | read_file(path)
    for key, allowed in HONOURED.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"{path}: {key} = {config[key]!r} is not supported; only {allowed[0]!r} is."
            )
    if config["init_lora_weights"] not in PLAIN_STARTS:
        why = "such an adapter belongs on a base from which a part was taken out, and is wrong on any other"
        mend = "PEFT can convert it: save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise UserError(
            f"{path}: init_lora_weights = {config['init_lora_weights']!r}: {why}. {mend}."
        )
    dropout = config["lora_dropout"]
    fine = {
        "r": type(config["r"]) is int and config["r"] >= 1,
        "lora_alpha": is_scale(config["lora_alpha"]),
        "lora_dropout": dropout == 0 or is_scale(dropout) and dropout < 1,
        **{key: type(config[key]) is bool for key in ("use_rslora", "use_dora", "lora_bias")},
        **{key: are_patterns(config[key] or {}) for key in ("rank_pattern", "alpha_pattern")},
    }
    raise_if_any(
        (f"{key} = {config[key]!r:.300}" for key in fine if not fine[key]),
        f"{path}: nothing that LoRA can have",
    )
    return config


def is_scale(value):
    return type(value) in (int, float) and 0 < value < math.inf


def are_patterns(patterns):
    """Whether these are regular expressions -> numbers, and none of which matching could take for
    ever.

    That is a repeated group, or many repetitions and options in a row; they come with files that
    others wrote.
    """
    if not (isinstance(patterns, dict) and all(map(is_scale, patterns.values()))):
        return False
    return not any(
        re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{?]", pattern)) > 4
        for pattern in patterns
    )


def read_tensors(folder, config):
    """({module name: {factor: tensor}}, {parameter name: tensor that stands in the base's place}),
    in fp32.
    """
    path = refuse_outside_link(Path(folder) / "adapter_model.safetensors")
    if not path.is_file():
        old, new = (repr(path.with_suffix(suffix).name) for suffix in (".bin", ".safetensors"))
        convert = f"import torch, safetensors.torch as s; s.save_file(torch.load({old}), {new})"
        hint = (
            f'; convert it there: python -c "{convert}"'
            if path.with_suffix(".bin").exists()
            else ""
        )
        raise UserError(f"{path}: no such file; only safetensors adapters are read{hint}.")
    with library_errors(f"{path}: damaged, copy it again"):
        tensors = load_file(path)
    odd = [
        key
        for key, tensor in tensors.items()
        if not (tensor.is_floating_point() and tensor.float().isfinite().all())
    ]
    raise_if_any(odd, f"{path}: not finite numbers")
    named = {
        key.removeprefix("base_model.model."): tensor.float() for key, tensor in tensors.items()
    }
    # PEFT may write the modules to save three times over; the plain names are those that it reads.
    short = {name: re.sub(r"\.(modules_to_save|original_module)\.", ".", name) for name in named}
    copies = {name for name in named if short[name] != name and short[name] in named}
    modules, whole = {}, {}
    for name, tensor in named.items():
        found = re.fullmatch(rf"(.*)\.{FACTOR}", name)
        if found:
            modules.setdefault(found[1], {})[found[2]] = tensor
        elif name not in copies:
            whole[name] = tensor
    if len(tensors) > len({plain(name) for name in named}):
        raise UserError(
            f"{path}: two tensors of one name, with and without base_model.model. or base_layer."
        )
    odd = [name for name, found in modules.items() if not is_pair(found)]
    raise_if_any(
        odd if modules else ["there are none in the file"], f"{path}: not a pair of LoRA factors"
    )
    odd = [
        name
        for name, found in modules.items()
        if rank(found) != by_pattern(config["rank_pattern"], name, config["r"])
    ]
    raise_if_any(odd, f"{path}: of another rank than r and rank_pattern say")
    linear = {name: found for name, found in modules.items() if "lora_A.weight" in found}
    for key, factor in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        odd = [name for name, found in linear.items() if (factor in found) != config[key]]
        raise_if_any(odd, f"{path}: {key} = {config[key]} in the config is not so of these layers")
    return modules, whole


def is_pair(found):
    """Whether {factor: tensor} are a layer's A [r, in] and B [out, r], with what else a linear
    layer may have.
    """
    if found.keys() != EMBEDDING and not LINEAR <= found.keys() <= LINEAR | {
        "lora_B.bias",
        "lora_magnitude_vector",
    }:
        return False
    a, b = (found[name] for name in sorted(found.keys() & (LINEAR | EMBEDDING)))
    return a.dim() == b.dim() == 2 and len(a) == b.shape[1]


def rank(found):
    """The rows of A in {factor: tensor}."""
    return next(len(tensor) for name, tensor in found.items() if "_A" in name)


def plain(name):
    """A parameter's name as it is without LoRA layers in the model."""
    return name.replace(".base_layer.", ".")
