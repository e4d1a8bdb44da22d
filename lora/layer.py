"""LoRA on one page: y = W x + b + (alpha / r) B A x, with W and b frozen (Hu et al. 2021, equation
3).

Names are PEFT's (`base_layer`, `lora_A`, `lora_B`), so that exporting an adapter is a rename. Works
on any model: `inject` puts `LoRALinear` over its linear layers, `merge` folds the update into them
and takes the wrappers away.
"""

import math

import torch
from torch import nn
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from lora.common.errors import UserError
from lora.quantization import dense, dense_weight, is_4bit
from lora.target_modules import (
    by_pattern,
    causal_lm_prefix,
    embedding_modules,
    layer_sizes,
    matching_names,
    named_modules,
    untie,
)


class LoRALinear(nn.Module):
    """A frozen linear layer [in -> out] with a trainable update of rank r, kept in fp32.

    `base_layer` is nn.Linear (weight [out, in]), transformers' Conv1D (weight [in, out]) or
    bitsandbytes' Linear4bit. A is drawn as PEFT draws it (kaiming uniform, a = sqrt(5)), B is zero:
    a fresh layer computes what its base computes.

    rslora: the update is scaled by alpha / sqrt(r) (Kalajdzievski 2023). dora: of W + update the
    rows keep lengths of their own, which are trained (Liu et al. 2024, equation 5; the norm is a
    constant to the gradient, as in section 4.3 there).
    """

    def __init__(self, base_layer, r, alpha, dropout=0.0, rslora=False, dora=False, bias=False):
        super().__init__()
        weight = base_layer.weight
        if not (weight.is_floating_point() or is_4bit(base_layer)):
            raise UserError(
                f"target_modules: a {type(base_layer).__name__}; expected dense layers, or those of bitsandbytes' 4 bits."
            )
        n_in, n_out = layer_sizes(base_layer)
        # Or the first evaluation cuts its gradients on some CPUs, as in lora/quantize.py
        if is_4bit(base_layer):
            base_layer.support_avx512bf16_for_cpu = False
        self.base_layer = base_layer
        self.r, self.alpha, self.rslora = r, alpha, rslora
        # Drawn by nn.Linear's own init
        self.lora_A = nn.Linear(n_in, r, bias=False, device=weight.device)
        self.lora_B = nn.Linear(r, n_out, bias=bias, device=weight.device)
        nn.init.zeros_(self.lora_B.weight)
        if bias:
            nn.init.zeros_(self.lora_B.bias)
        self.lora_magnitude_vector = (
            nn.Parameter(dense_weight(base_layer).norm(dim=1)) if dora else None
        )
        self.dropout = nn.Dropout(dropout)

    @property
    def scaling(self):
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def forward(self, x):
        """x [..., in] -> [..., out]. The factors are cast to x's type, whatever autocast does then."""
        factors = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        update = F.linear(F.linear(self.dropout(x), factors[0]) * self.scaling, factors[1])
        y = self.base_layer(x)
        if self.lora_magnitude_vector is not None:
            stretch = self.stretch().to(x.dtype)
            bias = 0 if self.base_layer.bias is None else self.base_layer.bias
            y = (y - bias + update) * stretch + bias
        else:
            y = y + update
        return y if self.lora_B.bias is None else y + (self.lora_B.bias * self.scaling).to(x.dtype)

    def updated_weight(self):
        """[out, in], fp32: W + update; has a gradient to the factors."""
        return (
            dense_weight(self.base_layer) + self.lora_B.weight @ self.lora_A.weight * self.scaling
        )

    def stretch(self):
        """[out]: what DoRA multiplies the rows of W + update by: the lengths that it trains, over
        those that they have.
        """
        with torch.no_grad():
            lengths = self.updated_weight().norm(dim=1)
        return self.lora_magnitude_vector / lengths

    def merged_weight(self):
        """[out, in], fp32: W + update, with DoRA's lengths; has a gradient to what is trained."""
        weight = self.updated_weight()
        return weight if self.lora_magnitude_vector is None else weight * self.stretch()[:, None]

    def merged_bias(self):
        """[out], fp32, or None; with a gradient to lora_B's bias."""
        ours, base = self.lora_B.bias, self.base_layer.bias
        if ours is None:
            return base
        return ours * self.scaling + (0 if base is None else base.float())

    @torch.no_grad()
    def merged(self):
        """The base layer with the update folded in: summed in fp32, rounded once to its type; 4
        bits become dense.
        """
        weight, bias, layer = self.merged_weight(), self.merged_bias(), dense(self.base_layer)
        layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)
        if bias is not None:
            if layer.bias is None:
                raise UserError(
                    "lora_bias: the base has no bias to fold the adapter's into; use the adapter unmerged."
                )
            layer.bias.copy_(bias)
        return layer


