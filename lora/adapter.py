"""Save an adapter in PEFT's format, and load one into a model: every tensor finds its place, or an
error lists the others.

PEFT itself only warns about tensors without a place, and an adapter of another prefix then has no
effect.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora.adapter_format import config_of, plain, rank, read_config, read_tensors, trained_whole
from lora.common.errors import UserError, raise_if_any
from lora.layer import LoRAEmbedding, LoRALinear, lora_layers, wrap
from lora.target_modules import (
    by_pattern,
    causal_lm_prefix,
    embedding_modules,
    matches_ending,
    untie,
)

KINDS = (nn.Linear, nn.Embedding, Conv1D, LoRALinear, LoRAEmbedding)  # Linear4bit is an nn.Linear


def factors(layer):
    """The trained tensors of a LoRA layer, under PEFT's names."""
    return {
        name: weight
        for name, weight in layer.named_parameters()
        if not name.startswith("base_layer.")
    }


def save_adapter(model, folder):
    """Write the adapter of `model` in PEFT's format. Tensors are fp32, as they were trained."""
    layers, prefix = lora_layers(model), causal_lm_prefix(model)
    tensors = {
        f"{name}.{factor}": weight
        for name, layer in layers.items()
        for factor, weight in factors(layer).items()
    }
    for name, layer in layers.items():
        if layer in embedding_modules(model):  # they may have been given rows that no base has
            tensors[f"{name}.base_layer.weight"] = layer.base_layer.weight
    tensors |= dict(trained_whole(model))
    copies = {
        f"{prefix}{name}": weight.detach().float().cpu().clone() for name, weight in tensors.items()
    }  # untied
    write(folder, config_of(model, layers, prefix), copies)


def write(folder, config, tensors):
    """Write the two files; the names of the `tensors` are those in the model with its head."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@torch.no_grad()
def load_adapter(model, folder):
    """Put the adapter in `folder` (ours or PEFT's) onto `model`; on layers already injected,
    replace their factors.

    Whole weights that come along (modules_to_save, biases, embeddings with more rows) take the
    place of the base's. Raises UserError if a tensor finds no place, has another shape than its
    place, or if what is trained gets none.
    """
    config = read_config(folder)
    modules, whole = read_tensors(folder, config)
    layers = [name for name, module in model.named_modules() if isinstance(module, KINDS)]
    place_of = places(model, folder, modules, layers)
    require_targets(folder, config, set(layers) - set(place_of.values()))
    at = places(model, folder, map(plain, whole), map(plain, parameters_of(model)))
    whole = {at[plain(name)]: tensor for name, tensor in whole.items()}
    fit_embeddings(model, whole, place_of.values())
    alphas = {
        where: by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
        for name, where in place_of.items()
    }
    injected = bool(lora_layers(model))
    if not injected:
        wrap(
            model,
            {
                w: layer_for(model.get_submodule(w), modules[n], alphas[w], config)
                for n, w in place_of.items()
            },
        )

    theirs = {
        f"{place_of[name]}.{factor}": tensor
        for name, found in modules.items()
        for factor, tensor in found.items()
    }
    ours = parameters_of(model)
    names = {plain(name): name for name in ours}
    theirs |= {names[name]: tensor for name, tensor in whole.items()}
    trained = {name for name, weight in ours.items() if weight.requires_grad}
    raise_if_any(trained - theirs.keys(), f"{folder}: the adapter has no tensors for")
    if injected:
        strange = {
            name for name in theirs.keys() - trained if not name.endswith(".base_layer.weight")
        }
        raise_if_any(
            strange,
            f"{folder}: not among what is trained (see target_modules, modules_to_save, use_dora)",
        )
    scales = {where: (alpha, config["use_rslora"]) for where, alpha in alphas.items()}
    other = [
        where
        for where, layer in lora_layers(model).items()
        if (layer.alpha, layer.rslora) != scales[where]
    ]
    raise_if_any(other, f"{folder}: of another lora_alpha, alpha_pattern or use_rslora than here")
    odd = {
        name: (list(t.shape), list(ours[name].shape))
        for name, t in theirs.items()
        if t.shape != ours[name].shape
    }
    raise_if_any(
        (f"{name} is {shape}, its place is {room}" for name, (shape, room) in odd.items()),
        str(folder),
    )
    for name, tensor in theirs.items():
        ours[name].copy_(tensor)
        if not name.endswith(".base_layer.weight"):
            ours[name].requires_grad_(True)


def parameters_of(model):
    """Name -> parameter; tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def places(model, folder, names, among):
    """Name in an adapter's file -> name in the model, which may be with or without its head where
    the other is not.
    """
    prefix, inner, among = (
        causal_lm_prefix(model),
        f"{getattr(model, 'base_model_prefix', '')}.",
        set(among),
    )
    spelled = {
        name: (name.removeprefix(prefix), name, inner + name, name.removeprefix(inner))
        for name in names
    }
    found = {
        name: next((s for s in spellings if s in among), None)
        for name, spellings in spelled.items()
    }
    lost = [name for name, where in found.items() if where is None]
    raise_if_any(lost, f"{folder}: no such layer (or module to save) in the model")
    if len(set(found.values())) < len(found):
        raise UserError(
            f"{folder}: two spellings of one layer of the model: {', '.join(found)[:300]}."
        )
    return found


def require_targets(folder, config, others):
    """That none of the `others`, layers without factors in the file, is one that the adapter was
    trained on.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(
        config.get(key) for key in ("layers_to_transform", "exclude_modules")
    ):
        return
    whole = config.get("modules_to_save") or []
    absent = {
        name for name in others if matches_ending(name, targets) and not matches_ending(name, whole)
    }
    raise_if_any(absent, f"{folder}: the adapter has no tensors for what its target_modules name")


def layer_for(base_layer, tensors, alpha, config):
    """A LoRA layer over `base_layer` with room for these tensors."""
    rslora = config["use_rslora"]
    if ("lora_embedding_A" in tensors) != isinstance(base_layer, nn.Embedding):
        raise UserError(
            f"factors {', '.join(tensors)} do not belong on a {type(base_layer).__name__}."
        )
    if "lora_embedding_A" in tensors:
        return LoRAEmbedding(base_layer, rank(tensors), alpha, rslora)
    dora, bias = "lora_magnitude_vector" in tensors, "lora_B.bias" in tensors
    return LoRALinear(base_layer, rank(tensors), alpha, config["lora_dropout"], rslora, dora, bias)


def fit_embeddings(model, whole, adapted):
    """Make room for embeddings that came with an adapter (parameter name -> tensor): rows for added
    tokens, and a head of its own where the base ties it and the adapter does not. `adapted` are the
    names of the layers with factors.

    PEFT trains a copy of each module it saves: of tied weights, a lone one or two that differ are
    tied no more. What it saves of an embedding with factors is the base's own weight, which the
    head shares.
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
    if len(theirs) > len(of_base) and not (
        len(theirs) > 1 and torch.equal(*list(theirs.values())[:2])
    ):
        untie(model)


def shared_embeddings(model):
    """Plain name -> parameter: the input embeddings, under each of their names where they are tied."""
    embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "base_layer", embeddings).weight
    return {
        plain(name): parameter
        for name, parameter in parameters_of(model).items()
        if parameter is weight
    }
