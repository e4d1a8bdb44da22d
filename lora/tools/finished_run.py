"""The folder of a run as `compare` and `report` read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
import hashlib
import math
from pathlib import Path
import statistics
import zipfile

from lora.common.checkpoint_folders import checkpoints_by_step
from lora.common.errors import UserError
from lora.common.plain_file import MAX_BYTES, plain_file
from lora.common.printable_text import printable
from lora.common.saved_files import (
    FLOAT32_MAX,
    METADATA,
    METRICS,
    RESULTS,
    STATUS,
    read_state,
    read_table,
    require_shape,
)
from lora.common.toml_json import parse_json, read_file
from lora.config.schema import Config, EvaluationConfig
from lora.config.set_keys import from_dict

# They do not change the training.
IGNORED_KEYS = (
    *("experiment_name", "output_dir", "report_to", "artifact_version"),
    *("logging_steps", "save_steps", "save_optimizer"),
    *vars(EvaluationConfig()),
)
DATA_KEYS = ("train_data", "eval_data")


@dataclass
class FinishedRun:
    """A run, as its folder describes it. The run may still be in progress, or have failed.

    Somebody else may have written it: no link is followed out of it, and values are checked.
    """

    folder: Path
    settings: dict  # as `flat_config` returns it
    settings_by_table: dict = field(default_factory=dict)
    lines: list[dict] = field(default_factory=list)  # of logs/train_metrics.jsonl
    results: dict = field(default_factory=dict)  # logs/final_results.json, if it has ended well
    status: dict = field(default_factory=dict)  # status.json

    @classmethod
    def of(cls, folder: str) -> FinishedRun:
        """Read the folder of a run. Raises UserError where it is none."""
        config_file = Path(folder) / "logs" / "config.json"
        if not config_file.is_file():
            expected = "expected the folder of a run, as outputs/RUN"
            raise UserError(f"{folder}: no logs/config.json there; {expected}.")
        run = cls(Path(folder), {})
        # Keys that are newer than the run get their defaults.
        config = from_dict(read_file(run.file("logs/config.json")), str(config_file))
        run.settings = flat_config(config)
        run.settings_by_table = config.as_dict()
        metrics = run.file("logs/train_metrics.jsonl")
        # The last line may be being written.
        lines = run.read_text("logs/train_metrics.jsonl").split("\n")[:-1]
        run.lines = [parse_metrics(f"{metrics}:{i}", line) for i, line in enumerate(lines, 1)]
        if run.file("logs/final_results.json").exists():
            run.results = read_table(run.file("logs/final_results.json"), RESULTS, run.folder)
        if run.file("status.json").exists():
            run.status = read_table(run.file("status.json"), STATUS, run.folder)
        return run

    @cached_property
    def data(self) -> str:
        """A hash of the contents of the data files; "" where they are not known."""
        checkpoints = checkpoints_by_step(self.folder / "checkpoints")
        try:
            if checkpoints:
                facts = read_state(checkpoints[max(checkpoints)], self.folder)["facts"]
            else:
                path = self.file("final_artifact/metadata.json")
                facts = read_table(path, METADATA, self.folder)
        except UserError:  # what cannot be read says nothing of the data
            return ""
        sums = [list(facts[key].values()) for key in DATA_KEYS]
        return hashlib.sha256(repr(sums).encode()).hexdigest()[:8]

    def has_other_data(self, other: FinishedRun) -> bool:
        """Return whether the same paths are known to have held other data for another run."""
        same_paths = all(self.settings.get(key) == other.settings.get(key) for key in DATA_KEYS)
        return same_paths and "" not in (self.data, other.data) and self.data != other.data

    def file(self, name: str) -> Path:
        """Return the path of a file of the run. Raises UserError as `plain_file` does."""
        return plain_file(self.folder / name, self.folder)

    def read_text(self, name: str) -> str:
        """Return the text of a file of the run, "" if there is none."""
        path = self.file(name)
        try:
            return path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); expected UTF-8.") from None

    @property
    def name(self) -> str:
        return printable(self.folder.resolve().name)

    @property
    def has_ended(self) -> bool:
        """Whether the run is complete. Its results alone may be older than a continuation of it."""
        return bool(self.results) and self.status.get("exit", 0) == 0

    @property
    def ending(self) -> str:
        """How a run that is not complete ended: its exit status and the reason; else ""."""
        exit_status, reason = self.status.get("exit"), self.status.get("error")
        if self.has_ended:
            return ""
        if not exit_status:
            return "not ended"
        guard = ", stopped by a guard" if exit_status == 3 else ""
        return printable(f"exit status {exit_status}{guard}: {reason}")

    def curve(self, name: str = "val/loss") -> list[tuple[int, float]]:
        """Return (step, value) of a metric, where it is finite."""
        return [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]

    def example_losses(self, step: int | None) -> dict[int, tuple[float, int]]:
        """Return {id: (sum of losses, number of targets)} of an evaluation; {} if none were kept.

        The file is that of lora/evaluation/example_losses.py.
        """
        path = self.file(f"logs/examples/step_{step}.npz")
        if not path.is_file():
            return {}
        import numpy as np  # which takes as long to import as the rest of `compare`

        try:
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                    raise ValueError
            with np.load(path) as saved:
                ids, losses, counts = saved["id"], saved["loss"], saved["targets"]
            has_shape = ids.shape == losses.shape == counts.shape == (len(ids),)
            is_sound = (np.abs(losses) <= FLOAT32_MAX).all() and (counts >= 1).all()
            if not (has_shape and is_sound):  # a NaN is not sound either
                raise ValueError
        except Exception:  # numpy and zipfile raise all kinds
            expected = "expected the arrays id, loss and targets of an evaluation"
            raise UserError(f"{path}: damaged; {expected}.") from None
        return dict(zip(ids.tolist(), zip(losses.tolist(), counts.tolist())))

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss, step 0 aside; None where there is none."""
        losses = {step: loss for step, loss in self.curve() if step > 0}
        return min(losses, key=lambda step: (losses[step], step), default=None)

    @property
    def best_loss(self) -> float:
        """The validation loss at `best_step`; infinite where there is none."""
        return dict(self.curve()).get(self.best_step, math.inf)

    def columns(self) -> dict:
        """Return the results in a table of runs, by the column's name; None if not known."""
        step, curve = self.best_step, self.curve()
        last_loss = curve[-1][1] if curve else None
        columns = {"best loss": dict(curve).get(step), "at step": step, "last loss": last_loss}
        for name in ("r2", "token_accuracy"):
            values = dict(self.curve(f"val/{name}"))
            if step in values:
                columns[name] = values[step]
        speeds = [value for _, value in self.curve("train/tokens_per_second")]
        columns["tokens/s"] = statistics.median(speeds) if speeds else None
        columns["GB"] = self.results.get("peak_memory_gb")
        columns["seconds"] = self.results.get("seconds")
        return columns


def parse_metrics(where: str, line: str) -> dict:
    try:
        metrics = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}).") from None
    require_shape(where, metrics, METRICS)
    return metrics


def flat_config(config: Config) -> dict:
    """Return the keys of all tables in one, without IGNORED_KEYS."""
    keys = {}
    for table in config.as_dict().values():
        keys.update(table)
    return {name: value for name, value in keys.items() if name not in IGNORED_KEYS}


def format_value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return printable(str(value))
