"""Bytes of a base's linear weights in 4 bits and in bfloat16, and the agreement of a 4-bit layer with the dense product.

    python benchmarks/memory_4bit.py [--device cuda] [--hidden_size 896 --layers 24 ...]

The default is the shape of Qwen2.5-0.5B with random weights; they are written to a temporary folder (1 GB) and loaded as
train_lora.py loads a base. The layer's difference is relative to the largest output, its product in bfloat16.
"""

import argparse
from pathlib import Path
import sys
import tempfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lora.config import get_lora_config
from lora.targets import linear_names
from lora.model import four_bits, load_weights
from lora.quantize import dense_weight


def bytes_of(layer):
    """Its weight and, of a 4-bit one, the scales that belong to it."""
    state = layer.state_dict()
    return sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("bias"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    for name, default in (("hidden_size", 896), ("intermediate_size", 4864), ("layers", 24), ("heads", 14), ("groups", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    shape = Qwen2Config(
        vocab_size=151_936, hidden_size=arguments.hidden_size, intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads, num_key_value_heads=arguments.groups,
        tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    config = get_lora_config()
    config.lora.load_in_4bit = True
    quantization = four_bits(config.lora, torch.device(arguments.device))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        dense = Qwen2ForCausalLM(shape).to(torch.bfloat16)
        dense.save_pretrained(folder)
        model = load_weights(AutoModelForCausalLM, folder, torch.bfloat16, "sdpa", quantization)
    names = linear_names(model)
    ours, theirs = (sum(bytes_of(m.get_submodule(name)) for name in names) for m in (model, dense))
    print(
        f"{len(names)} linear layers: {ours / 1e6:.1f} MB in 4 bits, {theirs / 1e6:.1f} MB in bfloat16: {ours / theirs:.3f}"
    )
    layer = model.get_submodule(next(name for name in names if name.endswith("down_proj")))
    x = torch.randn(64, layer.in_features, dtype=torch.bfloat16, device=arguments.device)
    exact = x.float() @ dense_weight(layer).T
    apart = (layer(x) - exact).abs().max() / exact.abs().max()
    print(f"a layer against the product with its dequantised weight: {apart:.1e}")