class LoRAEmbedding(nn.Module):
    """A frozen embedding [vocabulary, width] with a trainable update of rank r; PEFT's
    `lora_embedding_A` and `_B`.
    """

    def __init__(self, base_layer, r, alpha, rslora=False):
        super().__init__()
        self.base_layer = base_layer
        self.r, self.alpha, self.rslora = r, alpha, rslora
        device = base_layer.weight.device
        self.lora_embedding_A = nn.Parameter(
            torch.zeros(r, base_layer.num_embeddings, device=device)
        )
        self.lora_embedding_B = nn.Parameter(
            torch.randn(base_layer.embedding_dim, r, device=device)
        )

    scaling = LoRALinear.scaling

    def forward(self, ids):
        """ids [...] -> [..., width]. Gemma scales its embeddings, and what is added to them."""
        update = F.embedding(ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T * self.scaling
        y = self.base_layer(ids)
        return y + (update * getattr(self.base_layer, "embed_scale", 1.0)).to(y.dtype)

    @torch.no_grad()
    def merged(self):
        update = (self.lora_embedding_B @ self.lora_embedding_A).T * self.scaling
        self.base_layer.weight.copy_(self.base_layer.weight.float() + update)
        return self.base_layer


def inject(
    model, r=16, alpha=32, dropout=0.0, target_modules="all-linear", modules_to_save=(), *,
    rslora=False, dora=False, rank_pattern=None, alpha_pattern=None,
):  # fmt: skip
    """Freeze `model` and put a LoRALinear over each target, in place. Returns their names. Seed
    before: A is drawn.

    `modules_to_save` (ends of names, such as "embed_tokens") are trained whole, and never targets.
    The patterns (regular expressions for the end of a name -> value) give layers a rank or an alpha
    of their own, as PEFT has it.
    """
    whole = named_modules(model, modules_to_save)
    names = [name for name in matching_names(model, target_modules) if name not in whole]
    prefix = causal_lm_prefix(model)
    if not names:
        raise UserError(
            "modules_to_save names all of target_modules, and leaves nothing for LoRA; name other targets."
        )
    room = max(min(layer_sizes(model.get_submodule(name))) for name in names)
    if not 1 <= r <= room:
        raise UserError(f"lora_r = {r}: expected 1..{room}, for which the largest layer has room.")
    for pattern in [*(rank_pattern or {}), *(alpha_pattern or {})]:
        if not any(by_pattern({pattern: True}, prefix + name, False) for name in names):
            raise UserError(
                f"rank_pattern, alpha_pattern: {pattern!r} matches none of the layers, such as {names[0]}."
            )
    layers = {}
    for name in names:
        own_r, own_alpha = (
            by_pattern(rank_pattern, prefix + name, r),
            by_pattern(alpha_pattern, prefix + name, alpha),
        )
        layers[name] = LoRALinear(
            model.get_submodule(name), own_r, own_alpha, dropout, rslora, dora
        )
    wrap(model, layers)
    for name in whole:
        if is_4bit(model.get_submodule(name)):
            raise UserError(
                f"modules_to_save: {name} is in 4 bits, which cannot be trained whole; name it in target_modules."
            )
        model.get_submodule(name).float().requires_grad_(True)  # trained weights are fp32 masters
    return names


def wrap(model, layers):
    """Freeze `model` and put these layers (name -> LoRALinear or LoRAEmbedding) in their places."""
    if lora_layers(model):
        raise ValueError(
            "the model has LoRA layers already; merge them, or load the adapter into them"
        )
    model.requires_grad_(False)
    if any(
        layer.base_layer is module
        for layer in layers.values()
        for module in embedding_modules(model)
    ):
        untie(model)
    for name, layer in layers.items():
        # In eval mode nothing may be dropped
        model.set_submodule(name, layer.train(model.training))


def lora_layers(model):
    """Name -> LoRALinear or LoRAEmbedding, for every one in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (LoRALinear, LoRAEmbedding))
    }


def merge(model):
    """Fold every update into its base layer and take the wrappers away, in place."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merged())
