"""Finds modules of a model: by PEFT's rules for names, and by their part in the model."""

from collections.abc import Iterable, Sequence
import re
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from lora.common.errors import UserError


def unwrapped(layer: nn.Module) -> nn.Module:
    """Return the layer under a LoRA layer, or the layer itself."""
    return getattr(layer, "base_layer", layer)


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """Return (in, out) of nn.Linear, Conv1D or Linear4bit, or of the one under a LoRALinear."""
    layer = unwrapped(layer)
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the model's layers, which are its first list of modules; empty where it has none."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(lists, nn.ModuleList())


def causal_lm_prefix(model: nn.Module) -> str:
    """Return what precedes a module's name in the causal LM around a bare backbone, as "model.".

    It is "" for a model with its head, and for an encoder, which is used without its own head.
    """
    backbone = getattr(model, "base_model_prefix", "")
    is_bare = bool(backbone) and not hasattr(model, backbone)
    return f"{backbone}." if is_bare and is_causal(model) else ""


def is_causal(model: nn.Module) -> bool:
    """Return whether no position sees a later one, as the model's attention modules state.

    Where none does, as GPT-J's and DeBERTa's, a model is causal if it has a class for a causal LM.
    """
    stated = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if not stated:
        return type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return all(stated)


def first_position(model: nn.Module) -> int:
    """Return the position of a text's first token: RoBERTa's padding index + 1, otherwise 0."""
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding_idx = getattr(table, "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """Return the input embeddings and the output head, as far as the model has them."""
    if not hasattr(model, "get_output_embeddings"):
        return []  # not a model of transformers
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module for module in modules if module is not None]


def is_tied(model: nn.Module) -> bool:
    """Return whether the output head shares its weight with the input embeddings."""
    weights = [unwrapped(module).weight for module in embedding_modules(model)]
    return len(weights) == 2 and weights[0] is weights[1]


def untie(model: nn.Module) -> None:
    """Give an output head that shares its weight with the input embeddings a copy of its own."""
    if is_tied(model):
        head = unwrapped(model.get_output_embeddings())
        for name, parameter in list(head.named_parameters()):  # of BERT, the bias is tied too
            setattr(head, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        model.config.tie_word_embeddings = False


def is_pooler(name: str) -> bool:
    """Return whether a module is in a pooler, which no head here reads, and a base may lack."""
    return "pooler" in name.split(".")


def make_all_trainable(model: nn.Module) -> None:
    """Make every weight trainable, except a pooler's and those in 4 bits, which cannot be."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and not is_pooler(name))


def linear_names(model: nn.Module) -> list[str]:
    """Return the layers "all-linear" means: all linear layers but the output head and a pooler.

    Some routers of experts (Llama 4, Phi-3.5-MoE) are nn.Linear too, but return more than products.
    Gemma 3n clamps the weights of its altup.
    """
    embeddings = embedding_modules(model)
    names = []
    for name, module in model.named_modules():
        is_router = type(module).__name__.endswith("Router")
        is_called = not (is_router or "altup" in name.split(".") or is_read_by_mamba(model, name))
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and is_called
        if is_linear and module not in embeddings and not is_pooler(name):
            names.append(name)
    return names


def is_read_by_mamba(model: nn.Module, name: str) -> bool:
    """Return whether a layer's weight is given to a kernel by a mixer of Mamba or Mamba-2."""
    parent, _, leaf = name.rpartition(".")
    if leaf not in ("x_proj", "dt_proj", "out_proj"):
        return False
    mixer = model.get_submodule(parent)
    if type(mixer).__name__ == "JambaMambaMixer":
        return leaf == "dt_proj"  # it calls the others
    is_mamba = hasattr(mixer, "dt_proj") or hasattr(mixer, "chunk_size")  # Mamba-2 has no dt_proj
    return hasattr(mixer, "A_log") and is_mamba


def stacked_weights(model: nn.Module) -> dict[str, int]:
    """Return the sizes of the layers' weights of three dimensions: experts kept as one tensor."""
    sizes = {}
    for name, parameter in decoder_layers(model).named_parameters():
        if parameter.ndim == 3:
            sizes[name] = parameter.numel()
    return sizes


def matches_ending(name: str, endings: Iterable[str]) -> bool:
    """Return whether a name ends with whole parts such as "q_proj" or "self_attn.q_proj"."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def matches_target(name: str, target: str) -> bool:
    """Return whether a name ends with `target`, or matches it in full as a regular expression."""
    if re.fullmatch(r"[\w.]+", target):
        return matches_ending(name, [target])
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        found = f"{target!r} is no regular expression ({error})"
        raise UserError(f"target_modules: {found}.") from None


def find_target_modules(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Return the names of the linear layers that `target_modules` means, in the model's order.

    Each target is "all-linear", the end of a name ("q_proj", "self_attn.q_proj"), or a regular
    expression for the full name, as in PEFT; each must match. all-linear leaves the head out.
    """
    prefix = causal_lm_prefix(model)
    all_linear = linear_names(model)
    heads = [module for module in embedding_modules(model) if isinstance(module, nn.Linear)]
    candidates = all_linear + [name for name, module in model.named_modules() if module in heads]
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    if not targets:
        raise UserError("target_modules is empty; name layers, or leave it out for all-linear.")
    chosen: set[str] = set()
    for target in targets:
        matches = all_linear
        if target != "all-linear":
            matches = [name for name in candidates if matches_target(prefix + name, target)]
        if not matches:
            endings = sorted({name.rpartition(".")[2] for name in candidates})
            found = f"{target!r} matches no layer that LoRA adapts; there are {', '.join(endings)}"
            raise UserError(f"target_modules: {found}.")
        chosen.update(matches)
    return [name for name in candidates if name in chosen]


def find_modules_to_save(model: nn.Module, endings: Iterable[str]) -> list[str]:
    """Return the modules with weights of their own and one of these endings; each must match."""
    candidates = []
    for name, module in model.named_modules():
        if name and list(module.parameters(recurse=False)):
            candidates.append(name)
    names: list[str] = []
    for ending in endings:
        matches = [name for name in candidates if matches_ending(name, [ending])]
        if not matches:
            expected = "the end of the name of a module with weights, as embed_tokens is"
            raise UserError(f"modules_to_save: {ending!r} is not {expected}.")
        names += [name for name in matches if name not in names]
    return names


def classification_head(model: nn.Module) -> list[str]:
    """Return the layers above the backbone of transformers' classifiers; [] of another model."""
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return []
    backbone = f"{model.base_model_prefix}."
    names = []
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)) and not name.startswith(backbone):
            names.append(name)
    return names


def matches_pattern(pattern: str, name: str) -> bool:
    """Return whether a key of PEFT's rank_pattern or alpha_pattern matches the end of a name."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        found = f"{pattern!r} is no regular expression ({error})"
        raise UserError(f"rank_pattern, alpha_pattern: {found}.") from None


def pattern_value(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first of PEFT's patterns that matches `name`, or `default`."""
    for pattern, value in (patterns or {}).items():
        if matches_pattern(pattern, name):
            return value
    return default
