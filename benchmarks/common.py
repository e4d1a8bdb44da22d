"""What several benchmarks do: find this project, make a random base, call a script, write and read
JSON Lines, read what a run has logged, name the CPU.
"""

import json
import os
from pathlib import Path
import platform
import subprocess
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QWEN_05B = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}

# What decides how fast a CPU multiplies matrices.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def save_base(folder, model_type="llama", seed=0, **shape):
    """A model of random weights in `folder`, with the embedded tokenizer; returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lora.common.base_model_files import EMBEDDED_BASE

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder)
    return model


def call(*command, **environment):
    """What Python prints when it runs `command` here, with these variables beside those of the
    environment.
    """
    command = [sys.executable, *map(str, command)]
    environment = os.environ | environment
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def write_jsonl(path: Path, rows: list) -> str:
    """Write a line of JSON for each row; return the path as text."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def read_jsonl(path: Path) -> list:
    with open(path, encoding="utf-8") as file:  # splitlines() would also split at U+2028
        return [json.loads(line) for line in file]


def metrics(run, name="step"):
    """The lines of a run's metrics that have one of this name."""
    lines = (Path(run) / "logs" / "train_metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if name in line]


def describe_cpu() -> str:
    """Return the CPU's name and those of INSTRUCTION_SETS that it has, as Linux lists them."""
    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", "").split()
    found = [instructions for instructions in INSTRUCTION_SETS if instructions in flags]
    return f"{name}; of {', '.join(INSTRUCTION_SETS)} it has {', '.join(found) or 'none'}"
