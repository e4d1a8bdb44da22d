"""The command line of the training scripts: flags over config file over defaults, and which folder a run writes to.

Like config.py it imports the standard library only; both run before torch is loaded.
"""

import argparse
import copy
import dataclasses
from dataclasses import dataclass
import os
from pathlib import Path
import re
import time
import typing

from lora.config import (
    ALIASES,
    DTYPE_SWITCHES,
    Config,
    keys_of,
    read_file,
    refuse_two_dtypes,
    saved_config,
    set_key,
    set_tables,
    tables_of,
)
from lora.errors import UserError

# What may differ between a checkpoint and the run that continues it: how long, how often, where to, and what is asked of
# the answers afterwards.
FREE_ON_RESUME = {
    *("max_steps", "num_train_epochs", "early_stopping_patience", "logging_steps", "eval_steps", "save_steps"),
    *("max_eval_batches", "experiment_name", "output_dir", "device"),
    *("max_new_tokens", "temperature", "refusal_pattern", "citation_pattern", "json_keys"),
    *("threshold", "tune_threshold_on"),
}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `-` read as `_` in flags, and no guessing of abbreviated ones."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}. See --help.")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([underscored(a) for a in args], namespace)


def underscored(argument):
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def add_flags(parser, config):
    """A flag for every key of `config` (and its aliases); returns the names they arrive under."""
    names = []
    for title, table in tables_of(config).items():
        group = parser.add_argument_group(f"[{title}]")
        for f in dataclasses.fields(table):
            default, choices, kind = getattr(table, f.name), f.metadata["choices"], typing.get_origin(f.type) or f.type
            if kind is dict:
                continue  # given as a table in the file
            notes = [", ".join(choices)] if choices else []
            if default not in (None, "", []):
                notes.append(f"default: {' '.join(map(str, default)) if isinstance(default, list) else default}")
            help = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
            flags = [f"--{f.name}", *(f"--{alias}" for alias, real in ALIASES.items() if real == f.name)]
            settings = {"dest": f.name, "metavar": "X", "help": help.replace("%", "%%")}
            if kind is list:
                settings |= {"nargs": "+", "action": "extend"}
            elif kind is bool:
                settings |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
            group.add_argument(*flags, **settings)
            names.append(f.name)
    for switch, dtype in DTYPE_SWITCHES.items():
        parser.add_argument(f"--{switch}", nargs="?", const="true", metavar="BOOL", help=f"true: --dtype {dtype}")
    return [*names, *DTYPE_SWITCHES]


def read_command_line(argv, config, default_file, description):
    """The Command: `config` changed by the --config file, then by the flags. Raises UserError.

    Where neither a config file nor a model nor data is named, `default_file` is the config file. A resumed run starts
    from the configuration in its checkpoint, and may differ from it in FREE_ON_RESUME only.
    """
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE", help="TOML (or JSON) file with the keys below")
    resume = ("--resume_from", "--resume_from_checkpoint")
    help = "continue the run of this checkpoint; auto: the newest of --experiment_name, or a new run if it has none"
    parser.add_argument(*resume, metavar="DIR", default="", help=help)
    parser.add_argument(
        "--dry_run", action="store_true", help="say what the run would need, memory and time; train nothing"
    )
    names = add_flags(parser, config)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and unknown[0].startswith("--"):
        flag = unknown[0].split("=")[0]
        set_key(config, flag[2:], unknown[0].partition("=")[2], flag)  # raises, and names the nearest flag
    if unknown:
        raise UserError(f"{unknown[0]}: not expected here. See --help.")
    flags = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    refuse_two_dtypes(flags, "flags")

    file, saved, auto = arguments.config, None, arguments.resume_from == "auto"
    if config.lora:
        config.lora.load_in_4bit = from_environment("USE_BNB_QUANT")
    if arguments.resume_from and not auto:
        if not (Path(arguments.resume_from) / "trainer_state.json").is_file():
            raise UserError(f"--resume_from {arguments.resume_from}: no checkpoint (no trainer_state.json there).")
        saved = saved_config(arguments.resume_from)
        refuse_other_script(saved, config, arguments.resume_from)
    elif not file and not {"base_model", "train_data", "eval_data"} & flags.keys():
        file = str(default_file)
    if file:
        set_tables(config, read_file(file), file)
    elif saved:
        config = copy.deepcopy(saved)
    for name, value in flags.items():
        set_key(config, name, value, f"--{name}", from_text=True)

    require_model_and_data(config)
    if arguments.dry_run:
        return Command(config, Path(), dry_run=True)
    if auto:
        return newest(config)
    if saved:
        config.output.experiment_name = config.output.experiment_name or saved.output.experiment_name
        refuse_changes(saved, config, arguments.resume_from)
        return Command(config, continued_folder(saved, config, Path(arguments.resume_from)), arguments.resume_from)
    if config.model.init_from not in ("", "scratch"):
        require_stage(config.model)
    if not config.output.experiment_name:
        stem = Path(file).stem if file else Path(config.model.base_model).name
        config.output.experiment_name = f"{stem}_{time.strftime('%Y%m%d-%H%M%S')}"
    return Command(config, new_folder(config))


def from_environment(name):
    """Whether a variable of the environment says true; false where it is not set."""
    value = os.environ.get(name, "false").lower()
    if value not in ("true", "false", "1", "0", ""):
        raise UserError(f"{name}={value} in the environment: need true or false.")
    return value in ("true", "1")


