"""The command line of the training scripts: flags over config file over defaults, and which folder a run writes to.

Like config.py it imports the standard library only; both run before torch is loaded.
"""

import argparse
import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
import os
from pathlib import Path
import time

from lora.checksums import damage, require_as_written
from lora.config import (
    ALIASES,
    DTYPE_SWITCHES,
    Config,
    EvaluationConfig,
    keys_of,
    kind_of,
    nearest,
    parsed,
    read_file,
    refuse_two_dtypes,
    saved_config,
    set_key,
    set_tables,
    tables_of,
)
from lora.errors import UserError, by_step, require_one_process
from lora.foreign import check_weights, locate

# What may differ between a checkpoint and the run that continues it: how long, how often, where to, and what is asked of
# the answers afterwards.
FREE_ON_RESUME = {
    *("max_steps", "num_train_epochs", "early_stopping_patience", "logging_steps", "eval_steps", "save_steps"),
    *("max_eval_batches", "skip_nonfinite", "experiment_name", "output_dir", "report_to", "device"),
    *(f.name for f in dataclasses.fields(EvaluationConfig)),
}
SWITCH = {"nargs": "?", "const": True, "metavar": "BOOL", "type": partial(parsed, kind=bool)}


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


def add_flags(parser, table, names, default=""):
    """Flags for some keys of a table, and for their aliases. default: what their help says of it, where it is no value."""
    for f in dataclasses.fields(table):
        value, choices, (container, kind) = getattr(table, f.name), f.metadata["choices"], kind_of(f.type)
        if f.name not in names or container is dict:
            continue  # a dict is given as a table in the file
        notes = [", ".join(choices)] if choices else []
        if default or value not in (None, "", []):
            said = default or (" ".join(value) if isinstance(value, list) else str(value))
            notes.append("default: " + said.replace("\n", "\\n"))
        help = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
        flags = [f"--{f.name}", *(f"--{alias}" for alias, real in ALIASES.items() if real == f.name)]
        form = {"nargs": "+", "action": "extend"} if container is list else SWITCH if kind is bool else {}
        form = {"metavar": "X", "type": partial(parsed, kind=kind)} | form
        parser.add_argument(*flags, dest=f.name, help=help.replace("%", "%%"), **form)


def set_given(config, arguments, names):
    """Set those of some keys whose flags were given."""
    for name in names:
        if getattr(arguments, name, None) is not None:
            set_key(config, name, getattr(arguments, name), f"--{name}")


def read_command_line(argv, config, default_file, description):
    """The Command: `config` changed by the --config file, then by the flags. Raises UserError.

    Where neither a config file nor a model nor data is named, `default_file` is the config file. A resumed run starts
    from the configuration in its checkpoint, and may differ from it in FREE_ON_RESUME only.
    """
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE", help="TOML (or JSON) file with the keys below")
    help = "continue the run of this checkpoint; auto: the newest whole one of --experiment_name, or a new run"
    parser.add_argument("--resume_from", "--resume_from_checkpoint", metavar="DIR", default="", help=help)
    help = "with --resume_from: keys that may differ from the checkpoint's, as a,b,c"
    parser.add_argument("--allow_change", metavar="KEYS", default="", help=help)
    help = "say what the run would need, memory and time; train nothing"
    parser.add_argument("--dry_run", action="store_true", help=help)
    parser.add_argument("--check", action="store_true", help="prove data, model and equalities before a run; train nothing")
    keys = [*keys_of(config), *DTYPE_SWITCHES]
    for title, table in tables_of(config).items():
        add_flags(parser.add_argument_group(f"[{title}]"), table, keys)
    for switch, dtype in DTYPE_SWITCHES.items():
        parser.add_argument(f"--{switch}", help=f"true: --dtype {dtype}", **SWITCH)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and unknown[0].startswith("--"):
        flag = unknown[0].split("=")[0]
        set_key(config, flag[2:], unknown[0].partition("=")[2], flag)  # raises, and names the nearest flag
    if unknown:
        raise UserError(f"{unknown[0]}: not expected here. See --help.")
    flags = {name: value for name, value in vars(arguments).items() if name in keys and value is not None}
    refuse_two_dtypes(flags, "flags")

    file, resume_from, saved = arguments.config, arguments.resume_from, None
    auto = resume_from == "auto"
    allowed = tuple(filter(None, arguments.allow_change.split(",")))
    for name in allowed:
        if name not in keys_of(config):
            raise UserError(f"--allow_change {name}: no such key.{nearest(name, [*keys_of(config)])}")
    if config.lora:
        asked = os.environ.get("USE_BNB_QUANT") or "false"
        set_key(config, "load_in_4bit", parsed(asked, bool), "USE_BNB_QUANT in the environment")
    if resume_from and not auto:
        if not (Path(resume_from) / "trainer_state.json").is_file():
            raise UserError(f"--resume_from {resume_from}: no checkpoint; expected RUN/checkpoints/checkpoint_step_N.")
        found = damage(resume_from, "trainer_state.json")
        if found:
            hint = "--resume_from auto takes the newest whole one"
            raise UserError(f"--resume_from {resume_from}: damaged: {found}; {hint} of an --experiment_name.")
        saved = config_of(resume_from, config)
    elif not file and not {"base_model", "train_data", "eval_data"} & flags.keys():
        file = str(default_file)
    if file:
        set_tables(config, read_file(file), file)
    elif saved:
        config = copy.deepcopy(saved)
    set_given(config, arguments, keys)

    require_model_and_data(config)
    require_packages(config.output.report_to)
    if arguments.check:
        require_one_process()
    if arguments.dry_run or arguments.check:
        return Command(config, Path(), dry_run=arguments.dry_run, check=arguments.check)
    if auto:
        resume_from = newest(config)
        saved = config_of(resume_from, config) if resume_from else None
    if saved:
        config.output.experiment_name = config.output.experiment_name or saved.output.experiment_name
        refuse_changes(saved, config, resume_from, allowed)
    elif config.model.init_from not in ("", "scratch"):
        require_stage(config)
    if not config.output.experiment_name:
        stem = Path(file).stem if file else Path(config.model.base_model).name
        config.output.experiment_name = f"{stem}_{time.strftime('%Y%m%d-%H%M%S')}"
    if auto:
        run_dir = folder_of(config)
    else:
        run_dir = continued_folder(saved, config, Path(resume_from)) if saved else new_folder(config)
    return Command(config, run_dir, resume_from, auto, allowed)


