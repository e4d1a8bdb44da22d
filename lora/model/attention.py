"""Attention over packed documents, for the unmodified models of transformers.

A micro-batch is one row with documents end to end. `packed_attention` computes the attention of
each document separately, or on a GPU of all of them with FlashAttention, so no mask over the row is
built. transformers knows it as "packed", and passes `documents` on from `model(..., documents=)`.
"""

from dataclasses import dataclass
import inspect

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

# Arguments that models pass and that change nothing here.
IGNORED = {
    "position_ids", "use_cache", "output_attentions", "output_router_logits",
    "cache_position", "layer_idx",
}  # fmt: skip
# torch 2.11 has no such argument: its kernel takes fewer key heads than query heads as they are.
ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
FLASH_NEEDS = "it needs an NVIDIA GPU, Ampere or newer"
SHORT = 512  # positions up to which plain matrix products beat SDPA in bfloat16 on a CPU


class Documents:
    """The lengths of a row's documents, and what all layers share: where they end, and masks."""

    def __init__(self, seq_lens: list[int], device: torch.device | None = None) -> None:
        self.has_flash = has_flash(device)
        # Compiled layers read only this number and tensors. If they read the list of lengths,
        # torch.compile would compile again for every new list.
        self.longest = max(seq_lens)
        bounds = torch.tensor([0, *seq_lens]).cumsum(0, dtype=torch.int32)
        self.cu_seq_lens = bounds.to(device, non_blocking=True)  # [documents + 1]
        # Neighbours of the same length are a group, which is computed together.
        self.group_counts: list[int] = []  # documents of each group
        self.group_sizes: list[int] = []  # positions of each group
        for i, seq_len in enumerate(seq_lens):
            if i == 0 or seq_len != seq_lens[i - 1]:
                self.group_counts.append(0)
                self.group_sizes.append(0)
            self.group_counts[-1] += 1
            self.group_sizes[-1] += seq_len
        self.masks: dict[tuple, Tensor] = {}

    def causal_mask(self, seq_len: int, window: int | None, like: Tensor) -> Tensor:
        """Return what is added to scores [seq_len, seq_len]: -inf where a position is not seen.

        With a sliding window, a position sees itself and the `window` - 1 before it.
        """
        key = (seq_len, window, like.dtype)
        if key not in self.masks:
            unseen = like.new_full((seq_len, seq_len), -torch.inf)
            mask = unseen.triu(1)
            if window:
                mask = mask + unseen.tril(-window)
            self.masks[key] = mask
        return self.masks[key]


@dataclass
class Settings:
    """How a model wants its attention computed."""

    scaling: float
    causal: bool
    window: int | None  # sliding window of a causal model, which counts the position itself
    dropout: float
    softcap: float | None
    sinks: Tensor | None  # [heads]


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
    documents: Documents | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **others: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute the attention of `module`; the parameters are those that transformers passes.

    query is [1, heads, t, width]; key and value are [1, key heads, t, width]; s_aux [heads] are
    attention sinks. An argument that may change the result and is not known here is an error.
    Returns the output [1, t, heads, width], and None for the attention weights.
    """
    given = [name for name, argument in others.items() if argument is not None]
    unknown = [name for name in given if name not in IGNORED]
    if unknown or attention_mask is not None:
        what = unknown or "an attention mask"
        raise ValueError(f"packed attention does not support {what} of {type(module).__name__}")
    causal = module.is_causal if is_causal is None else is_causal
    if sliding_window and not causal:
        raise ValueError("packed attention supports sliding windows in causal models only")
    # Models are tried before they are compiled, and the number of a layer would compile each anew.
    if not sliding_window and not torch.compiler.is_compiling() and has_window(module):
        raise ValueError(f"the window of {type(module).__name__} is in its mask only")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = Settings(scaling, causal, sliding_window, dropout, softcap, s_aux)
    documents = documents or Documents([query.shape[2]], query.device)

    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embeddings have made queries and keys fp32 if the weights are.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # varlen_attn has no dropout, no soft cap and no sinks.
    is_plain = not dropout and not softcap and s_aux is None
    widths = (query.shape[-1], value.shape[-1])
    if is_plain and documents.has_flash and flash_takes(query.dtype, *widths):
        return flash(query, key, value, documents, settings)[None], None
    return grouped_attention(query, key, value, documents, settings)[None], None


def has_window(module: nn.Module) -> bool:
    """Return whether an attention module's config.json gives its layer a window, or chunks."""
    config = getattr(module, "config", None)
    if not getattr(config, "use_sliding_window", True):
        return False
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    layer_types = getattr(config, "layer_types", None)
    is_full = layer_types is not None and layer_types[module.layer_idx] == "full_attention"
    return any(windows) and not is_full


