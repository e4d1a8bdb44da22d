"""PEFT's adapter format, read and written strictly: every tensor finds its place, or the error lists those that did not.

A folder with `adapter_config.json` and `adapter_model.safetensors`; tensors are called
`base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], where <module> is the name in the model
*with* its head. PEFT itself only warns about tensors without a place, and an adapter of another prefix then does nothing.
"""

from collections import Counter
import json
import math
from pathlib import Path
import re

from safetensors.torch import load_file, save_file
import torch
from torch import nn
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from lora.config import read_file
from lora.errors import UserError, refuse_any
from lora.foreign import one_line, plain_file
from lora.layer import LoRAEmbedding, LoRALinear, lora_layers, wrap
from lora.targets import by_pattern, embeddings_of, ends_with_one, prefix_of, untie

# Keys of adapter_config.json that change what the tensors mean, with the values that this reader can honour. What only
# says which layers were chosen (target_modules, layers_to_transform, ...) the tensors' names say as well.
HONOURED = {
    "peft_type": ("LORA",),
    "use_qalora": (False,),
    "use_bdlora": (False, None),
    "target_parameters": (None, []),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "alora_invocation_tokens"), (None,)),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config"), (None,)),
}
DEFAULTS = {
    **dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern"), None),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), False),
    **{"lora_dropout": 0.0, "init_lora_weights": True},
}
# Whether A and B began at zero product on the base as it is. PiSSA and its like begin by taking B A out of the base.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
LINEAR, EMBEDDING = {"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}
KINDS = (nn.Linear, nn.Embedding, Conv1D, LoRALinear, LoRAEmbedding)  # Linear4bit is an nn.Linear
FACTOR = r"(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?"


def factors(layer):
    """The trained tensors of a LoRA layer, under PEFT's names."""
    return {name: weight for name, weight in layer.named_parameters() if not name.startswith("base_layer.")}


def trained_whole(model):
    """(name, parameter) of what is trained beside the LoRA factors; tied weights under each of their names."""
    every = model.named_parameters(remove_duplicate=False)
    return [(name, p) for name, p in every if p.requires_grad and not re.search(rf"\.{FACTOR}$", name)]


def save_adapter(model, folder):
    """Write the adapter of `model` in PEFT's format. Tensors are fp32, as they were trained."""
    layers, prefix = lora_layers(model), prefix_of(model)
    tensors = {f"{name}.{factor}": weight for name, layer in layers.items() for factor, weight in factors(layer).items()}
    for name, layer in layers.items():
        if layer in embeddings_of(model):  # they may have been given rows that no base has
            tensors[f"{name}.base_layer.weight"] = layer.base_layer.weight
    tensors |= dict(trained_whole(model))
    copies = {f"{prefix}{name}": weight.detach().float().cpu().clone() for name, weight in tensors.items()}  # untied
    write(folder, config_of(model, layers, prefix), copies)


def write(folder, config, tensors):
    """Write the two files; the names of the `tensors` are those in the model with its head."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def config_of(model, layers, prefix):
    """adapter_config.json of these LoRA layers; r and lora_alpha are those that most of them have."""
    r, alpha = (Counter(getattr(layer, key) for layer in layers.values()).most_common(1)[0][0] for key in ("r", "alpha"))
    linear = [layer for layer in layers.values() if isinstance(layer, LoRALinear)]
    endings = {name.rpartition(".")[2] for name in layers}
    # Endings alone say which layers are meant, unless a layer with such an ending is not wrapped.
    ambiguous = any(n.rpartition(".")[2] in endings and hasattr(m, "weight") for n, m in model.named_modules())
    whole = [name for name, _ in trained_whole(model)]
    saved = {name.removesuffix(".weight") for name in whole if name.endswith(".weight")}
    biases = [name for name in whole if name.endswith(".bias") and name.removesuffix(".bias") not in saved]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if prefix or hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(prefix + n): layer.r for n, layer in layers.items() if layer.r != r},
        "alpha_pattern": {re.escape(prefix + n): layer.alpha for n, layer in layers.items() if layer.alpha != alpha},
        "use_rslora": any(layer.rslora for layer in layers.values()),
        "use_dora": any(layer.lora_magnitude_vector is not None for layer in linear),
        "lora_bias": any(layer.lora_B.bias is not None for layer in linear),
        "lora_dropout": linear[0].dropout.p if linear else 0.0,
        "target_modules": sorted(prefix + name for name in layers) if ambiguous else sorted(endings),
        "modules_to_save": sorted(prefix + name for name in saved) or None,
        "bias": "none" if not biases else "lora_only" if all(".base_layer." in name for name in biases) else "all",
        "fan_in_fan_out": bool(linear) and isinstance(linear[0].base_layer, Conv1D),
        "inference_mode": True,
    }


def read_config(folder):
    """adapter_config.json, refused where it asks for something that this reader would have to ignore."""
    path = plain_file(Path(folder) / "adapter_config.json")
    config = DEFAULTS | read_file(path)
    for key, allowed in HONOURED.items():
        if key in config and config[key] not in allowed:
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported; only {allowed[0]!r} is.")
    if config["init_lora_weights"] not in PLAIN_STARTS:
        why = "such an adapter belongs on a base from which a part was taken out, and is wrong on any other"
        mend = "PEFT can convert it: save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise UserError(f"{path}: init_lora_weights = {config['init_lora_weights']!r}: {why}. {mend}.")
    dropout = config["lora_dropout"]
    fine = {
        "r": type(config["r"]) is int and config["r"] >= 1,
        "lora_alpha": is_scale(config["lora_alpha"]),
        "lora_dropout": dropout == 0 or is_scale(dropout) and dropout < 1,
        **{key: type(config[key]) is bool for key in ("use_rslora", "use_dora", "lora_bias")},
        **{key: are_patterns(config[key] or {}) for key in ("rank_pattern", "alpha_pattern")},
    }
    refuse_any((f"{key} = {config[key]!r:.300}" for key in fine if not fine[key]), f"{path}: nothing that LoRA can have")
    return config


def is_scale(value):
    return type(value) in (int, float) and 0 < value < math.inf


def are_patterns(patterns):
    """Whether these are regular expressions -> numbers, and none of which matching could take for ever.

    That is a repeated group, or many repetitions and options in a row; they come with files that others wrote.
    """
    if not (isinstance(patterns, dict) and all(map(is_scale, patterns.values()))):
        return False
    return not any(re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{?]", pattern)) > 4 for pattern in patterns)


def read_tensors(folder, config):
    """({module name: {factor: tensor}}, {parameter name: tensor that stands in the base's place}), in fp32."""
    path = plain_file(Path(folder) / "adapter_model.safetensors")
    if not path.is_file():
        old, new = (repr(path.with_suffix(suffix).name) for suffix in (".bin", ".safetensors"))
        convert = f"import torch, safetensors.torch as s; s.save_file(torch.load({old}), {new})"
        hint = f'; convert it there: python -c "{convert}"' if path.with_suffix(".bin").exists() else ""
        raise UserError(f"{path}: no such file; only safetensors adapters are read{hint}.")
    with one_line(f"{path}: damaged, copy it again"):
        tensors = load_file(path)
    odd = [key for key, tensor in tensors.items() if not (tensor.is_floating_point() and tensor.float().isfinite().all())]
    refuse_any(odd, f"{path}: not finite numbers")
    named = {key.removeprefix("base_model.model."): tensor.float() for key, tensor in tensors.items()}
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
        raise UserError(f"{path}: two tensors of one name, with and without base_model.model. or base_layer.")
    odd = [name for name, found in modules.items() if not is_pair(found)]
    refuse_any(odd if modules else ["there are none in the file"], f"{path}: not a pair of LoRA factors")
    odd = [name for name, found in modules.items() if rank(found) != by_pattern(config["rank_pattern"], name, config["r"])]
    refuse_any(odd, f"{path}: of another rank than r and rank_pattern say")
    linear = {name: found for name, found in modules.items() if "lora_A.weight" in found}
    for key, factor in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        odd = [name for name, found in linear.items() if (factor in found) != config[key]]
        refuse_any(odd, f"{path}: {key} = {config[key]} in the config is not so of these layers")
    return modules, whole


def is_pair(found):
    """Whether {factor: tensor} are a layer's A [r, in] and B [out, r], with what else a linear layer may have."""
    if found.keys() != EMBEDDING and not LINEAR <= found.keys() <= LINEAR | {"lora_B.bias", "lora_magnitude_vector"}:
        return False
    a, b = (found[name] for name in sorted(found.keys() & (LINEAR | EMBEDDING)))
    return a.dim() == b.dim() == 2 and len(a) == b.shape[1]


def rank(found):
    """The rows of A in {factor: tensor}."""
    return next(len(tensor) for name, tensor in found.items() if "_A" in name)


def write_portable(folder, output):
    """Rewrite the adapter in `folder` so that every reader applies the same scale. Raises UserError where that cannot be.

    vLLM knows no patterns, and llama.cpp divides alpha by each tensor's own rank and knows no rsLoRA. Here every layer is
    filled up with zeros to the largest rank R, its scale is in B, and r = lora_alpha = R.
    """
    config = read_config(folder)
    modules, whole = read_tensors(folder, config)
    if config["use_dora"] or config["lora_bias"]:
        raise UserError(f"{folder}: DoRA and lora_bias have no portable form; merge the adapter instead.")
    lost = [name for name in whole if not name.endswith(".base_layer.weight")]
    refuse_any(lost, f"{folder}: merge the adapter instead: vLLM and llama.cpp read no whole weights, and it has")
    largest = max(map(rank, modules.values()))
    tensors = {}
    for module, found in modules.items():
        a_name, b_name = sorted(found)
        r, alpha = rank(found), by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
        scaling = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        tensors[f"{module}.{a_name}"] = F.pad(found[a_name], (0, 0, 0, largest - r))
        tensors[f"{module}.{b_name}"] = F.pad(found[b_name] * scaling, (0, largest - r))
    config |= {"r": largest, "lora_alpha": largest, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    write(output, config, tensors)


@torch.no_grad()
def load_adapter(model, folder):
    """Put the adapter in `folder` (ours or PEFT's) onto `model`; on layers already injected, replace their factors.

    Whole weights that come along (modules_to_save, biases, embeddings with more rows) take the place of the base's.
    Raises UserError if a tensor finds no place, has another shape than its place, or if what is trained gets none.
    """
    config = read_config(folder)
    modules, whole = read_tensors(folder, config)
    layers = [name for name, module in model.named_modules() if isinstance(module, KINDS)]
    place_of = places(model, folder, modules, layers)
    require_targets(folder, config, set(layers) - set(place_of.values()))
    at = places(model, folder, map(plain, whole), map(plain, parameters_of(model)))
    whole = {at[plain(name)]: tensor for name, tensor in whole.items()}
    fit_embeddings(model, whole, place_of.values())
    alphas = {where: by_pattern(config["alpha_pattern"], name, config["lora_alpha"]) for name, where in place_of.items()}
    injected = bool(lora_layers(model))
    if not injected:
        wrap(model, {w: layer_for(model.get_submodule(w), modules[n], alphas[w], config) for n, w in place_of.items()})

    theirs = {f"{place_of[name]}.{factor}": tensor for name, found in modules.items() for factor, tensor in found.items()}
    ours = parameters_of(model)
    names = {plain(name): name for name in ours}
    theirs |= {names[name]: tensor for name, tensor in whole.items()}
    trained = {name for name, weight in ours.items() if weight.requires_grad}
    refuse_any(trained - theirs.keys(), f"{folder}: the adapter has no tensors for")
    if injected:
        strange = {name for name in theirs.keys() - trained if not name.endswith(".base_layer.weight")}
        refuse_any(strange, f"{folder}: not among what is trained (see target_modules, modules_to_save, use_dora)")
    scales = {where: (alpha, config["use_rslora"]) for where, alpha in alphas.items()}
    other = [where for where, layer in lora_layers(model).items() if (layer.alpha, layer.rslora) != scales[where]]
    refuse_any(other, f"{folder}: of another lora_alpha, alpha_pattern or use_rslora than here")
    odd = {name: (list(t.shape), list(ours[name].shape)) for name, t in theirs.items() if t.shape != ours[name].shape}
    refuse_any((f"{name} is {shape}, its place is {room}" for name, (shape, room) in odd.items()), str(folder))
    for name, tensor in theirs.items():
        ours[name].copy_(tensor)
        if not name.endswith(".base_layer.weight"):
            ours[name].requires_grad_(True)


def plain(name):
    """A parameter's name as it is without LoRA layers in the model."""
    return name.replace(".base_layer.", ".")


def parameters_of(model):
    """Name -> parameter; tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def places(model, folder, names, among):
    """Name in an adapter's file -> name in the model, which may be with or without its head where the other is not."""
    prefix, inner, among = prefix_of(model), f"{getattr(model, 'base_model_prefix', '')}.", set(among)
    spelled = {name: (name.removeprefix(prefix), name, inner + name, name.removeprefix(inner)) for name in names}
    found = {name: next((s for s in spellings if s in among), None) for name, spellings in spelled.items()}
    lost = [name for name, where in found.items() if where is None]
    refuse_any(lost, f"{folder}: no such layer (or module to save) in the model")
    if len(set(found.values())) < len(found):
        raise UserError(f"{folder}: two spellings of one layer of the model: {', '.join(found)[:300]}.")
    return found


def require_targets(folder, config, others):
    """That none of the `others`, layers without factors in the file, is one that the adapter was trained on."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in ("layers_to_transform", "exclude_modules")):
        return
    whole = config.get("modules_to_save") or []
    absent = {name for name in others if ends_with_one(name, targets) and not ends_with_one(name, whole)}
    refuse_any(absent, f"{folder}: the adapter has no tensors for what its target_modules name")


def layer_for(base_layer, tensors, alpha, config):
    """A LoRA layer over `base_layer` with room for these tensors."""
    rslora = config["use_rslora"]
    if ("lora_embedding_A" in tensors) != isinstance(base_layer, nn.Embedding):
        raise UserError(f"factors {', '.join(tensors)} do not belong on a {type(base_layer).__name__}.")
    if "lora_embedding_A" in tensors:
        return LoRAEmbedding(base_layer, rank(tensors), alpha, rslora)
    dora, bias = "lora_magnitude_vector" in tensors, "lora_B.bias" in tensors
    return LoRALinear(base_layer, rank(tensors), alpha, config["lora_dropout"], rslora, dora, bias)


def fit_embeddings(model, whole, adapted):
    """Make room for embeddings that came with an adapter (parameter name -> tensor): rows for added tokens, and a head
    of its own where the base ties it and the adapter does not. `adapted` are the names of the layers with factors.

    PEFT trains a copy of each module it saves: of tied weights, a lone one or two that differ are tied no more. What it
    saves of an embedding with factors is the base's own weight, which the head shares.
    """
    if not hasattr(model, "get_input_embeddings"):
        return
    shared = shared_embeddings(model)
    rows = max((len(whole[name]) for name in shared if name in whole), default=0)
    if rows > len(next(iter(shared.values()))):
        model.resize_token_embeddings(rows, mean_resizing=False)
        shared = shared_embeddings(model)
    theirs = {name: whole[name] for name in shared if name in whole}
    of_base = [name for name in theirs if name.removesuffix(".weight") in adapted]
    for name in of_base:
        if theirs[name].shape == shared[name].shape:
            shared[name].copy_(theirs[name])
    if len(theirs) > len(of_base) and not (len(theirs) > 1 and torch.equal(*list(theirs.values())[:2])):
        untie(model)


def shared_embeddings(model):
    """Plain name -> parameter: the input embeddings, under each of their names where they are tied."""
    embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "base_layer", embeddings).weight
    return {plain(name): parameter for name, parameter in parameters_of(model).items() if parameter is weight}
