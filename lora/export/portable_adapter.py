"""Rewrite any adapter so that PEFT, vLLM and llama.cpp apply the same scale."""

import math
from pathlib import Path

import torch.nn.functional as F

from lora.adapter import write_adapter
from lora.adapter_format import lora_rank, read_config, read_tensors
from lora.common.errors import UserError, raise_if_any
from lora.common.printable_text import printable
from lora.target_modules import pattern_value


def write_portable(folder: Path, output: Path) -> None:
    """Rewrite the adapter in `folder`, or raise UserError for what has no portable form.

    vLLM knows no patterns, and llama.cpp divides alpha by each tensor's own rank and knows no
    rsLoRA. Here every layer is padded with zeros to the largest rank R, its scale is in B, and
    r = lora_alpha = R.
    """
    config = read_config(folder)
    modules, full_weights = read_tensors(folder, config)
    if config["use_dora"] or config["lora_bias"]:
        found = "DoRA and lora_bias have no portable form"
        raise UserError(f"{folder}: {found}; merge the adapter instead.")
    lost = [name for name in full_weights if not name.endswith(".base_layer.weight")]
    why = "merge the adapter instead: vLLM and llama.cpp read no whole weights, and it has"
    raise_if_any(lost, f"{folder}: {why}")
    if full_weights:
        left_out = ", ".join(full_weights)
        mend = "if the base was given rows for added tokens, merge the adapter instead"
        print(printable(f"note: {folder}: {left_out} is left out, as a base has it; {mend}"))
    largest = max(lora_rank(factors) for factors in modules.values())
    tensors = {}
    for module, factors in modules.items():
        a_name, b_name = sorted(factors)
        r = lora_rank(factors)
        alpha = pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
        scaling = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        tensors[f"{module}.{a_name}"] = F.pad(factors[a_name], (0, 0, 0, largest - r))
        tensors[f"{module}.{b_name}"] = F.pad(factors[b_name] * scaling, (0, largest - r))
    config.update(r=largest, lora_alpha=largest, use_rslora=False)
    config.update(rank_pattern={}, alpha_pattern={})
    write_adapter(output, config, tensors)
