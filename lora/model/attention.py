"""Attention over packed documents, for the unmodified models of transformers.

A micro-batch is one row with documents end to end. `packed_attention` runs one attention call per
document, or on a GPU FlashAttention over all of them, so no document sees another and no mask over
the whole row is built. It is registered under the name "packed" and gets the keyword `documents`,
which transformers hands through from `model(...)`.
"""

from itertools import groupby

import torch
from torch.nn.attention.varlen import varlen_attn
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

# What models pass along that has no bearing on the result here.
IGNORED = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "cache_position",
    "layer_idx",
}
SHORT = 512  # positions up to which plain matrix products beat SDPA in bfloat16 on a CPU


class Documents:
    """The lengths of a row's documents; in an object, as torch.compile looks into a list and
    compiles for each anew.
    """

    def __init__(self, lengths):
        self.lengths = lengths
        # N neighbours of one length
        self.runs = [(len(list(alike)), length) for length, alike in groupby(lengths)]
        self.sizes = [n * length for n, length in self.runs]
        self.masks = {}

    def unseen(self, length, window, like):
        """[length, length] of the type of `like`, to be added to scores: -inf where a position is
        not seen.

        It is not by those before it and, with a window, by those so many places after it. Every
        layer gets the same mask.
        """
        key = length, window, like.dtype
        if key not in self.masks:
            never = like.new_full((length, length), -torch.inf)
            self.masks[key] = never.triu(1) + never.tril(-window) if window else never.triu(1)
        return self.masks[key]


@torch.compiler.disable
def packed_attention(
    module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, is_causal=None, documents=None,
    sliding_window=None, softcap=None, s_aux=None, **others,
):  # fmt: skip
    """query [1, heads, T, width], key and value [1, key heads, T, width] -> ([1, T, heads, width],
    None).

    Causality, scaling, sliding window, soft-capping, sinks (s_aux [heads]) and dropout are those
    the model asks for; an argument that would change the result and is not known here is an error.
    """
    unknown = [name for name, value in others.items() if value is not None and name not in IGNORED]
    if unknown or attention_mask is not None:
        raise ValueError(
            f"packed attention does not know {unknown or 'an attention mask'} of {type(module).__name__}"
        )
    causal = module.is_causal if is_causal is None else is_causal
    if sliding_window and not causal:
        raise ValueError("packed attention knows sliding windows of causal models only")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    # Where weights are fp32, rotary embeddings have made queries and keys so
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    documents = documents or Documents([query.shape[2]])
    if has_flash(query, value) and not (dropout or softcap or s_aux is not None):
        return flash(query, key, value, documents.lengths, scaling, causal, sliding_window)[
            None
        ], None
    outputs = []
    split = (x.split(documents.sizes, 2) for x in (query, key, value))
    for (n, length), *parts in zip(documents.runs, *split):
        q, k, v = (unpacked(x, n) for x in parts)
        windowed = bool(sliding_window) and length > sliding_window
        quick_by_hand = q.device.type == "cpu" and q.dtype == torch.bfloat16 and length <= SHORT
        if softcap or s_aux is not None or quick_by_hand:
            mask = documents.unseen(length, sliding_window, q) if causal else None
            out = attention_by_hand(q, k, v, mask, scaling, dropout, softcap, s_aux)
        else:
            mask = documents.unseen(length, sliding_window, q) if windowed else None
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None and length > 1,
                scale=scaling, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def has_flash(query, value):
    """Whether torch has FlashAttention-2 for these: NVIDIA GPUs from Ampere on, 16 bits, heads of
    one width up to 256.
    """
    if not (
        query.is_cuda
        and torch.version.cuda
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    ):
        return False
    return (
        query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] == value.shape[-1] <= 256
    )


def flash(query, key, value, lengths, scaling, causal, window):
    """All documents in one call: query [1, heads, T, width], key, value [1, key heads, T, width] ->
    [T, heads, width].
    """
    ends = F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0)).to(
        query.device, non_blocking=True
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # A window counts the position itself, FlashAttention those before it
    behind = window - 1 if window else -1
    return varlen_attn(
        q, k, v, ends, ends, max(lengths), max(lengths), scale=scaling, window_size=(behind, 0 if causal else -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def unpacked(x, n):
    """[1, heads, n x t, width] -> [n, heads, t, width]"""
    _, heads, positions, width = x.shape
    return x.reshape(heads, n, positions // n, width).transpose(0, 1)


def attention_by_hand(q, k, v, mask, scaling, dropout, softcap, sinks):
    """The formula in matrix products. q [n, heads, t, width], k and v [n, key heads, s, width] ->
    [n, heads, t, v's width].

    Of grouped queries the group is laid beside the positions, so that keys are not repeated. Sinks
    take part in the softmax of every position and in nothing else (gpt-oss).
    """
    (n, heads, t, width), s = q.shape, k.shape[2]
    grouped = (n, k.shape[1], heads // k.shape[1] * t)
    scores = ((q.reshape(*grouped, width) * scaling) @ k.mT).view(n, heads, t, s)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores += mask
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.to(scores.dtype).view(1, heads, 1, 1).expand(n, heads, t, 1)], -1
        )
    # It would keep the weights in fp32; inside, softmax has fp32 sums
    with torch.autocast(q.device.type, enabled=False):
        weights = F.dropout(scores.softmax(-1)[..., :s], dropout)
    return (weights.view(*grouped, s) @ v).view(n, heads, t, -1)


AttentionInterface.register("packed", packed_attention)


AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)