def has_flash(device: torch.device | None) -> bool:
    """Return whether torch has FlashAttention-2 there: on an NVIDIA GPU, Ampere or newer."""
    if device is None or device.type != "cuda" or not torch.version.cuda:
        return False
    is_built = torch.backends.cuda.is_flash_attention_available()  # on Windows it may not be
    return is_built and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_takes(dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Return whether FlashAttention-2 takes heads of this dtype and of these widths."""
    is_16_bit = dtype in (torch.bfloat16, torch.float16)
    return is_16_bit and width == value_width and width <= 256 and width % 8 == 0


def why_without_flash(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Return why a model's attention does not use FlashAttention-2 on a GPU; "" where it does."""
    shape = model.config.get_text_config()
    heads = shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    width = getattr(shape, "qk_head_dim", width)  # of MLA, whose values have a width of their own
    value_width = getattr(shape, "v_head_dim", width)
    if not has_flash(device):
        return FLASH_NEEDS
    if not flash_takes(dtype, width, value_width):
        found = f"heads of width {width} (values {value_width}) in {dtype}"
        return f"{found}; it takes equal multiples of 8 up to 256 in 16 bits"
    dropouts = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    if is_trained and any(getattr(shape, name, None) for name in dropouts):
        return "it has no dropout of attention, which the base's config.json asks for"
    has_sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if has_sinks or getattr(shape, "attn_logit_softcapping", None):
        return "it has neither soft cap nor sinks"
    return ""


def flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """Compute all documents in one call: [1, heads, t, width] -> [t, heads, width]."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    # FlashAttention counts the positions before a position, and -1 means all of them.
    before = settings.window - 1 if settings.window else -1
    after = 0 if settings.causal else -1
    options = {"scale": settings.scaling, "window_size": (before, after)}
    if ASKS_FOR_GROUPS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    ends, longest = documents.cu_seq_lens, documents.longest
    return varlen_attn(q, k, v, ends, ends, longest, longest, **options)


# Not compiled, because the number of calls depends on the lengths.
@torch.compiler.disable
def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, settings: Settings
) -> Tensor:
    """Compute documents of the same length together: [1, heads, t, width] -> [t, heads, width]."""
    outputs = []
    sizes = documents.group_sizes
    queries, keys, values = query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2)
    for count, *group in zip(documents.group_counts, queries, keys, values):
        q, k, v = (stack_documents(x, count) for x in group)
        out = attend(q, k, v, documents, settings)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def stack_documents(x: Tensor, count: int) -> Tensor:
    """Stack documents: [1, heads, count x t, width] -> [count, heads, t, width]."""
    _, heads, positions, width = x.shape
    return x.reshape(heads, count, positions // count, width).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, settings: Settings) -> Tensor:
    """Compute n documents of one length; q is [n, heads, t, width], k [n, key heads, t, width]."""
    seq_len, causal, window = q.shape[2], settings.causal, settings.window
    is_short_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16 and seq_len <= SHORT
    if settings.softcap or settings.sinks is not None or is_short_bf16:
        mask = documents.causal_mask(seq_len, window, q) if causal else None
        return attention_by_hand(q, k, v, mask, settings)
    mask = None
    if window and seq_len > window:
        mask = documents.causal_mask(seq_len, window, q)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=settings.dropout,
        is_causal=causal and mask is None and seq_len > 1,
        scale=settings.scaling, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: Settings
) -> Tensor:
    """Compute attention as matrix products; `mask` [t, s] is added to the scores.

    q is [n, heads, t, width], k and v are [n, key heads, s, ...]. Query heads that share a key head
    are laid out as further positions, so that keys are not repeated. Sinks take part in the softmax
    of every position and in nothing else (gpt-oss).
    """
    n, heads, t, width = q.shape
    _, key_heads, s, _ = k.shape
    grouped = (n, key_heads, heads // key_heads * t)
    scores = (q.reshape(*grouped, width) * settings.scaling) @ k.mT
    scores = scores.view(n, heads, t, s)
    if settings.softcap:
        scores = torch.tanh(scores / settings.softcap) * settings.softcap
    if mask is not None:
        scores += mask
    if settings.sinks is not None:
        sinks = settings.sinks.to(scores.dtype).view(1, heads, 1, 1)
        scores = torch.cat([scores, sinks.expand(n, heads, t, 1)], -1)
    # Under autocast the softmax would return fp32. It sums in fp32 inside in any case.
    with torch.autocast(q.device.type, enabled=False):
        weights = F.dropout(scores.softmax(-1)[..., :s], settings.dropout)
    return (weights.view(*grouped, s) @ v).view(n, heads, t, -1)


AttentionInterface.register("packed", packed_attention)
