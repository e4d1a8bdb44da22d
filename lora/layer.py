"""LoRA on one page: y = W x + b + (alpha / r) B A x (Hu et al. 2021, equation 3).

W and b are frozen, and only A [r, in] and B [out, r] are trained. The names are PEFT's
(`base_layer`, `lora_A`, `lora_B`), so exporting an adapter is a rename.
"""

from collections import Counter
from collections.abc import Sequence
import copy
from dataclasses import dataclass
import math

import torch
from torch import Tensor, nn
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from lora.common.errors import UserError, raise_if_any
from lora.quantization import dense, dense_weight, is_4bit
from lora.target_modules import (
    causal_lm_prefix,
    classification_head,
    embedding_modules,
    find_modules_to_save,
    find_target_modules,
    layer_sizes,
    matches_pattern,
    pattern_value,
    untie,
)


@dataclass(frozen=True)
class LoRAOptions:
    """How a layer is adapted."""

    r: int
    alpha: float
    dropout: float = 0.0  # of the input of A, in training
    rslora: bool = False  # scale by alpha / sqrt(r) (rsLoRA; Kalajdzievski 2023)
    dora: bool = False  # train the lengths of the rows of the weight too (DoRA; Liu et al. 2024)
    bias: bool = False  # give B a bias, PEFT's `lora_bias`


class LoRALayer(nn.Module):
    """A frozen layer with a trainable update of rank r, kept in fp32."""

    def __init__(self, base_layer: nn.Module, options: LoRAOptions) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r = options.r
        self.alpha = options.alpha
        self.rslora = options.rslora

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class LoRALinear(LoRALayer):
    """A frozen linear layer [in -> out] with an update B A.

    The base layer is nn.Linear (weight [out, in]), transformers' Conv1D (weight [in, out]) or
    bitsandbytes' Linear4bit. B starts at zero, so a fresh layer computes what its base computes.

    With DoRA, each row of W + update is rescaled to a trained length (Liu et al. 2024, equation 5).
    The gradient treats the row's own length as a constant (section 4.3 of that paper).
    """

    def __init__(self, base_layer: nn.Module, options: LoRAOptions) -> None:
        super().__init__(base_layer, options)
        if is_4bit(base_layer):
            # As in FourBitQuantizer, by which a layer of a user's own model was not made.
            base_layer.support_avx512bf16_for_cpu = False
        elif not base_layer.weight.is_floating_point() or base_layer.weight.itemsize == 1:  # fp8
            kind = type(base_layer).__name__
            expected = "dense layers, or those of bitsandbytes' 4 bits"
            raise UserError(f"target_modules: a {kind}; expected {expected}.")
        n_in, n_out = layer_sizes(base_layer)
        device = base_layer.weight.device
        # nn.Linear draws A as PEFT does: kaiming uniform, a = sqrt(5). It is drawn on the CPU:
        # GPUs differ in what they draw, and the processes of a run must have the same.
        self.lora_A = nn.Linear(n_in, options.r, bias=False).to(device)
        self.lora_B = nn.Linear(options.r, n_out, bias=options.bias, device=device)
        for parameter in self.lora_B.parameters():
            nn.init.zeros_(parameter)
        self.lora_magnitude_vector = None
        if options.dora:
            self.lora_magnitude_vector = nn.Parameter(dense_weight(base_layer).norm(dim=1))
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output [..., out] for x [..., in]."""
        # The factors are cast to x's dtype, whether autocast is on or not.
        A = self.lora_A.weight.to(x.dtype)
        B = self.lora_B.weight.to(x.dtype)
        update = F.linear(F.linear(self.dropout(x), A) * self.scaling, B)
        y = self.base_layer(x)
        if self.lora_magnitude_vector is None:
            y = y + update
        else:
            # DoRA rescales the rows of W + update, but not the bias.
            bias = 0 if self.base_layer.bias is None else self.base_layer.bias
            y = (y - bias + update) * self.dora_scale().to(x.dtype) + bias
        if self.lora_B.bias is not None:
            y = y + (self.lora_B.bias * self.scaling).to(x.dtype)
        return y

    def updated_weight(self) -> Tensor:
        """Return W + update, [out, in], fp32, differentiable."""
        update = self.lora_B.weight @ self.lora_A.weight * self.scaling
        return dense_weight(self.base_layer) + update

    def dora_scale(self) -> Tensor:
        """Return, for each row of W + update, its trained length / its norm, [out]."""
        with torch.no_grad():
            # A row of zeros stays zero, because its trained length is 0 as well.
            smallest = torch.finfo(torch.float32).tiny
            row_lengths = self.updated_weight().norm(dim=1).clamp_min(smallest)
        return self.lora_magnitude_vector / row_lengths

    def merged_weight(self) -> Tensor:
        """Return the weight with the update and DoRA's lengths, [out, in], fp32, differentiable."""
        weight = self.updated_weight()
        if self.lora_magnitude_vector is None:
            return weight
        return weight * self.dora_scale()[:, None]

    def merged_bias(self) -> Tensor | None:
        """Return the base's bias with B's added, [out], or None if neither has one."""
        base_bias = self.base_layer.bias
        if self.lora_B.bias is None:
            return base_bias
        bias = self.lora_B.bias * self.scaling
        return bias if base_bias is None else bias + base_bias.float()

    @torch.no_grad()
    def merge_into_base(self) -> nn.Module:
        """Add the update to the base layer and return it; a 4-bit layer becomes a dense one."""
        layer = dense(self.base_layer)
        weight = self.merged_weight()
        # The weight was summed in fp32; it is rounded once, here, to the dtype of the layer.
        layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)
        bias = self.merged_bias()
        if bias is not None:
            if layer.bias is None:
                why = "the base has no bias to fold the adapter's into"
                raise UserError(f"lora_bias: {why}; use the adapter unmerged.")
            layer.bias.copy_(bias)
        return layer


