"""What a run says: the console, a progress bar, logs/train_*.log and logs/train_metrics.jsonl."""

import json
from pathlib import Path
import resource
import sys
import time

import torch
from tqdm import tqdm

from lora.errors import UserError


class Log:
    """The log of a run in `run_dir`. Metrics of steps after `start` are cut off: a resumed run writes them again."""

    def __init__(self, run_dir, config, start=0):
        self.run_dir = Path(run_dir)
        folder = self.run_dir / "logs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; choose another --output_dir.") from None
        config.save(folder / "config.json")
        config.save(folder / "config.toml")
        self.metrics_path = folder / "train_metrics.jsonl"
        if self.metrics_path.exists():
            kept = [line for line in self.metrics_path.read_text().splitlines(True) if json.loads(line)["step"] <= start]
            self.metrics_path.write_text("".join(kept))
        self.metrics_file = open(self.metrics_path, "a", buffering=1)
        self.text_file = open(folder / f"train_{time.strftime('%Y%m%d-%H%M%S')}.log", "a", buffering=1)
        self.bar = None
        self.tokens, self.since = 0, time.monotonic()

    def say(self, line):
        """A line for the console and for the log."""
        tqdm.write(line)
        self.text_file.write(line + "\n")

    def start(self, step, total):
        self.bar = tqdm(total=total, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self.tokens, self.since = 0, time.monotonic()

    def count(self, batches):
        """One more step, over these micro-batches."""
        self.tokens += sum(batch.tokens.numel() for batch in batches)
        self.bar.update()

    def metrics(self, step, values):
        """A line of metrics: {"train/loss": ...} or {"val/loss": ...}. Training lines get their tokens per second."""
        if "train/loss" in values:
            now = time.monotonic()
            values["train/tokens_per_second"] = round(self.tokens / (now - self.since), 1)
            self.tokens, self.since = 0, now
            shown = (values["train/loss"], values["train/learning_rate"], values["train/tokens_per_second"])
            self.bar.set_postfix_str("loss {:.4f}, lr {:.2e}, {:.0f} tokens/s".format(*shown))
            line = "step {}: loss {:.4f}, lr {:.2e}, {:.0f} tokens/s".format(step, *shown)
            self.text_file.write(line + "\n")
            if not sys.stderr.isatty():
                print(line, flush=True)
        elif not self.tokens:
            self.since = time.monotonic()  # an evaluation is not training time
        self.metrics_file.write(json.dumps({"step": step, "timestamp": time.time(), **values}) + "\n")

    def close(self):
        self.bar.close()
        self.metrics_file.close()
        self.text_file.close()


def peak_memory():
    """The most memory this run has held, in bytes: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
