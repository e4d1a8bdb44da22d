"""What a run says: the console, a progress bar, logs/train_*.log and logs/train_metrics.jsonl."""

from collections import deque
import fcntl
import json
import os
from pathlib import Path
import resource
import statistics
import sys
import time

import torch
from tqdm import tqdm

from lora.common.atomic_files import write_text_atomically
from lora.common.errors import UserError
from lora.common.serialization import without_nan
from lora.data.batches import Batch
from lora.distributed import process_group
from lora.evaluation.example_losses import save_example_losses
from lora.evaluation.predict import Predictions
from lora.model.run import Run
from lora.training.trackers import tracker

SPIKE_WINDOW, SPIKE = 50, 6.0  # steps, standard deviations of their losses


class Log:
    """The log of a run in `run_dir`. Metrics of steps after `start` are cut off: a resumed run
    writes them again.

    Of several processes only the first has one.
    """

    def __init__(self, run_dir, config, start=0, may_exist=False):
        self.run_dir, self.bar, self.tokens, self.seconds = Path(run_dir), None, 0, 0.0
        self.losses, self.trackers = deque(maxlen=SPIKE_WINDOW), []
        if process_group.rank() > 0:
            self.metrics_file = self.text_file = open(os.devnull, "w")
            return
        folder = self.run_dir / "logs"
        try:
            # Of two runs that start at once, one gets the folder
            self.run_dir.mkdir(parents=True, exist_ok=may_exist)
            folder.mkdir(exist_ok=may_exist)
            self.lock = open(folder / "lock", "w")
            # While this process lives; it may begin anew
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.run_dir}: another process is training there; wait for it or end it."
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.run_dir}: {error.strerror}; name another --experiment_name or --output_dir."
            ) from None
        config.save(folder / "config.json")
        config.save(folder / "config.toml")
        metrics = folder / "train_metrics.jsonl"
        if metrics.exists():
            lines = metrics.read_text().splitlines(True)
            # A killed run may leave half a line
            whole = [line for line in lines if line.endswith("\n")]
            kept = "".join(line for line in whole if start and json.loads(line)["step"] <= start)
            write_text_atomically(metrics, kept)
        self.metrics_file = open(metrics, "a", buffering=1)
        self.text_file = open(
            folder / f"train_{time.strftime('%Y%m%d-%H%M%S')}.log", "a", buffering=1
        )
        names = filter(None, config.output.report_to.split(","))
        self.trackers = [tracker(name, self.run_dir, config, start, self.say) for name in names]

    def say(self, line):
        """A line for the console and for the log."""
        tqdm.write(line)
        self.text_file.write(line + "\n")

    def start(self, step, total):
        quiet = True if process_group.rank() > 0 else None  # None: without a terminal
        self.bar = tqdm(total=total, initial=step, unit="step", disable=quiet, dynamic_ncols=True)

    def count(self, step, tokens, seconds, loss):
        """Step number `step` is done, over so many tokens; evaluations and checkpoints are not in
        its seconds.
        """
        if len(self.losses) == SPIKE_WINDOW:
            usual = statistics.fmean(self.losses)
            if loss > usual + SPIKE * statistics.pstdev(self.losses):
                before = f"the mean of the {SPIKE_WINDOW} before is {usual:.4f}"
                self.say(f"step {step}: the loss {loss:.4f} is a spike: {before}")
        self.losses.append(loss)
        self.tokens += tokens
        self.seconds += seconds
        self.bar.update()

    def metrics(self, step, values):
        """A line of metrics: {"train/loss": ...} or {"val/loss": ...}. Training lines get their
        tokens per second.
        """
        if "train/loss" in values:
            values["train/tokens_per_second"] = round(self.tokens / self.seconds, 1)
            self.tokens, self.seconds = 0, 0.0
            shown = (
                values["train/loss"],
                values["train/learning_rate"],
                values["train/tokens_per_second"],
            )
            line = "loss {:.4f}, lr {:.2e}, {:.0f} tokens/s".format(*shown)
            self.bar.set_postfix_str(line)
            self.text_file.write(f"step {step}: {line}\n")
            if not sys.stderr.isatty():
                print(f"step {step}: {line}", flush=True)
        self.metrics_file.write(
            json.dumps({"step": step, "timestamp": time.time(), **without_nan(values)}) + "\n"
        )
        for track in self.trackers:
            track(step, values)

    def example_losses(
        self, step: int, run: Run, batches: list[Batch], predictions: Predictions
    ) -> None:
        """Keep the losses of the held-out examples, so that two runs can be compared."""
        if process_group.rank() == 0:
            save_example_losses(self.run_dir, step, run, batches, predictions)

    def close(self):
        self.bar.close()
        self.metrics_file.close()
        self.text_file.close()
        if process_group.rank() == 0:
            self.lock.close()


def peak_memory(device):
    """The most memory this run has held, in bytes: the GPU's where it ran on one, else the
    process's.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
