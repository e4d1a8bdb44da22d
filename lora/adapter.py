"""Save an adapter in PEFT's format, and load one into a model.

Every tensor must have a place in the model. PEFT only warns, and the adapter may have no effect.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors.torch import save_file
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora import adapter_format, target_modules
from lora.adapter_format import Tensors, base_name
from lora.common.errors import UserError, raise_if_any
from lora.common.toml_json import to_json
from lora.layer import LoRAEmbedding, LoRALayer, LoRALinear, LoRAOptions, lora_layers, wrap
from lora.target_modules import causal_lm_prefix, matches_ending, pattern_value

ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D, LoRALayer)  # Linear4bit is an nn.Linear


def factors(layer: LoRALayer) -> Tensors:
    """Return the trained tensors of a LoRA layer, under PEFT's names."""
    named = layer.named_parameters()
    return {name: weight for name, weight in named if not name.startswith("base_layer.")}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter of `model` in PEFT's format. Tensors are fp32, as they were trained."""
    layers = lora_layers(model)
    if not layers:
        raise UserError("the model has no LoRA layers; inject() makes them, and merge() ends them.")
    prefix = causal_lm_prefix(model)
    embeddings = target_modules.embedding_modules(model)
    weights = adapter_format.fully_trained(model)
    for name, layer in layers.items():
        for factor, weight in factors(layer).items():
            weights[f"{name}.{factor}"] = weight
        if layer in embeddings:  # rows may have been added, which the base's file lacks
            weights[f"{name}.base_layer.weight"] = layer.base_layer.weight
    tensors = {}
    for name, weight in weights.items():
        # A copy, because safetensors writes no tensors that share memory, such as tied ones.
        tensors[prefix + name] = weight.detach().float().cpu().clone()
    write_adapter(folder, adapter_format.adapter_config(model, layers, prefix), tensors)


def write_adapter(folder: str | Path, config: dict, tensors: Tensors) -> None:
    """Write both files of an adapter; `tensors` have their names in the model with its head."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(to_json(config), encoding="utf-8")
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Put the adapter in `folder`, ours or PEFT's, onto `model`.

    A model without LoRA layers gets them; in one that has them, their factors are replaced. Full
    weights that come along (modules to save, biases, embeddings with more rows) replace the base's.
    Raises UserError where a tensor has no parameter of its name and shape, or a trained parameter
    has no tensor.
    """
    folder = Path(folder)
    config = adapter_format.read_config(folder)
    modules, full_weights = adapter_format.read_tensors(folder, config)

    # 1. Find the place of every tensor, and make room for added rows of the embeddings.
    adaptable = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    place_of = find_places(model, folder, modules, adaptable)
    require_targets(folder, config, set(adaptable) - set(place_of.values()))
    full_weights = {base_name(name): tensor for name, tensor in full_weights.items()}
    parameter_names = [base_name(name) for name in all_parameters(model)]
    full_place_of = find_places(model, folder, full_weights, parameter_names)
    weights_by_place = {full_place_of[name]: tensor for name, tensor in full_weights.items()}
    fit_embeddings(model, weights_by_place, place_of.values())

    # 2. Wrap the layers that have factors.
    alphas = {}
    for name, place in place_of.items():
        alphas[place] = pattern_value(config["alpha_pattern"], name, config["lora_alpha"])
    was_injected = len(lora_layers(model)) > 0
    if not was_injected:
        layers = {}
        for name, place in place_of.items():
            base_layer = model.get_submodule(place)
            layers[place] = layer_for(base_layer, modules[name], alphas[place], config)
        wrap(model, layers)

    # 3. Give every tensor the name of its parameter.
    parameters = all_parameters(model)
    name_of = {base_name(name): name for name in parameters}
    tensors = {name_of[name]: tensor for name, tensor in weights_by_place.items()}
    for name, module_factors in modules.items():
        for factor, tensor in module_factors.items():
            tensors[f"{place_of[name]}.{factor}"] = tensor

    # 4. Check that they are what the model needs, and copy them.
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    raise_if_any(trained - tensors.keys(), f"{folder}: the adapter has no tensors for")
    frozen = {name for name in tensors if name.endswith(".base_layer.weight")}
    if was_injected:
        unexpected = tensors.keys() - trained - frozen
        see = "see target_modules, modules_to_save, use_dora"
        raise_if_any(unexpected, f"{folder}: not among what is trained ({see})")
        require_scales(model, folder, alphas, config["use_rslora"])
    require_shapes(folder, tensors, parameters)
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
        if name not in frozen:
            parameters[name].requires_grad_(True)


