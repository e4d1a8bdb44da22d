"""Peak memory and time of the language model's head: in chunks, and as the plain formula.

    python benchmarks/head_memory.py [--trained]

Each way runs in a process of its own (fp32, forward and backward); the memory is what the process
held at most beyond what it held before the step, so the head's own weights (which both ways have)
are not in it.
"""

import argparse
import json
import time
from types import SimpleNamespace

from common import call

TARGETS, VOCABULARY, WIDTH = 8192, 151_936, 896


def step(way, trained):
    """{"bytes", "seconds", "loss"} of one forward and backward."""
    import torch
    import torch.nn.functional as F

    from lora.model.heads import LMHead
    from lora.training.log import peak_memory

    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(trained)
    head = LMHead(lambda: layer, SimpleNamespace())
    hidden, labels = (
        torch.randn(TARGETS, WIDTH, requires_grad=True),
        torch.randint(VOCABULARY, (TARGETS,)),
    )
    before, started = peak_memory(hidden.device), time.monotonic()
    loss = (
        head(hidden, labels, torch.ones(TARGETS))
        if way == "chunks"
        else F.cross_entropy(head.logits(hidden), labels, reduction="sum")
    )
    (loss / TARGETS).backward()
    seconds = time.monotonic() - started
    return {
        "bytes": peak_memory(hidden.device) - before,
        "seconds": seconds,
        "loss": loss.item() / TARGETS,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--trained", action="store_true", help="the head's weights get a gradient as well"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(step(*json.loads(arguments.step))))
    else:
        for way in ("chunks", "plain"):
            # In a process of its own
            one = json.loads(call(__file__, "--step", json.dumps([way, arguments.trained])))
            print(
                f"{way}: {one['bytes'] / 1e9:.2f} GB, {one['seconds']:.1f} s, loss "
                f"{one['loss']:.7f}"
            )
