"""The JSON files of runs, checkpoints and artifacts, which others may have written.

A file is used only if it has the shape that stands here. A shape is a Kind of value, a table of
shapes by key, or (None, shape) where null is allowed. A key that ends in "?" may be absent, and "*"
stands for any other key: without it, unknown keys are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
import os
from pathlib import Path
from typing import Any

from lora.common.base_model_files import check_weight_files
from lora.common.checkpoint_folders import adapter_folder, model_folder, require_known_format
from lora.common.checksums import CHECKSUMS_FILE, file_sha256, verify_checksums
from lora.common.errors import UserError, raise_if_any
from lora.common.plain_file import plain_file
from lora.common.toml_json import read_file


@dataclass(frozen=True)
class Kind:
    expected: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    expected = f"a whole number from {low} to {high}"
    return Kind(expected, lambda value: type(value) is int and low <= value <= high)


ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TABLE = Kind("a table", lambda value: isinstance(value, dict))
COUNT = whole(0, 2**63 - 1)
FLOAT32_MAX = 3.4028235e38
NUMBER = Kind(
    "a finite number (of float32)",
    lambda value: type(value) in (int, float) and abs(value) <= FLOAT32_MAX,
)

MEASURES = {"loss": (None, NUMBER), "*": (None, NUMBER)}
BEST = {"step": COUNT, **MEASURES}
SUMS = {"*": (None, TEXT)}  # sha256 by path
PLACE = {
    "device": TEXT, "gpu?": TEXT, "torch": TEXT, "cpu": TEXT,
    "processes": whole(1, 2**20), "threads": whole(1, 4096),
}  # fmt: skip
FACTS = {
    "train_data": SUMS, "eval_data": SUMS, "base_model": (None, SUMS), "dtype": TEXT,
    "place": PLACE, "gradient_checkpointing?": FLAG,
    "base_config?": SUMS, "train_tokens?": TEXT, "eval_tokens?": TEXT,
}  # fmt: skip
CONFIG = {"training": {"gradient_checkpointing": ANYTHING, "*": ANYTHING}, "*": TABLE}
STATE = {  # trainer_state.json
    "format_version?": COUNT, "step": COUNT, "config": CONFIG, "facts": FACTS,
    "without_best": COUNT, "skipped": COUNT, "scaler": {"*": NUMBER}, "save_optimizer?": TEXT,
    "examples_per_step": whole(1, 10**6), "max_tokens": whole(1, 10**9),
    "totals?": {"seconds": NUMBER, "tokens": COUNT, "peak_memory": (None, COUNT)},
    "val": (None, MEASURES),
}  # fmt: skip
RESULTS = {  # final_results.json, and an artifact's training_metrics.json
    "best": BEST, "last": BEST, "seconds": NUMBER, "peak_memory_gb": (None, NUMBER),
    "max_steps?": COUNT, "tokens?": COUNT,
}  # fmt: skip
METRICS = {"step": COUNT, "*": (None, NUMBER)}  # a line of train_metrics.jsonl
STATUS = {"exit": (None, COUNT), "error": (None, TEXT), "*": ANYTHING}
METADATA = {
    "task": TEXT, "method": TEXT, "base_model": TEXT, "base_files": SUMS, "best": BEST,
    "train_data": SUMS, "eval_data": SUMS, "versions": {"*": TEXT}, "hardware": TABLE,
    "*": ANYTHING,
}  # fmt: skip


def require_shape(path: str | Path, value: Any, shape: Any, key: str = "") -> None:
    """Raise UserError where `value`, which the file `path` has at `key`, has not the shape."""
    found = f"{path}: {key} = {value!r:.60}" if key else f"{path}: {value!r:.60}"
    if isinstance(shape, tuple):
        if value is not None:
            require_shape(path, value, shape[1], key)
    elif isinstance(shape, Kind):
        if not shape.holds(value):
            raise UserError(f"{found}: expected {shape.expected}.")
    elif not isinstance(value, dict):
        raise UserError(f"{found}: expected a table.")
    else:
        for name, part in value.items():
            expected = shape.get(name) or shape.get(f"{name}?") or shape.get("*")
            full_name = f"{key}.{name}" if key else name
            if expected is None:
                raise UserError(f"{path}: {full_name:.60}: a key that no plainlora writes here.")
            require_shape(path, part, expected, full_name)
        for name in shape:
            if name not in value and name != "*" and not name.endswith("?"):
                full_name = f"{key}.{name}" if key else name
                raise UserError(f"{path}: no {full_name}; expected it.")


def read_table(path: Path, shape: Any, home: Path | None = None) -> dict:
    """Return what a JSON file in the folder `home` holds (default: the file's own folder)."""
    table = read_file(plain_file(path, home))
    require_shape(path, table, shape)
    return table


def read_state(checkpoint: str | Path, home: Path | None = None) -> dict:
    """Return a checkpoint's trainer_state.json. Raises UserError where it has another shape."""
    path = Path(checkpoint) / "trainer_state.json"
    state = read_file(plain_file(path, home))
    require_known_format(Path(checkpoint), state)
    if not isinstance(state.get("config"), dict):
        raise UserError(f"{path}: holds no config; expected a checkpoint of ours.")
    require_shape(path, state, STATE)
    return state


def verify_artifact(folder: str | Path, expect_sha256: str = "") -> dict:
    """Return an artifact's metadata. Raises UserError where it is damaged or no artifact.

    Somebody who changes a file can change checksums.json as well. `expect_sha256`, the sha256 of
    checksums.json itself that the training printed, reveals that too.
    """
    folder = Path(folder)
    verify_checksums(folder, "metadata.json")
    require_sha256(folder, expect_sha256)
    metadata = read_table(folder / "metadata.json", METADATA)
    require_known_format(folder, metadata)
    read_table(folder / "training_metrics.json", RESULTS)
    adapter = adapter_folder(folder) or folder
    model = model_folder(folder) or folder
    needed = [folder / "training_config.toml", folder / "tokenizer.json"]
    if metadata["method"] == "lora":
        needed.append(adapter / "adapter_model.safetensors")
    elif metadata["method"] == "full":
        needed.append(model / "config.json")
    if metadata["method"] not in ("lora", "full") or metadata["task"] == "score":
        needed.append(folder / "mlp_head.safetensors")
    absent = [path.name for path in needed if not path.is_file()]
    raise_if_any(absent, f"{folder}: an artifact of ours must have it")
    if metadata["method"] == "full":
        check_weight_files(model)
    return metadata


def require_sha256(folder: str | Path, expected: str) -> None:
    """Raise UserError unless checksums.json has this sha256; "": it may have any."""
    if not expected:
        return
    path = Path(folder) / CHECKSUMS_FILE
    found = file_sha256(path) if path.is_file() else "absent"
    if found != expected.lower():
        problem = f"the sha256 of {CHECKSUMS_FILE} is {found}, expected {expected}"
        raise UserError(f"{folder}: {problem}: not the files that were meant.")


def refuse_inside_artifact(flag: str, path: str | None) -> None:
    """Raise UserError where a new file would make an artifact differ from its checksums.json."""
    if not path:
        return
    for folder in Path(os.path.realpath(path)).parents:
        if (folder / CHECKSUMS_FILE).is_file():
            found = f"inside of {folder}, which would no longer be as it was written"
            raise UserError(f"{flag} {path}: {found}; choose another place.")
