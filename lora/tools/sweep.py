"""The commands of a sweep that have not been run yet."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
import itertools
import os
import re
import shlex

from lora.common.checkpoint_folders import checkpoints_by_step
from lora.common.errors import UserError
from lora.common.paths import script_call
from lora.common.saved_files import read_state
from lora.common.toml_json import read_file
from lora.config.schema import Config
from lora.config.set_keys import from_dict, key_values, set_key
from lora.config.table import ALIASES, DTYPE_SWITCHES
from lora.tools.finished_run import IGNORED_KEYS, FinishedRun, flat_config, format_value

NUMBER = r"(?<![\d.])(?:0|[1-9]\d*)(?:\.\d+)?(?:e[+-]?\d+)?(?![\d.])"
NAMES = ALIASES | dict.fromkeys(DTYPE_SWITCHES, "dtype")


def proposed_name(run: FinishedRun, config: Config, names: Iterable[str]) -> str:
    """Return the name of `run` with the values that some keys have in `config` in place of its own.

    A value that does not stand in the name exactly once is added with its key.
    """
    name, values = run.folder.resolve().name, key_values(config)
    places: dict[tuple[int, int], str] = {}  # (start, end) in the name: the new value
    added = ""
    for key in names:
        old, new = run.settings.get(key), format_value(values[key])
        found = places_of(old, name)
        if len(found) == 1 and found[0] not in places:
            places[found[0]] = new
        elif format_value(old) != new:
            added += f"_{key}_{new}"
    for (start, end), new in sorted(places.items(), reverse=True):
        name = name[:start] + new + name[end:]
    return re.sub(r"[^\w.-]+", "-", name + added)


def places_of(value: object, name: str) -> list[tuple[int, int]]:
    """Return where a value stands in a name; a number also as 1e-2 for 0.01."""
    if value is None:
        return []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [match.span() for match in re.finditer(NUMBER, name) if float(match[0]) == value]
    pattern = rf"(?<![\d.]){re.escape(format_value(value))}(?![\d.])"
    return [match.span() for match in re.finditer(pattern, name)]


def missing_commands(
    first: FinishedRun, runs: Sequence[FinishedRun], sweep: Sequence[str]
) -> list[str]:
    """Return the commands of the combinations of a sweep that no run has ended with.

    The sweep is "key=a,b,c" for each key. All other keys are those of the first run.
    """
    values_of_key = {}
    for axis in sweep:
        key, _, values = axis.partition("=")
        if not values:
            raise UserError(f"--sweep {axis}: expected KEY=VALUE,VALUE,...")
        if key in IGNORED_KEYS:
            raise UserError(f"--sweep {key}: it changes no numbers; expected a key that does.")
        if key in values_of_key:
            raise UserError(f"--sweep {key}: given twice; give its values as {key}=A,B.")
        values_of_key[key] = values.split(",")
    config_file = first.file("logs/config.toml")
    script = "train_lora.py" if "lora_r" in first.settings else "train.py"
    checkpoints = checkpoints_by_step(first.folder / "checkpoints")
    processes = 1
    if checkpoints:
        with suppress(UserError):  # one that cannot be read does not keep the commands back
            state = read_state(checkpoints[max(checkpoints)], first.folder)
            processes = state["facts"]["place"]["processes"]
    ended_runs = [run for run in runs if run.has_ended and not run.has_other_data(first)]
    ended_configs = [run.settings for run in ended_runs]
    folder = first.folder.resolve().parent
    commands = []
    for combination in itertools.product(*values_of_key.values()):
        config = from_dict(read_file(config_file), str(config_file))
        flags = []
        for key, text in zip(values_of_key, combination):
            set_key(config, key, text, f"--sweep {key}")  # refuses a key that there is not
            flags += [f"--{key}", text]
        settings = flat_config(config)
        if settings not in ended_configs:
            name = proposed_name(first, config, [NAMES.get(key, key) for key in values_of_key])
            taken = [run.folder.resolve().name for run in runs if run.settings != settings]
            while name in taken:
                name += "_2"
            flags += ["--experiment_name", name]
            flags += ["--output_dir", os.path.relpath(folder), "--resume_from", "auto"]
            commands.append(
                shlex.join([*script_call(script, processes), "--config", str(config_file), *flags])
            )
    return commands
