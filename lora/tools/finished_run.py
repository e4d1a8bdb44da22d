"""The folder of a run as `compare` and `report` read it."""

from __future__ import annotations

from dataclasses import dataclass, field
import json
import math
from pathlib import Path
import statistics

import numpy as np

from lora.common.errors import UserError
from lora.common.toml_json import read_file
from lora.config.schema import Config
from lora.config.set_keys import from_dict

# They do not change the training.
IGNORED_KEYS = ("experiment_name", "output_dir", "report_to", "artifact_version")


@dataclass
class FinishedRun:
    """What the folder of a run says about it; the run may also be going on, or have failed."""

    folder: Path
    config: dict  # as `flat_config` returns it
    lines: list[dict] = field(default_factory=list)  # of logs/train_metrics.jsonl
    results: dict = field(default_factory=dict)  # logs/final_results.json, if it has ended well

    @classmethod
    def of(cls, folder: str) -> FinishedRun:
        """Read the folder of a run. Raises UserError where it is none."""
        logs = Path(folder) / "logs"
        config_file, metrics = logs / "config.json", logs / "train_metrics.jsonl"
        results = logs / "final_results.json"
        if not config_file.is_file():
            expected = "expected the folder of a run, as outputs/RUN"
            raise UserError(f"{folder}: no logs/config.json there; {expected}.")
        # Keys that are newer than the run get their defaults.
        run = cls(Path(folder), flat_config(from_dict(read_file(config_file), str(config_file))))
        if metrics.is_file():
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            # The last line may be being written.
            run.lines = [json.loads(line) for line in lines if line.endswith("\n")]
        if results.is_file():
            run.results = read_file(results)
        return run

    @property
    def name(self) -> str:
        return self.folder.name

    def curve(self, name: str = "val/loss") -> list[tuple[int, float]]:
        """Return (step, value) of a metric, where it is finite."""
        return [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]

    def example_losses(self, step: int | None) -> dict[int, tuple[float, int]]:
        """Return {id: (sum of losses, number of targets)} of an evaluation; {} if none were kept.

        The file is that of lora/evaluation/example_losses.py.
        """
        path = self.folder / "logs" / "examples" / f"step_{step}.npz"
        if not path.is_file():
            return {}
        with np.load(path) as saved:
            losses_and_counts = zip(saved["loss"].tolist(), saved["targets"].tolist())
            return dict(zip(saved["id"].tolist(), losses_and_counts))

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
        columns: dict = {"best loss": None, "at step": step, "last loss": None}
        if step is not None:
            columns["best loss"] = self.best_loss
        if curve:
            columns["last loss"] = curve[-1][1]
        evaluations = {line["step"]: line for line in self.lines if "val/loss" in line}
        for name, value in evaluations.get(step, {}).items():
            if name in ("val/r2", "val/token_accuracy"):
                columns[name.removeprefix("val/")] = value
        speeds = [value for _, value in self.curve("train/tokens_per_second")]
        columns["tokens/s"] = statistics.median(speeds) if speeds else None
        columns["GB"] = self.results.get("peak_memory_gb")
        columns["seconds"] = self.results.get("seconds")
        return columns


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
        return " ".join(map(str, value))
    return str(value)
