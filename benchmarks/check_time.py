"""How long --check takes: on the default run, and on LoRA and full fine-tuning of a random model of Qwen2.5-0.5B's shape.

python benchmarks/check_time.py
"""

from pathlib import Path
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from lora.model import EMBEDDED

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        shape = Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True, dtype=torch.bfloat16,
        )  # fmt: skip
        torch.manual_seed(0)
        Qwen2ForCausalLM(shape).to(torch.bfloat16).save_pretrained(base)
        AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(base)
        chats = ["--task", "lm", "--base_model", base, "--train_data", "assets/samples/chat.jsonl", "--max_length", "512"]
        for command in (["train_lora.py"], ["train_lora.py", *chats], ["train.py", *chats]):
            started = time.monotonic()
            done = subprocess.run([sys.executable, *command, "--check"], cwd=ROOT, capture_output=True, text=True)
            print(f"{time.monotonic() - started:6.1f} s, exit {done.returncode}: {' '.join(command[:1] + command[3:5])}")
            for line in done.stdout.splitlines():
                if "layers the first" in line or line.startswith(("WARN", "FAIL")):
                    print(f"          {line}")
