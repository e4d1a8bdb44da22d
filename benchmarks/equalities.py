"""Tables of the largest differences: every kind of PEFT adapter, in and out; every family, trained
and merged.

    python benchmarks/equalities.py            writes benchmarks/results/equalities.md

The models are tiny and random, in fp32; the adapters' factors are random too, and larger than
trained ones. The cases and what is measured of them are those of tests/lora/test_adapter_kinds.py
and tests/model/test_families.py.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import logging
from pathlib import Path
import tempfile
import warnings

from common import ROOT
import torch
from tqdm import tqdm

from tests.lora.test_adapter_kinds import KINDS, differences
from tests.model.test_families import ENCODERS, PACKED, PADDED, lora_differences, packed_differences


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def number(value):
    return value if isinstance(value, str) else f"{value:.1e}" if value else "0"


def adapters():
    rows = []
    for kind, (settings, changes) in tqdm(KINDS.items(), desc="adapters"):
        with tempfile.TemporaryDirectory() as folder:
            found = differences(settings, changes, Path(folder))
        rows.append([kind, *map(number, found.values())])
    return table(["PEFT adapter: largest difference of the logits", *found], rows)


def families():
    rows = []
    for family in tqdm([*PACKED, *PADDED, *ENCODERS], desc="families"):
        with tempfile.TemporaryDirectory() as folder:
            apart = packed_differences(
                family, Path(folder) / "full", packed=None if family not in PADDED else False
            )
            targets = ["in_proj"] if family == "Mamba" else "all-linear"
            injected, merged, loaded, _ = lora_differences(family, Path(folder) / "lora", targets)
        laid_out = "padded" if family in PADDED else "packed"
        rows.append([family, laid_out, *map(number, (*apart, injected, merged, loaded))])
    header = [
        "family",
        "rows",
        "full: gradient, together - apart",
        "... - transformers' own",
        "LoRA: injected - base",
    ]
    return table([*header, "merged - adapter", "saved and loaded - adapter"], rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    text = (
        f"`python benchmarks/equalities.py`, torch {torch.__version__}; fp32, tiny random "
        f"models.\n\n"
    )
    text += (
        adapters()
        + "\nThe gradients' differences are relative to the whole gradient's norm.\n\n"
        + families()
    )
    (ROOT / "benchmarks" / "results" / "equalities.md").write_text(text)
    print(text)
