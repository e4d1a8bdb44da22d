"""The log of a run: the console, a progress bar, logs/train_*.log and logs/train_metrics.jsonl."""

from collections import deque
import errno
import json
import math
import os
from pathlib import Path
import statistics
import sys
import time

from filelock import FileLock, Timeout
import torch
from tqdm import tqdm

from lora.common.atomic_files import write_text_atomically
from lora.common.errors import UserError
from lora.common.operating_system import peak_memory_bytes
from lora.common.plain_file import plain_file
from lora.common.printable_text import printable
from lora.common.toml_json import without_nan
from lora.config.schema import Config
from lora.distributed import process_group

SPIKE_WINDOW = 50  # steps whose losses a new one is compared with
SPIKE = 6.0  # standard deviations above their mean
FIRST_ROUNDS = 10  # of a loop, before the time left is estimated: the first ones may be slow
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Log:
    """The log of a run. Every rank has one, and only that of rank 0 writes files."""

    def __init__(
        self,
        run_dir: str | Path,
        config: Config,
        max_steps: int,
        earlier: dict | None = None,
        may_exist: bool = False,
    ) -> None:
        """Make the folder of a run, and open its files.

        `earlier` is the state of the checkpoint that the run resumes. Raises UserError where the
        folder exists (unless it `may_exist`), is in use, or cannot be made.
        """
        self.run_dir = Path(run_dir)
        self.started = time.perf_counter()
        earlier = earlier or {}
        # Older checkpoints have none.
        self.earlier = earlier.get("totals", {"seconds": 0.0, "tokens": 0, "peak_memory": None})
        self.run_tokens = self.earlier["tokens"]
        self.bar = tqdm(disable=True)  # until the first step
        self.first_step = earlier.get("step", 0)
        self.total = max_steps
        self.began: float | None = None  # at the first step, by time.perf_counter()
        # Since the last training metrics.
        self.num_tokens = 0
        self.seconds = 0.0
        self.losses = deque(maxlen=SPIKE_WINDOW)
        self.trackers = []
        if process_group.rank() > 0:
            self.metrics_file = self.text_file = open(os.devnull, "w", encoding="utf-8")
            return
        self.lock = lock_folder(self.run_dir, may_exist)
        try:
            self.open_files(config)
        except BaseException:
            self.lock.release()  # a notebook keeps the traceback, and with it this log
            raise

    def open_files(self, config: Config) -> None:
        folder = self.run_dir / "logs"
        config.save(folder / "config.json")
        config.save(folder / "config.toml")
        metrics_path = folder / "train_metrics.jsonl"
        text_path = folder / time.strftime("train_%Y%m%d-%H%M%S.log")
        cut_metrics_after(self.first_step, metrics_path)
        self.metrics_file = open(metrics_path, "a", buffering=1, encoding="utf-8")
        self.text_file = open(text_path, "a", buffering=1, encoding="utf-8")
        if config.output.report_to:
            from lora.training.trackers import Tracker

            for name in config.output.report_to:
                self.trackers.append(Tracker(name, self.run_dir, config, self.first_step, self.say))

    def say(self, line: str) -> None:
        """Print a line, and write it to the text log with the time."""
        line = printable(line)
        self.write(line)
        try:
            tqdm.write(line)
            sys.stdout.flush()
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal is closed, and the file has the line
                raise

    def write(self, line: str) -> None:
        self.text_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def begin_step(self) -> float:
        """Show the progress bar, before the first step, and return time.perf_counter()."""
        now = time.perf_counter()
        if self.began is None:
            self.began = now
            self.bar = tqdm(
                total=self.total, initial=self.first_step, disable=process_group.hide_bar(),
                dynamic_ncols=True, bar_format=BAR,
            )  # fmt: skip
        return now

    def count(self, step: int, num_tokens: int, seconds: float, loss: float) -> None:
        """Count a step; `seconds` are without evaluations and checkpoints."""
        if len(self.losses) == SPIKE_WINDOW:
            mean = statistics.fmean(self.losses)
            if loss > mean + SPIKE * statistics.pstdev(self.losses):
                before = f"the mean of the {SPIKE_WINDOW} steps before is {mean:.4f}"
                self.say(f"step {step}: loss spike: {loss:.4f}; {before}")
        if math.isfinite(loss):
            self.losses.append(loss)
        self.num_tokens += num_tokens
        self.run_tokens += num_tokens
        self.seconds += seconds
        self.bar.update()

    def evaluation(self, step: int, metrics: dict, is_best: bool) -> None:
        """Log the metrics of an evaluation, "*" where it is the best so far."""
        self.metrics(step, "val", metrics)
        found = "New best validation loss" if is_best else "validation loss"
        line = f"{self.step_of(step)} {found}: {metrics['loss']:.6f}"
        for name in ("r2", "perplexity"):
            if name in metrics:
                line += f", {name} {metrics[name]:.4f}"
        self.say(line + " *" if is_best else line)

    def step_of(self, step: int) -> str:
        return f"Step {step}/{self.total} ({step / self.total:.1%})"

    def training(self, step: int, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Log a step, with the speed since the last such line and the time that is left."""
        tokens_per_second = round(self.num_tokens / self.seconds, 1)
        self.num_tokens, self.seconds = 0, 0.0
        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        self.metrics(step, "train", {**values, "tokens_per_second": tokens_per_second})
        line = f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens_per_second:.0f} tokens/s"
        assert self.began is not None  # by `begin_step`
        seconds = time.perf_counter() - self.began
        line += time_left(step - self.first_step, self.total - self.first_step, seconds)
        self.bar.set_postfix_str(line)
        show = self.write if has_bar() else self.say
        show(f"{self.step_of(step)} {line}")

    def metrics(self, step: int, part: str, values: dict) -> None:
        """Write a line of metrics, each as "PART/NAME"; a part is "train" or "val"."""
        values = {f"{part}/{name}": value for name, value in values.items()}
        record = {"step": step, "timestamp": time.time(), **without_nan(values)}
        self.metrics_file.write(json.dumps(record) + "\n")
        for tracker in self.trackers:
            tracker.metrics(step, values)

    def totals(self, device: torch.device) -> dict[str, float | int | None]:
        """Return seconds, tokens and peak memory (bytes) of the whole run, resumed parts too."""
        seconds = self.earlier["seconds"] + time.perf_counter() - self.started
        peaks = [peak for peak in (self.earlier["peak_memory"], peak_memory(device)) if peak]
        peak = max(peaks, default=None)
        return {"seconds": round(seconds, 1), "tokens": self.run_tokens, "peak_memory": peak}

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            for tracker in self.trackers:
                tracker.finish(exit_code=0 if kind is None else 1)
        finally:
            self.close()

    def close(self) -> None:
        self.bar.close()
        self.metrics_file.close()
        self.text_file.close()
        if process_group.rank() == 0:
            self.lock.release()


def lock_folder(run_dir: Path, may_exist: bool) -> FileLock:
    """Make the folder of a run, and keep other processes out of it while this one lives."""
    try:
        # Of two runs that start at once, one gets the folder.
        run_dir.mkdir(parents=True, exist_ok=may_exist)
        (run_dir / "logs").mkdir(exist_ok=may_exist)
        lock = FileLock(run_dir / "logs" / "lock", timeout=0)
        lock.acquire()
        return lock
    except Timeout:
        in_use = "another process is training there; wait for it or end it"
        raise UserError(f"{run_dir}: {in_use}.") from None
    except OSError as error:
        mend = "name another --experiment_name or --output_dir"
        raise UserError(f"{run_dir}: {error.strerror}; {mend}.") from None


def cut_metrics_after(step: int, path: Path) -> None:
    """Remove the metrics of later steps (all for step 0), which a resumed run writes again."""
    kept = ""
    try:
        for line in plain_file(path).read_text(encoding="utf-8").splitlines(keepends=True):
            # A killed run may have left half a line.
            if line.endswith("\n") and step > 0 and json.loads(line)["step"] <= step:
                kept += line
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        found = f"no metrics of a run ({type(error).__name__})"
        raise UserError(f"{path}: {found}; move the file away, or resume to a new run.") from None
    write_text_atomically(path, kept)


def has_bar() -> bool:
    """Return whether somebody sees the progress bar, which is on stderr, beside what is printed."""
    return sys.stderr.isatty() and sys.stdout.isatty()


def time_left(done: int, total: int, seconds: float) -> str:
    """Return ", 01:20 left" for a loop that has done some rounds in `seconds`; "" at its ends."""
    if done < FIRST_ROUNDS or done == total:
        return ""
    return f", {tqdm.format_interval(seconds / done * (total - done))} left"


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory this run has held, in bytes: the GPU's, or else the process's."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory_bytes()
