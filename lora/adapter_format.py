"""PEFT's adapter files: what adapter_config.json may hold, and the names and shapes of the tensors.

A folder has `adapter_config.json` and `adapter_model.safetensors`. Tensors are named
`base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], where <module> is
the name in the model *with* its head.
"""

from collections import Counter
import math
from pathlib import Path
import re
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora.common.errors import UserError, library_errors, raise_if_any
from lora.common.plain_file import plain_file
from lora.common.toml_json import read_file
from lora.layer import LoRALayer, LoRALinear
from lora.target_modules import pattern_value

Tensors = dict[str, Tensor]  # by name; the factors of one layer have PEFT's names

# Keys of adapter_config.json that change what the tensors mean, and the values that are supported.
# Keys that only say which layers were chosen are left out: the names of the tensors say the same.
SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "use_qalora": (False,),
    "use_bdlora": (False, None),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# With these B A starts at zero, or is trained on the unchanged base. PiSSA and others subtract the
# first B A from the base.
SUPPORTED_INITS = (True, False, "gaussian", "eva", "orthogonal")
PATTERNS = ("rank_pattern", "alpha_pattern")
FLAGS = ("use_rslora", "use_dora", "lora_bias")

LINEAR = {"lora_A.weight", "lora_B.weight"}
OPTIONAL = {"lora_B.bias", "lora_magnitude_vector"}
EMBEDDING = {"lora_embedding_A", "lora_embedding_B"}
FACTOR = r"(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?"


