"""The memory that `--dry_run` foresees against the peak of the run itself, in seven configurations.

    python benchmarks/dry_run.py [--output benchmarks/results/dry_run.md]

A random Llama of 512 x 4 layers with 32,000 tokens, on windows of a text (lm) or on generated
chains (score). Each run has two steps. Twice each: with a fixed threshold from which the C library
takes memory from the system and gives it back, so that the process holds what its tensors hold; and
as the C library comes, which may keep holes between them (LOG.md).
"""

import argparse
import json
from pathlib import Path
import re
import tempfile

from common import call, save_base

TEXT = "--task lm --max_length 512 --batch_size 8 --gradient_accumulation_steps 2"
CHAINS = "--task score --train_data arithmetic:train:2000 --max_length 128 --batch_size 32"
CHECKPOINTED = "--gradient_checkpointing"
CONFIGURATIONS = {
    "LoRA, fp32": f"train_lora.py {TEXT} --dtype float32",
    "LoRA, bf16": f"train_lora.py {TEXT} --dtype bfloat16",
    "LoRA, fp32, gradient checkpointing": f"train_lora.py {TEXT} --dtype float32 {CHECKPOINTED}",
    "QLoRA, bf16, gradient checkpointing": (
        f"train_lora.py {TEXT} --dtype bfloat16 --load_in_4bit {CHECKPOINTED}"
    ),
    "full, fp32": f"train.py {TEXT} --dtype float32",
    "full, bf16, 8-bit AdamW": f"train.py {TEXT} --dtype bfloat16 --optimizer adamw_8bit",
    "LoRA scorer, fp32": f"train_lora.py {CHAINS} --dtype float32",
}
FIXED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def two_steps(command, base, text, folder, environment, *more):
    flags = f"{command} --max_steps 2 --eval_steps 2 --max_eval_batches 1".split()
    flags += ["--base_model", base, "--output_dir", folder, "--experiment_name", "run"]
    data = [] if "--train_data" in flags else ["--train_data", text]
    return call(*flags, *data, *more, **environment)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    output, rows = parser.parse_args().output, []
    with tempfile.TemporaryDirectory() as base:
        save_base(
            base,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=4,
            num_attention_heads=8,
        )
        text = Path(base) / "text.txt"
        text.write_text(
            "It is a truth that no one wrote down, and so it was said again, in other words. "
            * 4000
        )
        for name, flags in CONFIGURATIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                said = two_steps(flags, base, text, folder, FIXED, "--dry_run")
                foreseen, peaks = float(re.search(r"total +([\d.]+) GB", said)[1]), []
                for i, environment in enumerate((FIXED, {})):
                    two_steps(flags, base, text, f"{folder}/{i}", environment)
                    results = json.loads(
                        Path(f"{folder}/{i}/run/logs/final_results.json").read_text()
                    )
                    peaks.append(results["peak_memory_gb"])
            rows.append(
                f"| {name} | {foreseen:.2f} | {peaks[0]:.2f} | {foreseen / peaks[0] - 1:+.1%} | "
                f"{peaks[1]:.2f} |"
            )
            print(rows[-1], flush=True)
    head = ["# `--dry_run` against the run", "", "`python benchmarks/dry_run.py`", ""]
    head += [
        "| configuration | foreseen, GB | peak, GB | off by | peak with the C library's own "
        "thresholds, GB |"
    ]
    if output:
        output.write_text("\n".join([*head, "|---" * 5 + "|", *rows]) + "\n")