@dataclass
class Command:
    """What a call of a training script asks for."""

    config: Config
    run_dir: Path
    resume_from: str = ""  # a checkpoint folder
    auto: bool = False  # --resume_from auto
    dry_run: bool = False

    @property
    def continues(self):
        """Whether the folder is that of the run which is resumed, so that it may be there."""
        return self.auto or Path(self.resume_from).resolve().parent.parent == self.run_dir.resolve()


def newest(config):
    """The Command that continues the run called experiment_name from its newest checkpoint, or begins it."""
    if not config.output.experiment_name:
        raise UserError("--resume_from auto: add --experiment_name, which says the run that is continued.")
    folder = Path(config.output.output_dir) / config.output.experiment_name
    states = folder.glob("checkpoints/checkpoint_step_*/trainer_state.json")
    found = sorted((path.parent for path in states), key=lambda path: int(path.name.rpartition("_")[2]))
    if found:
        saved = saved_config(found[-1])
        refuse_other_script(saved, config, found[-1])
        refuse_changes(saved, config, found[-1])
    elif config.model.init_from not in ("", "scratch"):
        require_stage(config.model)
    return Command(config, folder, str(found[-1]) if found else "", auto=True)


def new_folder(config):
    """The folder of a new run; one that exists is never written into."""
    folder = Path(config.output.output_dir) / config.output.experiment_name
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --experiment_name, or continue it with --resume_from.")
    return folder


def continued_folder(saved, config, checkpoint):
    """The folder of the run that `checkpoint` belongs to, or a new one where the output options name another."""
    if (config.output.output_dir, config.output.experiment_name) != (saved.output.output_dir, saved.output.experiment_name):
        return new_folder(config)
    place = checkpoint.resolve()
    names = [path.name for path in place.parent.iterdir() if re.fullmatch(r"checkpoint_step_\d+", path.name)]
    if place.parent.name != "checkpoints" or place.name not in names:
        raise UserError(f"--resume_from {checkpoint}: not in a run's checkpoints/; name a new --experiment_name for it.")
    newest = max(names, key=lambda name: int(name.rpartition("_")[2]))
    if place.name != newest:
        raise UserError(f"--resume_from {checkpoint}: {newest} is later; resume that, or name a new --experiment_name.")
    return place.parent.parent


def refuse_other_script(saved, config, checkpoint):
    if (saved.lora is None) != (config.lora is None):
        raise UserError(f"--resume_from {checkpoint}: {'train_lora' if saved.lora else 'train'}.py made it.")


def refuse_changes(saved, config, checkpoint):
    before, now = keys_of(saved), keys_of(config)
    changed = [
        f"{name} ({getattr(before[name][0], name)} -> {getattr(now[name][0], name)})"
        for name in now
        if name not in FREE_ON_RESUME and getattr(before[name][0], name) != getattr(now[name][0], name)
    ]
    if changed:
        raise UserError(f"--resume_from {checkpoint}: another configuration than the checkpoint's: {', '.join(changed)}.")


def require_model_and_data(config):
    for name in ("prm800k", "eqasc", "reveal"):
        if getattr(config.data, f"use_{name}") and not getattr(config.data, f"{name}_path"):
            raise UserError(f"use_{name}: add --{name}_path FILE.")
    model, data = config.model.base_model, config.data.train_paths
    if model and not data:
        raise UserError(f"base_model {model} is named, but no data: add --train_data FILE.")
    if data and not model:
        raise UserError(f"train_data {data[0]} is named, but no model: add --base_model FOLDER (or 'embedded').")
    if config.lora and config.model.add_special_tokens and not config.lora.modules_to_save:
        raise UserError("add_special_tokens: LoRA trains no embeddings; add --modules_to_save embed_tokens lm_head.")
    weights = config.data.data_weights
    paths = config.data.train_data
    if weights and len(weights) != len(paths):
        raise UserError(f"data_weights has {len(weights)} numbers, train_data {len(paths)} paths; give one for each.")
    for name, part in (("prompt_format", "{prompt}"), ("step_format", "{step}")):
        if part not in getattr(config.data, name):
            raise UserError(f"{name} {getattr(config.data, name)!r}: expected {part} in it.")
    if "{marker}" in config.data.step_format and not config.data.step_marker:
        raise UserError(f"step_format {config.data.step_format!r} has a {{marker}}; add --step_marker TOKEN.")
    if not model:
        raise UserError("neither a model nor training data is named: add --base_model FOLDER --train_data FILE.")


def require_stage(model):
    """That `init_from` names an earlier stage which this one can go on from."""
    start = Path(model.init_from)
    found = [name for name in ("lora_adapter", "backbone", "adapter_config.json", "shards.json") if (start / name).exists()]
    if not found:
        raise UserError(f"init_from {start}: no checkpoint, artifact or adapter there; a whole model is a base_model.")
    ours = any((start / name).is_file() for name in ("trainer_state.json", "training_config.toml"))
    tokens = saved_config(start).model.add_special_tokens if ours else []
    if model.add_special_tokens[: len(tokens)] != tokens:
        raise UserError(f"init_from {start}: it added tokens; begin with --add_special_tokens {' '.join(tokens)}.")
