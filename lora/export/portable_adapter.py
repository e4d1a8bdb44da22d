"""Rewrite any adapter so that PEFT, vLLM and llama.cpp apply the same scale."""

import math

import torch.nn.functional as F

from lora.adapter import write_adapter
from lora.adapter_format import lora_rank, read_config, read_tensors
from lora.common.errors import UserError, raise_if_any
from lora.target_modules import pattern_value


def write_portable(folder, output):
    """Rewrite the adapter in `folder` so that every reader applies the same scale. Raises UserError
    where that cannot be.

    vLLM knows no patterns, and llama.cpp divides alpha by each tensor's own rank and knows no
    rsLoRA. Here every layer is filled up with zeros to the largest rank R, its scale is in B, and r
    = lora_alpha = R.
    """
    config = read_config(folder)
    modules, whole = read_tensors(folder, config)
    if config["use_dora"] or config["lora_bias"]:
        raise UserError(
            f"{folder}: DoRA and lora_bias have no portable form; merge the adapter instead."
        )
    lost = [name for name in whole if not name.endswith(".base_layer.weight")]
    raise_if_any(
        lost,
        f"{folder}: merge the adapter instead: vLLM and llama.cpp read no whole weights, and it has",
    )
    largest = max(map(lora_rank, modules.values()))
    tensors = {}
    for module, found in modules.items():
        a_name, b_name = sorted(found)
        r, alpha = (
            lora_rank(found),
            pattern_value(config["alpha_pattern"], module, config["lora_alpha"]),
        )
        scaling = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        tensors[f"{module}.{a_name}"] = F.pad(found[a_name], (0, 0, 0, largest - r))
        tensors[f"{module}.{b_name}"] = F.pad(found[b_name] * scaling, (0, largest - r))
    config |= {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    write_adapter(output, config, tensors)
