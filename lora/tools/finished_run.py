"""The folder of a run as `compare` and `report` read it."""

from dataclasses import dataclass
import json
import math
from pathlib import Path
import statistics

from lora.common.errors import UserError
from lora.common.serialization import read_file
from lora.config.tables import from_dict

NAMES = ("experiment_name", "output_dir", "report_to")  # that say nothing of how a run trains


@dataclass
class FinishedRun:
    """What a run's folder says of it."""

    folder: Path
    config: dict  # key -> value, as `flat` gives it
    lines: list  # of logs/train_metrics.jsonl
    results: dict  # logs/final_results.json; empty where the run has not ended well

    @classmethod
    def of(cls, folder):
        logs = Path(folder) / "logs"
        if not (logs / "config.json").is_file():
            raise UserError(
                f"{folder}: no logs/config.json there; expected the folder of a run, as outputs/RUN."
            )
        metrics, results = logs / "train_metrics.jsonl", logs / "final_results.json"
        text = metrics.read_text().splitlines(True) if metrics.is_file() else []
        # The last one may be being written
        whole = [json.loads(line) for line in text if line.endswith("\n")]
        found = read_file(results) if results.is_file() else {}
        # With the defaults of newer keys
        config = from_dict(read_file(logs / "config.json"), str(logs / "config.json"))
        return cls(Path(folder), flat(config), whole, found)

    @property
    def name(self):
        return self.folder.name

    def curve(self, name="val/loss"):
        """[(step, value)] of a metric, where it is finite."""
        return [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]

    @property
    def best(self):
        """(step, validation loss) of the lowest after the first step; (None, inf) where there is
        none.
        """
        return min(
            ((s, v) for s, v in self.curve() if s),
            key=lambda pair: (pair[1], pair[0]),
            default=(None, math.inf),
        )

    @property
    def setting(self):
        """The configuration without the seed, as something that can be compared."""
        return json.dumps({**self.config, "seed": None}, sort_keys=True)

    @property
    def values(self):
        """{column: text} of the table."""
        step, best = self.best
        at_best = next(
            (line for line in self.lines if line["step"] == step and "val/loss" in line), {}
        )
        extra = {
            k.removeprefix("val/"): v
            for k, v in at_best.items()
            if k in ("val/r2", "val/token_accuracy")
        }
        speeds = [value for _, value in self.curve("train/tokens_per_second")]
        columns = {
            "best loss": best if step else None,
            "at step": step,
            "last loss": (self.curve() or [(0, None)])[-1][1],
        }
        columns |= extra | {"tokens/s": statistics.median(speeds) if speeds else None}
        return columns | {
            "GB": self.results.get("peak_memory_gb"),
            "seconds": self.results.get("seconds"),
        }


def flat(config):
    """The keys of all tables in one, but for NAMES."""
    tables = config.as_dict().values()
    return {name: value for table in tables for name, value in table.items() if name not in NAMES}


def format_value(value):
    if isinstance(value, float):
        return f"{value:.5g}"
    return (
        "-"
        if value is None
        else " ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
