"""LoRA on one page: y = W x + b + (alpha / r) B A x, with W and b frozen (Hu et al. 2021, equation 3).

Names are PEFT's (`base_layer`, `lora_A`, `lora_B`), so that exporting an adapter is a rename. Works on any model:
`inject` puts `LoRALinear` over its linear layers, `merge` folds the update into them and takes the wrappers away.
"""

import re

import torch
from torch import nn
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from lora.errors import UserError


class LoRALinear(nn.Module):
    """A frozen linear layer [in -> out] with a trainable update of rank r, kept in fp32.

    `base_layer` is nn.Linear (weight [out, in]) or transformers' Conv1D (weight [in, out]). A is drawn as PEFT draws
    it (kaiming uniform, a = sqrt(5)), B is zero: a fresh layer computes exactly what its base layer computes.
    """

    def __init__(self, base_layer, r, alpha, dropout=0.0):
        super().__init__()
        if isinstance(base_layer, Conv1D):
            n_in, n_out = base_layer.weight.shape
        else:
            n_out, n_in = base_layer.weight.shape
        if not 1 <= r <= min(n_in, n_out):
            raise UserError(f"lora_r = {r}: a layer of {n_in} x {n_out} has room for a rank of 1..{min(n_in, n_out)}.")
        self.base_layer = base_layer
        self.r, self.alpha = r, alpha
        self.lora_A = nn.Linear(n_in, r, bias=False, device=base_layer.weight.device)  # drawn by nn.Linear's own init
        self.lora_B = nn.Linear(r, n_out, bias=False, device=base_layer.weight.device)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)

    @property
    def scaling(self):
        return self.alpha / self.r

    def forward(self, x):
        """x [..., in] -> [..., out]. The factors are cast to x's type, whatever autocast does then."""
        x_dropped = self.dropout(x)
        update = F.linear(F.linear(x_dropped, self.lora_A.weight.to(x.dtype)), self.lora_B.weight.to(x.dtype))
        return self.base_layer(x) + update * self.scaling

    @torch.no_grad()
    def merged(self):
        """The base layer with the update folded in: summed in fp32, rounded once to the base's type."""
        update = self.lora_B.weight @ self.lora_A.weight * self.scaling
        if isinstance(self.base_layer, Conv1D):
            update = update.T
        weight = self.base_layer.weight
        weight.copy_((weight.float() + update).to(weight.dtype))
        return self.base_layer


def prefix_of(model):
    """What stands before a module's name in the causal LM around it: "model." for a bare LlamaModel, else "".

    An encoder is used without a head of its own, so its names stay as they are.
    """
    inner = getattr(model, "base_model_prefix", "")
    return f"{inner}." if inner and not hasattr(model, inner) and is_causal(model) else ""


def is_causal(model):
    """Whether no position sees a later one, as the attention modules of transformers say of themselves."""
    return all(module.is_causal for module in model.modules() if hasattr(module, "is_causal"))


def linear_names(model):
    """Names of the layers that "all-linear" means: every linear one but the output head, and a pooler nobody reads."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not is_pooler(name)
    ]


def is_pooler(name):
    """A pooler's weights are read by no head here: they may be absent, and are not trained."""
    return "pooler" in name.split(".")


def train_all(model):
    """Full fine-tuning: every weight requires grad, but for a pooler's."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_pooler(name))


def matching_names(model, target_modules):
    """The linear layers that `target_modules` names.

    Each target is "all-linear", the end of a name ("q_proj", "self_attn.q_proj"), or a regular expression for the
    whole name, as PEFT has it. Every one of them must match something.
    """
    chosen = set()
    known, prefix = linear_names(model), prefix_of(model)
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    if not targets:
        raise UserError("target_modules is empty: there would be nothing to train.")
    for target in targets:
        if target == "all-linear":
            found = known
        elif re.fullmatch(r"[\w.]+", target):
            found = [n for n in known if f".{prefix}{n}".endswith(f".{target}")]
        else:
            try:
                found = [n for n in known if re.fullmatch(target, prefix + n)]
            except re.error as error:
                raise UserError(f"target_modules: {target!r} is no regular expression ({error}).") from None
        if not found:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
            raise UserError(f"target_modules: {target!r} matches no linear layer; there are {endings}.")
        chosen.update(found)
    return [name for name in known if name in chosen]


def inject(model, r=16, alpha=32, dropout=0.0, target_modules="all-linear", modules_to_save=()):
    """Freeze `model` and put a LoRALinear over each target, in place. Returns their names. Seed before: A is drawn.

    `modules_to_save` (ends of names, such as "embed_tokens") are trained whole, and never targets.
    """
    whole = named_modules(model, modules_to_save)
    names = [name for name in matching_names(model, target_modules) if name not in whole]
    wrap(model, names, r, alpha, dropout)
    for name in whole:
        model.get_submodule(name).float().requires_grad_(True)  # trained weights are fp32 masters
    return names


def named_modules(model, endings):
    """Names of the modules that end so and hold weights; each of the endings must match one."""
    holding = [
        name for name, module in model.named_modules() if name and next(module.parameters(recurse=False), None) is not None
    ]
    found = {ending: [name for name in holding if f".{name}".endswith(f".{ending}")] for ending in endings}
    for ending, names in found.items():
        if not names:
            raise UserError(f"modules_to_save: {ending!r} matches no module that holds weights.")
    return [name for names in found.values() for name in names]


def wrap(model, names, r, alpha, dropout):
    """`inject` for layers known by their full names."""
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; merge them, or load the adapter into them")
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        layer = LoRALinear(getattr(parent, child), r, alpha, dropout)
        setattr(parent, child, layer.train(model.training))  # or a model in eval mode would drop inputs


def lora_layers(model):
    """Name -> LoRALinear, for every one in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model):
    """Fold every update into its base layer and take the wrappers away, in place."""
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.merged())