@dataclass
class Command:
    """What a call of a training script asks for."""

    config: Config
    run_dir: Path
    resume_from: str = ""  # a checkpoint folder
    auto: bool = False  # --resume_from auto
    allowed: tuple[str, ...] = ()  # --allow_change: what may be another than the checkpoint's
    dry_run: bool = False
    check: bool = False

    @property
    def continues(self):
        """Whether the folder is that of the run which is resumed, so that it may be there."""
        return self.auto or Path(self.resume_from).resolve().parent.parent == self.run_dir.resolve()

    def require_same(self, facts):
        """Raises UserError where `facts` (JSON, by name) are not those that the checkpoint was made with."""
        if not self.resume_from:
            return
        before = read_file(Path(self.resume_from) / "trainer_state.json")["facts"]
        changed = {name: (shown(before[name]), shown(now)) for name, now in facts.items() if now != before[name]}
        refuse(self.resume_from, changed, self.allowed)


def config_of(checkpoint, config):
    """The configuration that a checkpoint was made with. Raises UserError where the other script made it."""
    saved = saved_config(checkpoint)
    if (saved.lora is None) != (config.lora is None):
        raise UserError(f"--resume_from {checkpoint}: {'train_lora' if saved.lora else 'train'}.py made it; call that.")
    return saved


def newest(config):
    """The newest whole checkpoint of the run called experiment_name; "" where that has none yet. Raises UserError."""
    if not config.output.experiment_name:
        raise UserError("--resume_from auto: which run? Add its --experiment_name.")
    folder = folder_of(config)
    found = by_step(folder / "checkpoints")
    newest_first = (found[step] for step in sorted(found, reverse=True))
    whole = next((path for path in newest_first if not damage(path, "trainer_state.json")), None)  # the run says which not
    if found and not whole:
        raise UserError(f"--resume_from auto: every checkpoint in {folder} is damaged; choose another --experiment_name.")
    return str(whole or "")


def folder_of(config):
    return Path(config.output.output_dir) / config.output.experiment_name


def new_folder(config):
    """The folder of a new run; one that exists is never written into."""
    folder = folder_of(config)
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --experiment_name, or continue it with --resume_from.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"output_dir {config.output.output_dir}: {above} cannot be written to; name another folder.")
    return folder


def continued_folder(saved, config, checkpoint):
    """The folder of the run that `checkpoint` belongs to, or a new one where the output options name another."""
    if (config.output.output_dir, config.output.experiment_name) != (saved.output.output_dir, saved.output.experiment_name):
        return new_folder(config)
    place = checkpoint.resolve()
    found = by_step(place.parent)
    if place.parent.name != "checkpoints" or place not in found.values():
        raise UserError(f"--resume_from {checkpoint}: not in a run's checkpoints/; name a new --experiment_name for it.")
    newest = found[max(found)]
    if place != newest:
        mend = "resume that, or name a new --experiment_name"
        raise UserError(f"--resume_from {checkpoint}: {newest.name} is later; {mend}.")
    return place.parent.parent


