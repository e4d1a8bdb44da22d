"""How the time and the memory of a micro-batch grow: with length, batch, vocabulary, model, and
steps of a chain.

    python benchmarks/scaling.py [--threads 2] [--dtype bfloat16] [--output FILE]

Forward and backward of a random Llama, LoRA over all linear layers (or all weights trained), every
point in a process of its own. The roofline: a linear weight costs 4 floating-point operations a
token under LoRA (6 where it is trained: 2 forward, 2 for the gradient of its input, 2 for its own),
the head as many a target; attention 12 x length x width a token and layer, of which causality
leaves half. The share is of the rate of a 2048 x 2048 matrix product in the same process.
"""

import argparse
import json
from pathlib import Path
import statistics
import time

from common import call

PLAIN = {
    "length": 256,
    "batch": 4,
    "vocabulary": 32_000,
    "width": 512,
    "layers": 8,
    "steps": 0,
    "full": False,
    "labelled": 1.0,
}
AXES: dict = {  # what is changed, point by point; at first the length alone, at as many tokens
    "length, 1,024 tokens": [{"length": 1024 // n, "batch": n} for n in (16, 8, 4, 2, 1)],
    "batch of 256 tokens": [{"batch": n} for n in (1, 2, 4, 8, 16)],
    "vocabulary": [{"vocabulary": n} for n in (4_000, 32_000, 64_000, 128_000)],
    "share of labelled tokens": [{"labelled": share} for share in (0.1, 0.4, 1.0)],
    "width": [{"width": n} for n in (128, 256, 512, 1024)],
    "all weights trained": [{"full": True}],
    "scored steps of a chain of 256": [{"steps": n} for n in (1, 4, 16, 64)],
}
REPEATS = 5


def flops(point, linear):
    """Of forward and backward: `linear` weights of the layers' products."""
    tokens, per_weight = point["length"] * point["batch"], 6 if point["full"] else 4
    attention = 12 * point["length"] * point["width"] * point["layers"] / 2
    targets = 0 if point["steps"] else tokens * point["labelled"]  # the MLP head's are few
    return (
        tokens * (per_weight * linear + attention)
        + targets * per_weight * point["vocabulary"] * point["width"]
    )


def measure(point, dtype):
    """{"seconds": median, "bytes": the most that the step held beyond the weights, "share": of the
    matmul rate}.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    from lora.data.batches import Rows
    from lora.data.tokenise import NO_TOKEN, Row
    from lora.layer import inject
    import lora.model.attention  # noqa: F401  (registers the attention called "packed")
    from lora.model.task import Task
    from lora.target_modules import linear_names
    from lora.training.log import peak_memory

    torch.manual_seed(0)
    width, length, kind = point["width"], point["length"], "score" if point["steps"] else "lm"
    shape = LlamaConfig(
        vocab_size=point["vocabulary"],
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=point["layers"],
        num_attention_heads=width // 64,
        attn_implementation="packed",
    )
    model = (LlamaModel if point["steps"] else LlamaForCausalLM)(shape)
    linear = sum(model.get_submodule(name).weight.numel() for name in linear_names(model))
    task, dtype = Task(model, None), getattr(torch, dtype)
    if not point["full"]:
        task.model.to(dtype)
        inject(task.model, 16, 32)

    def row():
        tokens = torch.randint(point["vocabulary"], (length,)).tolist()
        if point["steps"]:
            asked = {(i + 1) * length // point["steps"] - 1 for i in range(point["steps"])}
            return Row(tokens, [0.5 if i in asked else float("nan") for i in range(length)])
        return Row(
            tokens,
            [t if i < point["labelled"] * length else NO_TOKEN for i, t in enumerate(tokens)],
        )

    batch = Rows.from_rows(((row(), 0) for _ in range(point["batch"])), kind).batch(
        range(point["batch"])
    )
    before, seconds = peak_memory(model.device), []
    for _ in range(REPEATS + 1):
        task.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, count = task(batch)
        (loss / count).backward()
        seconds.append(time.perf_counter() - started)
    held, median = peak_memory(model.device) - before, statistics.median(seconds[1:])
    return {
        "seconds": median,
        "bytes": held,
        "share": flops(point, linear) / median / matmul_rate(dtype),
    }


def matmul_rate(dtype):
    """Floating-point operations a second of a 2048 x 2048 product."""
    import torch

    a, b, seconds = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype), []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        return print(json.dumps(measure(PLAIN | json.loads(arguments.point), arguments.dtype)))
    command = (
        f"python benchmarks/scaling.py --threads {arguments.threads} --dtype {arguments.dtype}"
    )
    lines = [
        f"# How time and memory grow\n\n`{command}`; unless changed: {PLAIN}\n",
        "| | ms | tokens/s | MB beyond the weights | share of the matmul rate "
        "|\n|---|---|---|---|---|",
    ]
    settings = {"OMP_NUM_THREADS": str(arguments.threads), "THP_MEM_ALLOC_ENABLE": "1"}
    # Freed memory goes back at once, so that what is held is seen; slower
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for axis, points in AXES.items():
        for point in points:
            measured = [__file__, "--dtype", arguments.dtype, "--point", json.dumps(point)]
            result, held = (
                json.loads(call(*measured, **env)) for env in (settings, settings | returning)
            )
            full = PLAIN | point
            speed = full["length"] * full["batch"] / result["seconds"]
            said = ", ".join(f"{name} {value}" for name, value in point.items())
            lines.append(
                f"| {axis}: {said} | {result['seconds'] * 1e3:.0f} | {speed:.0f} | "
                f"{held['bytes'] / 1e6:.0f} "
                f"| {result['share']:.0%} |"
            )
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
