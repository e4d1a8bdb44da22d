"""Bytes of a base's linear weights in 4 bits and in bfloat16, and the agreement of a 4-bit layer
with the dense product.

    python benchmarks/memory_4bit.py [--device cuda]

The base has the shape of Qwen2.5-0.5B and random weights; they are written to a temporary folder (1
GB) and loaded as train_lora.py loads a base. The layer's difference is relative to the largest
output, its product in bfloat16.
"""

import argparse
import tempfile

from common import QWEN_05B, save_base
import torch
from transformers import AutoModelForCausalLM

from lora.config.schema import get_lora_config
from lora.model.weights import four_bits, load_weights
from lora.quantization import dense_weight
from lora.target_modules import linear_names


def bytes_of(layer):
    """Its weight and, of a 4-bit one, the scales that belong to it."""
    state = layer.state_dict()
    return sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("bias"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    config = get_lora_config()
    config.lora.load_in_4bit = True
    quantization = four_bits(config.lora, torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        dense = save_base(folder, **QWEN_05B)
        model = load_weights(AutoModelForCausalLM, folder, torch.bfloat16, "sdpa", quantization)
    names = linear_names(model)
    ours, theirs = (sum(bytes_of(m.get_submodule(name)) for name in names) for m in (model, dense))
    sizes = f"{ours / 1e6:.1f} MB in 4 bits, {theirs / 1e6:.1f} MB in bfloat16"
    print(f"{len(names)} linear layers: {sizes}: {ours / theirs:.3f}")
    layer = model.get_submodule(next(name for name in names if name.endswith("down_proj")))
    x = torch.randn(64, layer.in_features, dtype=torch.bfloat16, device=device)
    exact = x.float() @ dense_weight(layer).T
    apart = (layer(x) - exact).abs().max() / exact.abs().max()
    print(f"a layer against the product with its dequantised weight: {apart:.1e}")
