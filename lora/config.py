"""One set of dataclasses = the tables of the TOML file = the command-line flags = the configuration saved with a run.

Only the standard library (and tomli) is imported here, so that a wrong flag is answered before torch has begun to load.
The order of precedence is flag, then config file, then the default written below.
"""

import argparse
import copy
import dataclasses
from dataclasses import dataclass, field
import difflib
import json
import math
from pathlib import Path
import re
import time
import types
import typing

import tomli

from lora.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def key(default, help, *, low=None, above=None, high=None, choices=None):
    """A configuration key: its default, its help line, and what its value may be (low and high are allowed, above not)."""
    checks = {"help": help, "low": low, "above": above, "high": high, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=checks)
    return field(default=default, metadata=checks)


@dataclass
class ModelConfig:
    base_model: str = key("", "folder or Hub name of the base; 'embedded' is the one in assets/")
    task: str = key("lm", "what is learned: the next token, or a score for every step", choices=("lm", "score"))
    init_from: str = key("", "'scratch': random weights in the base's shape", choices=("", "scratch"))
    head_dropout: float = key(0.0, "dropout inside the score head", low=0.0, high=0.9)


@dataclass
class DataConfig:
    train_data: list[str] = key([], "training files, or arithmetic:SPLIT:COUNT")
    eval_data: list[str] = key([], "held-out files; without them eval_fraction of the training data is held out")
    eval_fraction: float = key(0.1, "share of the prompts held out where there is no eval_data", above=0.0, high=0.9)
    max_length: int = key(2048, "tokens an example may have", low=2)
    max_samples: int | None = key(None, "use only the first N training examples", low=1)
    label_max: float = key(1.0, "labels are 0..label_max in the files and are divided by it", above=0.0)


@dataclass
class LoraConfig:
    lora_r: int = key(16, "rank of the update", low=1)
    lora_alpha: float = key(32, "the update is scaled by lora_alpha / lora_r", above=0.0)
    lora_dropout: float = key(0.0, "dropout on the input of A (0.05 costs a quarter of the speed)", low=0.0, high=0.9)
    target_modules: list[str] = key(["all-linear"], "name endings, regular expressions, or all-linear (all but the head)")


@dataclass
class TrainingConfig:
    learning_rate: float = key(2e-5, "peak learning rate", above=0.0)
    batch_size: int = key(4, "examples per micro-batch and device", low=1)
    gradient_accumulation_steps: int = key(4, "a step is batch_size x this many examples", low=1)
    max_steps: int | None = key(None, "optimizer steps; default: 10000, or what num_train_epochs needs", low=1)
    num_train_epochs: float | None = key(None, "passes over the data; with max_steps the smaller ends the run", above=0.0)
    warmup_steps: int | None = key(None, "default: the smaller of 500 and 5 % of the run", low=0)
    warmup_ratio: float | None = key(
        None, "warm-up as a share of the run, where warmup_steps is not given", low=0.0, high=1.0
    )
    lr_scheduler_type: str = key("cosine", "after the warm-up", choices=("cosine", "linear", "constant"))
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm; 0: not clipped", low=0.0)
    weight_decay: float = key(0.0, "AdamW's", low=0.0)
    adam_beta2: float = key(0.999, "AdamW's; smaller for training from random weights", low=0.0, high=0.9999)
    seed: int = key(42, "of the weights, the order of the data and the dropout", low=0, high=2**63 - 1)
    eval_steps: int = key(100, "evaluate every N steps", low=1)
    max_eval_batches: int = key(100, "evaluate on the first N x 4 examples; 0: all", low=0)
    early_stopping_patience: int = key(0, "stop after N evaluations without a new best; 0: never", low=0)
    device: str = key("auto", "where to run", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = key("auto", "of the computation", choices=("auto", "float32", "bfloat16", "float16"))


@dataclass
class OutputConfig:
    experiment_name: str = key("", "folder below output_dir; default: <config name>_<date>-<time>")
    output_dir: str = key("outputs", "where runs are kept")
    logging_steps: int = key(10, "a line of metrics every N steps", low=1)
    save_steps: int = key(500, "save a checkpoint every N steps", low=1)


@dataclass
class Config:
    """Full fine-tuning's configuration; `get_lora_config()` is LoRA's. `config.save(path)` writes TOML or JSON."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def as_dict(self):
        """Tables of the keys that have a value; `from_dict` reads it back."""
        tables = {name: dataclasses.asdict(table) for name, table in tables_of(self).items()}
        return {name: {k: v for k, v in table.items() if v is not None} for name, table in tables.items()}

    def save(self, path):
        path = Path(path)
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n" if path.suffix == ".json" else to_toml(self.as_dict()))


def get_lora_config():
    """LoRA's defaults: a [lora] table, and a learning rate that suits adapters."""
    config = Config(lora=LoraConfig())
    config.training.learning_rate = 1e-4
    return config


ALIASES = {
    "per_device_train_batch_size": "batch_size",
    "num_epochs": "num_train_epochs",
    "max_seq_length": "max_length",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "base_model_id": "base_model",
    "model_name": "base_model",
}
# HfArgumentParser's habit: `bf16 = true` chooses the dtype, `bf16 = false` (alone) asks for full precision.
DTYPE_SWITCHES = {"bf16": "bfloat16", "fp16": "float16"}


def tables_of(config):
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) is not None}