def all_parameters(model: nn.Module) -> Tensors:
    """Return the parameters by name; tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def find_places(
    model: nn.Module, folder: Path, names: Iterable[str], candidates: Iterable[str]
) -> dict[str, str]:
    """Return the name in the model, which may be with or without its head, for each of `names`."""
    prefix = causal_lm_prefix(model)
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = set(candidates)
    place_of, missing = {}, []
    for name in names:
        spellings = (name.removeprefix(prefix), name, backbone + name, name.removeprefix(backbone))
        places = [spelling for spelling in spellings if spelling in candidates]
        if places:
            place_of[name] = places[0]
        else:
            missing.append(name)
    raise_if_any(missing, f"{folder}: no such layer (or module to save) in the model")
    if len(set(place_of.values())) < len(place_of):
        listed = ", ".join(place_of)[:300]
        raise UserError(f"{folder}: two spellings of one layer of the model: {listed}.")
    return place_of


def require_targets(folder: Path, config: dict, without_factors: set[str]) -> None:
    """Raise UserError if the adapter was trained on a layer that has no factors in its file."""
    targets = config.get("target_modules")
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if not isinstance(targets, list) or narrowed:
        return
    saved = [f".{ending}." for ending in config.get("modules_to_save") or []]
    missing = []
    for name in without_factors:
        # PEFT puts no factors on a module that is saved, nor on one inside of it.
        is_saved = any(part in f".{name}." for part in saved)
        if matches_ending(name, targets) and not is_saved:
            missing.append(name)
    raise_if_any(missing, f"{folder}: the adapter has no tensors for what its target_modules name")


def require_scales(model: nn.Module, folder: Path, alphas: dict[str, float], rslora: bool) -> None:
    """Raise UserError if a LoRA layer of the model scales its update otherwise than the adapter."""
    differing = []
    for name, layer in lora_layers(model).items():
        if layer.alpha != alphas[name] or layer.rslora != rslora:
            differing.append(name)
    settings = "lora_alpha, alpha_pattern or use_rslora"
    raise_if_any(differing, f"{folder}: {settings} differ from the model's for")


def require_shapes(folder: Path, tensors: Tensors, parameters: Tensors) -> None:
    mismatches = []
    for name, tensor in tensors.items():
        shape, expected = list(tensor.shape), list(parameters[name].shape)
        if shape != expected:
            mismatches.append(f"{name} is {shape}, its place is {expected}")
    raise_if_any(mismatches, str(folder))


def layer_for(base_layer: nn.Module, tensors: Tensors, alpha: float, config: dict) -> LoRALayer:
    """Make a LoRA layer over `base_layer` with room for these tensors."""
    is_embedding = "lora_embedding_A" in tensors
    if is_embedding != isinstance(base_layer, nn.Embedding):
        kind = type(base_layer).__name__
        raise UserError(f"factors {', '.join(tensors)} do not belong on a {kind}.")
    flags = (config["use_rslora"], config["use_dora"], config["lora_bias"])
    r = adapter_format.lora_rank(tensors)
    options = LoRAOptions(r, alpha, config["lora_dropout"], *flags)
    layer_class = LoRAEmbedding if is_embedding else LoRALinear
    return layer_class(base_layer, options)


def fit_embeddings(model: nn.Module, full_weights: Tensors, adapted: Collection[str]) -> None:
    """Make room for embeddings that come with an adapter: rows for added tokens, an untied head.

    PEFT trains a copy of each module it saves. So tied weights are untied if it saves only one of
    them, or two that differ. But of an embedding with factors (one of `adapted`) it saves the
    base's own weight, which the head shares.
    """
    if not hasattr(model, "get_input_embeddings"):
        return
    embeddings = shared_embeddings(model)
    given = {name: full_weights[name] for name in embeddings if name in full_weights}
    rows = max((len(weight) for weight in given.values()), default=0)
    if rows > len(next(iter(embeddings.values()))):
        model.resize_token_embeddings(rows, mean_resizing=False)
        embeddings = shared_embeddings(model)
    adapted_names = [name for name in given if name.removesuffix(".weight") in adapted]
    for name in adapted_names:
        if given[name].shape == embeddings[name].shape:
            embeddings[name].copy_(given[name])
    are_trained = len(given) > len(adapted_names)
    weights = list(given.values())
    are_equal = len(weights) > 1 and all(torch.equal(weights[0], other) for other in weights[1:])
    if are_trained and not are_equal:
        target_modules.untie(model)


def shared_embeddings(model: nn.Module) -> Tensors:
    """Return the weight of the input embeddings under each of its names; tied, it has two."""
    weight = target_modules.unwrapped(model.get_input_embeddings()).weight
    parameters = all_parameters(model).items()
    return {base_name(name): parameter for name, parameter in parameters if parameter is weight}
