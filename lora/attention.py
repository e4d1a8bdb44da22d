"""Attention over packed documents, for the unmodified models of transformers.

A micro-batch is one row with documents end to end. `packed_attention` runs one attention call per document, so no
document sees another and no mask is ever built. It is registered under the name "packed" and gets the documents'
lengths as the keyword `lengths`, which transformers hands through from `model(...)`.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

# What models pass along that has no bearing on the result here.
IGNORED = {"position_ids", "use_cache", "output_attentions", "cache_position", "layer_idx"}


def packed_attention(
    module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, is_causal=None, lengths=None,
    sliding_window=None, **others,
):  # fmt: skip
    """query [1, heads, T, width], key and value [1, key heads, T, width] -> ([1, T, heads, width], None).

    Causality, scaling, sliding window and dropout are those the model asks for; an argument that would change the
    result and is not known here is an error.
    """
    unknown = [name for name, value in others.items() if value is not None and name not in IGNORED]
    if unknown or attention_mask is not None:
        raise ValueError(f"packed attention does not know {unknown or 'an attention mask'} of {type(module).__name__}")
    causal = module.is_causal if is_causal is None else is_causal
    grouped = query.shape[1] != key.shape[1]
    lengths = lengths or [query.shape[2]]
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)):
        length = q.shape[2]
        mask = None
        if sliding_window and not causal:
            raise ValueError("packed attention knows sliding windows of causal models only")
        if sliding_window and length > sliding_window:
            place = torch.arange(length, device=q.device)
            behind = place[:, None] - place
            mask = (behind >= 0) & (behind < sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None and length > 1,
                scale=scaling, enable_gqa=grouped,
            )
        )  # fmt: skip
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)
