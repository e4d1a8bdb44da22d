"""How long --check takes: on the default run, and on LoRA and full fine-tuning of a random model of
Qwen2.5-0.5B's shape.

python benchmarks/check_time.py
"""

import subprocess
import sys
import tempfile
import time

from common import QWEN_05B, ROOT, save_base

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        save_base(base, **QWEN_05B)
        chats = "--task lm --train_data assets/samples/chat.jsonl --max_length 512".split()
        chats += ["--base_model", base]
        for command in (["train_lora.py"], ["train_lora.py", *chats], ["train.py", *chats]):
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, *command, "--check"], cwd=ROOT, capture_output=True, text=True
            )
            seconds = time.monotonic() - started
            print(f"{seconds:6.1f} s, exit {done.returncode}: {' '.join(command)}")
            for line in done.stdout.splitlines():
                if "layers the first" in line or line.startswith(("WARN", "FAIL")):
                    print(f"          {line}")