def to_toml(tables):
    """TOML for tables of strings, numbers, booleans and lists of them. (JSON's escapes are a subset of TOML's.)"""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]"] + [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in table.items()] + [""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- setting a value


def nearest(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def check(where, value, annotation, limits):
    """`value` as the type the key has, or a UserError that says what was expected."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = kinds[0]
    if typing.get_origin(kind) is list:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where} = {value!r}: need a list of strings.")
        return value
    expected = {int: "an integer", float: "a number", str: "a string"}[kind]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where} = {value!r}: need {expected}.")
    low, above, high, choices = (limits[k] for k in ("low", "above", "high", "choices"))
    if choices and value not in choices:
        raise UserError(f"{where} = {value!r}: need one of {', '.join(choices)}.{nearest(value, choices)}")
    if low is not None and value < low:
        raise UserError(f"{where} = {value}: need {expected} >= {low}.")
    if above is not None and value <= above:
        raise UserError(f"{where} = {value}: need {expected} > {above:g}.")
    if high is not None and value > high:
        raise UserError(f"{where} = {value}: need {expected} <= {high}.")
    return value


def keys_of(config):
    """Every key's name -> (its table, its dataclass field)."""
    return {f.name: (table, f) for table in tables_of(config).values() for f in dataclasses.fields(table)}


def parse_value(text, annotation):
    """A flag's text as the type of its key, or as it is: `check` then tells what is wrong with it."""
    kind = typing.get_args(annotation)[0] if isinstance(annotation, types.UnionType) else annotation
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def set_key(config, name, value, where, from_text=False):
    """Set one key by its name or an alias; `where` ("--lora_r", "run.toml: lora.lora_r") begins the error messages.

    A flag's value is a text, and is first read as the type of its key.
    """
    keys = keys_of(config)
    if name in DTYPE_SWITCHES:
        value = parse_value(value, bool) if from_text else value
        if type(value) is not bool:
            raise UserError(f"{where} = {value!r}: need true or false.")
        if value:
            config.training.dtype = DTYPE_SWITCHES[name]
        elif config.training.dtype in ("auto", DTYPE_SWITCHES[name]):
            config.training.dtype = "float32"
        return
    name = ALIASES.get(name, name)
    if name not in keys:
        if config.lora is None and name in keys_of(get_lora_config()):
            raise UserError(f"{where}: train.py trains all weights and has no such key; use train_lora.py.")
        raise UserError(f"{where}: no such key.{nearest(name, [*keys, *ALIASES, *DTYPE_SWITCHES])}")
    table, f = keys[name]
    value = parse_value(value, f.type) if from_text else value
    setattr(table, name, check(where, value, f.type, f.metadata))


def refuse_two_dtypes(values, where):
    """dtype, bf16 = true and fp16 = true each choose the dtype: one of them may be given in one place."""
    chosen = [n for n in ("dtype", *DTYPE_SWITCHES) if n in values and str(values[n]).lower() not in ("false", "0", "no")]
    if len(chosen) > 1:
        raise UserError(f"{where}: {' and '.join(chosen)} both choose the dtype; give one of them.")


def set_tables(config, tables, where):
    """Set what a config file says, table by table. Each key must stand in its own table."""
    tables_known = tables_of(config)
    home = {name: title for title, table in tables_known.items() for name in (f.name for f in dataclasses.fields(table))}
    given = set()
    if not isinstance(tables, dict):
        raise UserError(f"{where}: expected tables of keys, found a {type(tables).__name__}.")
    for title, table in tables.items():
        if title == "lora" and config.lora is None:
            raise UserError(f"{where}: [lora]: train.py trains all weights; use train_lora.py.")
        if title not in tables_known or not isinstance(table, dict):
            belongs = home.get(ALIASES.get(title, title))
            hint = f" It belongs in [{belongs}]." if belongs else nearest(title, list(tables_known))
            raise UserError(f"{where}: {title}: no such table.{hint}")
        refuse_two_dtypes(table, f"{where}: {title}")
        for name, value in table.items():
            name = name.replace("-", "_")
            real = "dtype" if name in DTYPE_SWITCHES else ALIASES.get(name, name)
            if home.get(real, title) != title:
                raise UserError(f"{where}: {title}.{name}: it belongs in [{home[real]}].")
            if real in given and name not in DTYPE_SWITCHES:
                raise UserError(f"{where}: {title}.{name}: {real} is given twice.")
            set_key(config, name, value, f"{where}: {title}.{name}")
            given.add(real)


def read_file(path):
    """The tables of a TOML file, or of a JSON file with the same keys."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return json.loads(text) if str(path).endswith(".json") else tomli.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}.") from None


def from_dict(tables, where):
    """The configuration saved with a run, from its tables."""
    config = get_lora_config() if "lora" in tables else Config()
    set_tables(config, tables, where)
    return config


# ---------------------------------------------------------------------------------------------------- command line

# What may differ between a checkpoint and the run that continues it: how long, how often, and where to.
FREE_ON_RESUME = {
    *("max_steps", "num_train_epochs", "early_stopping_patience", "logging_steps", "eval_steps", "save_steps"),
    *("max_eval_batches", "experiment_name", "output_dir", "device"),
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
    for title, table in tables_of(config).items():
        group = parser.add_argument_group(f"[{title}]")
        for f in dataclasses.fields(table):
            default, choices = getattr(table, f.name), f.metadata["choices"]
            notes = [", ".join(choices)] if choices else []
            if default not in (None, "", []):
                notes.append(f"default: {' '.join(default) if isinstance(default, list) else default}")
            help = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
            flags = [f"--{f.name}", *(f"--{alias}" for alias, real in ALIASES.items() if real == f.name)]
            nargs = "+" if typing.get_origin(f.type) is list else None
            action = "extend" if nargs else "store"
            group.add_argument(*flags, dest=f.name, nargs=nargs, action=action, metavar="X", help=help.replace("%", "%%"))
    for switch, dtype in DTYPE_SWITCHES.items():
        parser.add_argument(f"--{switch}", nargs="?", const="true", metavar="BOOL", help=f"true: --dtype {dtype}")
    return [*keys_of(config), *DTYPE_SWITCHES]


def read_command_line(argv, config, default_file, description):
    """The Command: `config` changed by the --config file, then by the flags. Raises UserError.

    Where neither a config file nor a model nor data is named, `default_file` is the config file. A resumed run starts
    from the configuration in its checkpoint, and may differ from it in FREE_ON_RESUME only.
    """
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE", help="TOML (or JSON) file with the keys below")
    resume = ("--resume_from", "--resume_from_checkpoint")
    parser.add_argument(*resume, metavar="DIR", default="", help="continue the run of this checkpoint")
    names = add_flags(parser, config)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and unknown[0].startswith("--"):
        flag = unknown[0].split("=")[0]
        set_key(config, flag[2:], None, flag)  # raises, and names the nearest flag
    if unknown:
        raise UserError(f"{unknown[0]}: not expected here. See --help.")
    flags = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    refuse_two_dtypes(flags, "flags")

    file, saved = arguments.config, None
    if arguments.resume_from:
        if not (Path(arguments.resume_from) / "trainer_state.json").is_file():
            raise UserError(f"--resume_from {arguments.resume_from}: no checkpoint (no trainer_state.json there).")
        saved = saved_config(arguments.resume_from)
        if (saved.lora is None) != (config.lora is None):
            raise UserError(f"--resume_from {arguments.resume_from}: {'train_lora' if saved.lora else 'train'}.py made it.")
    elif not file and not {"base_model", "train_data", "eval_data"} & flags.keys():
        file = str(default_file)
    if file:
        set_tables(config, read_file(file), file)
    elif saved:
        config = copy.deepcopy(saved)
    for name, value in flags.items():
        set_key(config, name, value, f"--{name}", from_text=True)

    require_model_and_data(config)
    if saved:
        config.output.experiment_name = config.output.experiment_name or saved.output.experiment_name
        refuse_changes(saved, config, arguments.resume_from)
        return Command(config, continued_folder(saved, config, Path(arguments.resume_from)), arguments.resume_from)
    if not config.output.experiment_name:
        stem = Path(file).stem if file else Path(config.model.base_model).name
        config.output.experiment_name = f"{stem}_{time.strftime('%Y%m%d-%H%M%S')}"
    return Command(config, new_folder(config))


@dataclass
class Command:
    """What a call of a training script asks for."""

    config: Config
    run_dir: Path
    resume_from: str = ""  # a checkpoint folder


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


def saved_config(folder):
    """The configuration that a checkpoint (trainer_state.json) or an artifact (training_config.toml) was made with."""
    state, toml = Path(folder) / "trainer_state.json", Path(folder) / "training_config.toml"
    if state.is_file():
        return from_dict(read_file(state)["config"], str(state))
    if toml.is_file():
        return from_dict(read_file(toml), str(toml))
    raise UserError(f"{folder}: no checkpoint and no final artifact of ours (no {state.name}, no {toml.name}).")


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
    model, data = config.model.base_model, config.data.train_data
    if model and not data:
        raise UserError(f"base_model {model} is named, but no data: add --train_data FILE.")
    if data and not model:
        raise UserError(f"train_data {data[0]} is named, but no model: add --base_model FOLDER (or 'embedded').")
    if not model:
        raise UserError("neither a model nor training data is named: add --base_model FOLDER --train_data FILE.")
