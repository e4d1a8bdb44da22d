"""Which modules of a model are meant: targets and modules to save by name as PEFT has it,
embeddings, head, pooler.
"""

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora.common.errors import UserError


def layer_sizes(layer):
    """(in, out) of nn.Linear, Conv1D or Linear4bit, or of the one under a LoRALinear."""
    layer = getattr(layer, "base_layer", layer)
    return (
        (layer.nx, layer.nf)
        if isinstance(layer, Conv1D)
        else (layer.in_features, layer.out_features)
    )


def decoder_layers(model):
    """The model's first list of modules, which are its layers; empty where it has none."""
    return next((module for module in model.modules() if isinstance(module, nn.ModuleList)), [])


def causal_lm_prefix(model):
    """What stands before a module's name in the causal LM around it: "model." for a bare
    LlamaModel, else "".

    An encoder is used without a head of its own, so its names stay as they are.
    """
    inner = getattr(model, "base_model_prefix", "")
    return f"{inner}." if inner and not hasattr(model, inner) and is_causal(model) else ""


def is_causal(model):
    """Whether no position sees a later one, as the attention modules of transformers say of
    themselves.
    """
    return all(module.is_causal for module in model.modules() if hasattr(module, "is_causal"))


def embedding_modules(model):
    """[input embeddings, output head], as far as the model has them."""
    getters = (getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output"))
    return [module for module in (get() for get in getters) if module is not None]


def is_tied(model):
    """Whether the output head shares its weight with the embeddings."""
    weights = [getattr(module, "base_layer", module).weight for module in embedding_modules(model)]
    return len(weights) == 2 and weights[0] is weights[1]


def untie(model):
    """Give a head that shares its weight with the embeddings a copy of its own."""
    if is_tied(model):
        head = getattr(model.get_output_embeddings(), "base_layer", model.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def linear_names(model):
    """Names of the layers that "all-linear" means: every linear one but the output head, and a
    pooler nobody reads.
    """
    kept_out = embedding_modules(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not is_pooler(name)
        and not any(module is m for m in kept_out)
    ]


def is_pooler(name):
    """A pooler's weights are read by no head here: they may be absent, and are not trained."""
    return "pooler" in name.split(".")


def require_all_grads(model):
    """Full fine-tuning: every weight requires grad, but for a pooler's; those of 4 bits cannot."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and not is_pooler(name))


def matches_ending(name, endings):
    """Whether a module's name ends with whole parts such as "q_proj" or "self_attn.q_proj"."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def matching_names(model, target_modules):
    """The linear layers that `target_modules` names.

    Each target is "all-linear", the end of a name ("q_proj", "self_attn.q_proj"), or a regular
    expression for the whole name, as PEFT has it. Every one of them must match something; the head
    must be named.
    """
    chosen = set()
    prefix, heads = (
        causal_lm_prefix(model),
        [m for m in embedding_modules(model) if isinstance(m, nn.Linear)],
    )
    known = [
        *linear_names(model),
        *(name for name, module in model.named_modules() if any(module is h for h in heads)),
    ]
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    if not targets:
        raise UserError("target_modules is empty; name layers, or leave it out for all-linear.")
    for target in targets:
        if target == "all-linear":
            found = linear_names(model)
        elif re.fullmatch(r"[\w.]+", target):
            found = [n for n in known if matches_ending(prefix + n, [target])]
        else:
            try:
                found = [n for n in known if re.fullmatch(target, prefix + n)]
            except re.error as error:
                raise UserError(
                    f"target_modules: {target!r} is no regular expression ({error})."
                ) from None
        if not found:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
            raise UserError(
                f"target_modules: {target!r} matches no linear layer; there are {endings}."
            )
        chosen.update(found)
    return [name for name in known if name in chosen]


def by_pattern(patterns, name, default):
    """The value of the first of PEFT's patterns that matches the end of `name`, else `default`."""
    try:
        found = (
            value
            for pattern, value in (patterns or {}).items()
            if re.match(rf"(.*\.)?({pattern})$", name)
        )
        return next(found, default)
    except re.error as error:
        raise UserError(
            f"rank_pattern, alpha_pattern: {error.pattern!r} is no regular expression ({error})."
        ) from None


def named_modules(model, endings):
    """Names of the modules that end so and hold weights; each of the endings must match one."""
    holding = [
        name
        for name, module in model.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    ]
    found = {
        ending: [name for name in holding if matches_ending(name, [ending])] for ending in endings
    }
    for ending, names in found.items():
        if not names:
            raise UserError(
                f"modules_to_save: {ending!r} is not the end of the name of a module with weights, as embed_tokens is."
            )
    return [name for names in found.values() for name in names]