def refuse_changes(saved, config, checkpoint, allowed):
    before, now = ({n: getattr(table, n) for n, (table, _) in keys_of(one).items()} for one in (saved, config))
    changed = {name: (before[name], now[name]) for name in now if now[name] != before[name] and name not in FREE_ON_RESUME}
    refuse(checkpoint, changed, allowed)


def refuse(checkpoint, changed, allowed):
    """Raises UserError that names what is `changed`, {name: (before, now)}, and not allowed to be."""
    changed = {name: pair for name, pair in changed.items() if name not in allowed}
    if changed:
        listed = ", ".join(f"{name} ({before} -> {now})" for name, (before, now) in changed.items())
        hint = f"--allow_change {','.join(changed)} allows it"
        raise UserError(f"--resume_from {checkpoint}: not what it was made with: {listed}; {hint}.")


def shown(fact):
    """A fact in a few characters; of hashed files their names and the beginnings of their hashes."""
    if not isinstance(fact, dict):
        return fact
    return " ".join(f"{Path(path).name} {(sha256 or '')[:8]}".strip() for path, sha256 in fact.items())


def require_packages(report_to):
    """That each of "tensorboard,wandb" is one of the two and there."""
    for name in filter(None, report_to.split(",")):
        if name not in ("tensorboard", "wandb"):
            raise UserError(f"report_to {name}: expected tensorboard, wandb, or both with a comma between them.")
        if find_spec(name) is None:
            raise UserError(f"report_to {name}: the package is not there: pip install 'plainlora[{name}]'.")


def require_model_and_data(config):
    for name in ("prm800k", "eqasc", "reveal"):
        if getattr(config.data, f"use_{name}") and not getattr(config.data, f"{name}_path"):
            raise UserError(f"use_{name}: no file is named; add --{name}_path FILE.")
    model, data = config.model.base_model, config.data.train_paths
    if model and not data:
        raise UserError(f"base_model {model} is named, but no data: add --train_data FILE.")
    if data and not model:
        raise UserError(f"train_data {data[0]} is named, but no model: add --base_model FOLDER (or 'embedded').")
    if config.method == "head":
        if config.model.task == "lm":
            raise UserError("lora_r = 0: nothing would be trained of a language model; give a rank, or add --task score.")
        tables = vars(config.lora) | vars(config.model)
        odd = [name for name in ("modules_to_save", "use_dora", "rank_pattern", "add_special_tokens") if tables[name]]
        if odd:
            raise UserError(f"lora_r = 0: the score head alone is trained; leave {', '.join(odd)} out.")
    if config.lora and config.model.add_special_tokens and not config.lora.modules_to_save:
        raise UserError("add_special_tokens: LoRA trains no embeddings; add --modules_to_save embed_tokens lm_head.")
    weights, paths = config.data.data_weights, config.data.train_data
    if weights and len(weights) != len(paths):
        raise UserError(f"data_weights has {len(weights)} numbers, train_data {len(paths)} paths; give one for each.")
    for name, part in (("prompt_format", "{prompt}"), ("step_format", "{step}")):
        if part not in getattr(config.data, name):
            raise UserError(f"{name} {getattr(config.data, name)!r}: expected {part} in it.")
    if "{marker}" in config.data.step_format and not config.data.step_marker:
        raise UserError(f"step_format {config.data.step_format!r} has a {{marker}}; add --step_marker TOKEN.")
    if not model:
        raise UserError("neither a model nor training data is named: add --base_model FOLDER --train_data FILE.")
    source, local = locate(model)
    if local and config.model.init_from != "scratch":
        check_weights(source)


def require_stage(config):
    """That `init_from` names an earlier stage which this one can go on from."""
    model, start = config.model, Path(config.model.init_from)
    found = [name for name in ("lora_adapter", "backbone", "adapter_config.json", "shards.json") if (start / name).exists()]
    if found and config.method == "head":
        raise UserError(
            f"init_from {start}: holds {found[0]}, and lora_r 0 begins from a head; name the merged base_model."
        )
    if not found and not (start / "mlp_head.safetensors").exists():
        raise UserError(f"init_from {start}: no checkpoint, artifact or adapter; a whole model is named as base_model.")
    require_as_written(start)
    ours = any((start / name).is_file() for name in ("trainer_state.json", "training_config.toml"))
    tokens = saved_config(start).model.add_special_tokens if ours else []
    if model.add_special_tokens[: len(tokens)] != tokens:
        raise UserError(f"init_from {start}: it has tokens of its own; begin with --add_special_tokens {' '.join(tokens)}.")