def fully_trained(model: nn.Module) -> Tensors:
    """Return what is trained beside the LoRA factors; tied weights under each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    return {name: p for name, p in trained.items() if not re.search(rf"\.{FACTOR}$", name)}


def adapter_config(model: nn.Module, layers: dict[str, LoRALayer], prefix: str) -> dict:
    """Make the adapter_config.json of these layers; r and lora_alpha are what most of them have."""
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    escaped = {re.escape(prefix + name): layer for name, layer in layers.items()}
    linear = [layer for layer in layers.values() if isinstance(layer, LoRALinear)]

    # Endings alone say which layers are meant, unless a layer with such an ending is not wrapped.
    target_modules = {name.rpartition(".")[2] for name in layers}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in target_modules and hasattr(module, "weight"):
            target_modules = {prefix + name for name in layers}
            break

    full_names = fully_trained(model).keys()
    saved = {name.removesuffix(".weight") for name in full_names if name.endswith(".weight")}
    biased = {name.removesuffix(".bias") for name in full_names if name.endswith(".bias")} - saved
    bias = "none"
    if biased:
        bias = "lora_only" if all(name.endswith(".base_layer") for name in biased) else "all"

    is_causal_lm = prefix or hasattr(model, "prepare_inputs_for_generation")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal_lm else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: layer.r for name, layer in escaped.items() if layer.r != r},
        "alpha_pattern": {key: at.alpha for key, at in escaped.items() if at.alpha != alpha},
        "use_rslora": any(layer.rslora for layer in layers.values()),
        "use_dora": any(layer.lora_magnitude_vector is not None for layer in linear),
        "lora_bias": any(layer.lora_B.bias is not None for layer in linear),
        "lora_dropout": linear[0].dropout.p if linear else 0.0,
        "target_modules": sorted(target_modules),
        "modules_to_save": sorted(prefix + name for name in saved) or None,
        "bias": bias,
        "fan_in_fan_out": bool(linear) and isinstance(linear[0].base_layer, Conv1D),
        "inference_mode": True,
    }


def read_config(folder: str | Path) -> dict:
    """Read adapter_config.json. Raises UserError if a value is impossible or not supported."""
    path = plain_file(Path(folder) / "adapter_config.json")
    config = {
        **dict.fromkeys(("r", "lora_alpha", *PATTERNS)),
        **dict.fromkeys(FLAGS, False),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        **read_file(path),
    }
    for key, supported in SUPPORTED.items():
        if key in config and config[key] not in supported:
            found = f"{key} = {config[key]!r}"
            raise UserError(f"{path}: {found} is not supported; only {supported[0]!r} is.")
    init = config["init_lora_weights"]
    if init not in SUPPORTED_INITS:
        why = "such an adapter fits a base from which its first B A was subtracted, and is wrong"
        mend = "PEFT can convert it: save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise UserError(f"{path}: init_lora_weights = {init!r}: {why} on any other. {mend}.")
    dropout = config["lora_dropout"]
    is_valid = {
        "r": type(config["r"]) is int and config["r"] >= 1,
        "lora_alpha": is_positive(config["lora_alpha"]),
        "lora_dropout": dropout == 0 or (is_positive(dropout) and dropout < 1),
    }
    for key in FLAGS:
        is_valid[key] = type(config[key]) is bool
    for key in PATTERNS:
        is_valid[key] = are_patterns(config[key] or {})
    invalid = [f"{key} = {config[key]!r:.300}" for key, valid in is_valid.items() if not valid]
    raise_if_any(invalid, f"{path}: invalid values")
    return config


def is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def are_patterns(patterns: Any) -> bool:
    """Return whether these are regular expressions -> numbers, and safe to match.

    Others wrote them. Matching a repeated group, or many repetitions in a row, could take for ever.
    """
    if not isinstance(patterns, dict) or not all(is_positive(v) for v in patterns.values()):
        return False
    for pattern in patterns:
        if re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{?]", pattern)) > 4:
            return False
    return True


def read_tensors(folder: str | Path, config: dict) -> tuple[dict[str, Tensors], Tensors]:
    """Return the factors of each module, and the full weights that replace weights of the base.

    All are fp32. Raises UserError if the file is not what `config` says.
    """
    path = plain_file(Path(folder) / "adapter_model.safetensors")
    tensors = load_tensors(path)
    named = {}
    for key, tensor in tensors.items():
        named[key.removeprefix("base_model.model.")] = tensor.float()
    if len(tensors) > len({base_name(name) for name in named}):
        spellings = "with and without base_model.model. or base_layer"
        raise UserError(f"{path}: two tensors of one name, {spellings}.")
    modules: dict[str, Tensors] = {}
    full_weights = {}
    for name, tensor in named.items():
        # PEFT may write the modules to save three times over, and reads those of the short names.
        short_name = re.sub(r"\.(modules_to_save|original_module)\.", ".", name)
        match = re.fullmatch(rf"(.*)\.{FACTOR}", name)
        if match:
            module, factor = match.groups()
            modules.setdefault(module, {})[factor] = tensor
        elif short_name == name or short_name not in named:
            full_weights[name] = tensor
    check_factors(path, modules, config)
    return modules, full_weights


def load_tensors(path: Path) -> Tensors:
    """Load a safetensors file. Raises UserError if it is damaged or a number is not finite."""
    if not path.is_file():
        hint = ""
        pickle = path.with_suffix(".bin")
        if pickle.exists():
            load = f"torch.load({pickle.name!r})"
            convert = f"import torch, safetensors.torch as s; s.save_file({load}, {path.name!r})"
            hint = f'; convert it there: python -c "{convert}"'
        raise UserError(f"{path}: no such file; only safetensors adapters are read{hint}.")
    with library_errors(f"{path}: damaged, copy it again"):
        tensors = load_file(path)
    invalid = []
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            invalid.append(name)
    raise_if_any(invalid, f"{path}: not finite numbers")
    return tensors


def check_factors(path: Path, modules: dict[str, Tensors], config: dict) -> None:
    """Raise UserError unless each module has a pair of factors, as `config` says."""
    unpaired = [name for name, factors in modules.items() if not is_pair(factors)]
    if not modules:
        unpaired = ["there are none in the file"]
    raise_if_any(unpaired, f"{path}: not a pair of LoRA factors")
    ranks = {name: pattern_value(config["rank_pattern"], name, config["r"]) for name in modules}
    mismatched = [name for name, factors in modules.items() if lora_rank(factors) != ranks[name]]
    raise_if_any(mismatched, f"{path}: the rank differs from r and rank_pattern for")
    linear = {name: factors for name, factors in modules.items() if "lora_A.weight" in factors}
    for key, extra in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        belied = [name for name, factors in linear.items() if (extra in factors) != config[key]]
        setting = f"{key} = {config[key]} in the config"
        raise_if_any(belied, f"{path}: {setting} does not match the tensors of")


def is_pair(factors: Tensors) -> bool:
    """Return whether these are A [r, in] and B [out, r], with a linear layer's optional factors."""
    names = factors.keys()
    is_linear = names >= LINEAR and names <= LINEAR | OPTIONAL
    if not is_linear and names != EMBEDDING:
        return False
    A, B = factor_pair(factors)
    return A.dim() == 2 and B.dim() == 2 and len(A) == B.shape[1]


def factor_pair(factors: Tensors) -> tuple[Tensor, Tensor]:
    """Return A and B."""
    if "lora_A.weight" in factors:
        return factors["lora_A.weight"], factors["lora_B.weight"]
    return factors["lora_embedding_A"], factors["lora_embedding_B"]


def lora_rank(factors: Tensors) -> int:
    return len(factor_pair(factors)[0])


def base_name(name: str) -> str:
    """Return a parameter's name in the model without LoRA layers."""
    return name.replace(".base_layer.", ".")