class LoRAEmbedding(LoRALayer):
    """A frozen embedding [vocabulary, width] with an update; as in PEFT, A starts at zero here."""

    def __init__(self, base_layer: nn.Embedding, options: LoRAOptions) -> None:
        super().__init__(base_layer, options)
        device = base_layer.weight.device
        A = torch.zeros(options.r, base_layer.num_embeddings, device=device)
        B = torch.randn(base_layer.embedding_dim, options.r).to(device)
        self.lora_embedding_A = nn.Parameter(A)
        self.lora_embedding_B = nn.Parameter(B)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings [..., width] of ids [...]."""
        update = F.embedding(ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T * self.scaling
        # Gemma multiplies its embeddings by embed_scale, so the update is multiplied too.
        update = update * getattr(self.base_layer, "embed_scale", 1.0)
        y = self.base_layer(ids)
        return y + update.to(y.dtype)

    @torch.no_grad()
    def merge_into_base(self) -> nn.Embedding:
        """Add the update to the base layer's weight, in place, and return the layer."""
        update = (self.lora_embedding_B @ self.lora_embedding_A).T * self.scaling
        self.base_layer.weight.copy_(self.base_layer.weight.float() + update)
        return self.base_layer


def inject(
    model: nn.Module, r: int = 16, alpha: float = 32, dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear", modules_to_save: Sequence[str] = (), *,
    rslora: bool = False, dora: bool = False,
    rank_pattern: dict[str, int] | None = None, alpha_pattern: dict[str, float] | None = None,
) -> list[str]:  # fmt: skip
    """Freeze any model, wrap its target layers in LoRALinear, in place, and return their names.

    A is drawn at random: set the seed before the call. Names are matched as in PEFT. LoRAOptions
    says what r, alpha, dropout, rslora and dora are.

    Args:
        target_modules: "all-linear", the end of a name, a regular expression, or a list of these.
        modules_to_save: ends of names ("embed_tokens"); these modules are trained in full instead.
        rank_pattern, alpha_pattern: regular expression for the end of a name -> r or alpha of it.
    """
    fully_trained = find_modules_to_save(model, modules_to_save)
    unsaved = [name for name in classification_head(model) if name not in fully_trained]
    why = "may be drawn at random in every session, and is saved only if it is named; add"
    raise_if_any(unsaved, f"modules_to_save: the head of {type(model).__name__} {why}")
    matched = find_target_modules(model, target_modules)
    targets = [name for name in matched if name not in fully_trained]
    if not targets:
        why = "modules_to_save names all of target_modules, and leaves nothing for LoRA"
        raise UserError(f"{why}; name other targets.")
    for name in targets:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            found = f"{type(parent).__name__} computes with its weight itself"
            raise UserError(f"target_modules: {name}: {found}; name other layers.")
    largest_rank = max(min(layer_sizes(model.get_submodule(name))) for name in targets)
    for rank in (r, *(rank_pattern or {}).values()):
        if not 1 <= rank <= largest_rank:
            name = "lora_r" if rank == r else "rank_pattern"
            room = "for which the largest layer has room"
            raise UserError(f"{name} = {rank}: expected 1..{largest_rank}, {room}.")
    prefix = causal_lm_prefix(model)
    for pattern in [*(rank_pattern or {}), *(alpha_pattern or {})]:
        if not any(matches_pattern(pattern, prefix + name) for name in targets):
            found = f"{pattern!r} matches none of the layers, such as {targets[0]}"
            raise UserError(f"rank_pattern, alpha_pattern: {found}.")

    layers = {}
    for name in targets:
        layer_r = pattern_value(rank_pattern, prefix + name, r)
        layer_alpha = pattern_value(alpha_pattern, prefix + name, alpha)
        options = LoRAOptions(layer_r, layer_alpha, dropout, rslora, dora)
        layers[name] = LoRALinear(model.get_submodule(name), options)
    wrap(model, layers)
    for name in fully_trained:
        module = model.get_submodule(name)
        if is_4bit(module):
            why = f"{name} is in 4 bits, which cannot be trained whole"
            raise UserError(f"modules_to_save: {why}; name it in target_modules.")
        module.float().requires_grad_(True)  # trained weights are fp32 masters
    return targets


def wrap(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    """Freeze `model` and put `layers` (name -> layer) in the places of their base layers."""
    if lora_layers(model):
        mend = "merge them, or load the adapter into them"
        raise ValueError(f"the model has LoRA layers already; {mend}")
    model.requires_grad_(False)
    embeddings = embedding_modules(model)
    if any(layer.base_layer in embeddings for layer in layers.values()):
        untie(model)
    parameters = model.named_parameters(remove_duplicate=False)
    uses = Counter(id(parameter) for _, parameter in parameters)
    for name, layer in layers.items():
        if uses[id(layer.base_layer.weight)] > 1:  # merging must not change the other place
            layer.base_layer = copy.deepcopy(layer.base_layer)
        layer.train(model.training)  # a model in eval mode must not drop anything
        model.set_submodule(name, layer)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the model's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def merge(model: nn.Module) -> None:
    """Fold every update into its base layer and remove the wrappers, in place."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merge_into_base())
