"""The command line of the training scripts: flags over config file over defaults."""

from argparse import SUPPRESS, Namespace
import copy
from dataclasses import dataclass, field
import os
from pathlib import Path
import time
from typing import Any

from lora.common.checkpoint_folders import has_optimizer, resumable_by_step
from lora.common.checksums import find_damage
from lora.common.errors import UserError
from lora.common.exit_status import RunStatus, require_one_process
from lora.common.paths import ROOT, or_packaged
from lora.common.printable_text import print_on_rank_zero
from lora.common.toml_json import read_file
from lora.config import resume
from lora.config.cross_checks import require_model_and_data, require_packages
from lora.config.flags import SWITCH, Parser, add_flags, apply_flags
from lora.config.parse_values import parse_text
from lora.config.run_folder import continued_folder, new_folder, newest_checkpoint, run_folder
from lora.config.schema import Config, fields_by_key, tables_of
from lora.config.set_keys import set_key, set_tables, settle_dtype
from lora.config.table import DTYPE_SWITCHES, key_hint
from lora.config.unread_keys import print_unread_keys

EVERYDAY_KEYS = {
    "base_model", "task", "train_data", "eval_data", "max_length", "lora_r", "learning_rate",
    "batch_size", "max_steps", "num_train_epochs", "experiment_name",
}  # fmt: skip


@dataclass
class Command:
    """What a call of a training script asks for."""

    config: Config
    run_dir: Path
    resume_from: str = ""  # a checkpoint folder
    auto: bool = False  # --resume_from auto
    allowed: tuple[str, ...] = ()  # --allow_change: what may differ from the checkpoint's
    dry_run: bool = False
    check: bool = False
    status: RunStatus = field(default_factory=RunStatus)

    @property
    def continues(self) -> bool:
        """Whether the run's folder is that of the resumed run, so that it may exist."""
        if self.auto:
            return True
        if not self.resume_from:
            return False
        checkpoints = self.run_dir / "checkpoints"  # perhaps a link to another disk
        return Path(self.resume_from).resolve().parent == checkpoints.resolve()

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError where facts, {name: JSON}, differ from those of the checkpoint."""
        if not self.resume_from:
            return
        before = read_file(Path(self.resume_from) / "trainer_state.json")["facts"]
        changed = {}
        for name, fact in facts.items():
            if fact != before.get(name, fact):  # older checkpoints do not have all of them
                changed[name] = (resume.describe_fact(before[name]), resume.describe_fact(fact))
        model, data = self.config.model, self.config.data
        allowed = {*self.allowed}
        if "base_model" in allowed:
            allowed.add("base_config")
        if allowed & {*vars(model), *vars(data)}:  # what they say is read as other tokens
            allowed |= {"train_tokens", "eval_tokens"}
        resume.refuse_changes(self.resume_from, changed, allowed)
        if not self.continues:
            return
        # The held-out examples come from the training data where no eval_data are named.
        not_measured = ("train_data", "train_tokens") if data.eval_data else ()
        other_losses = []
        for name in changed:
            earlier, now = before[name], facts[name]
            if isinstance(now, dict):  # {path: sha256}, of which the paths may have moved
                earlier, now = list(earlier.values()), list(now.values())
            if now != earlier and name not in not_measured:
                other_losses.append(name)
        resume.raise_other_losses(other_losses)


def read_command_line(argv: list[str], config: Config, default_file: str, summary: str) -> Command:
    """Return what a call of a script asks for. Raises UserError.

    The flags override the --config file, or else the configuration of the resumed checkpoint, and
    that overrides the defaults in `config`. Where neither a checkpoint nor a config file nor a
    model nor data is named, `default_file` in configs/ is the config file.
    """
    arguments = parse_arguments(argv, config, summary)
    if config.lora:
        in_4bit = parse_text(os.environ.get("USE_BNB_QUANT") or "false", bool)
        set_key(config, "load_in_4bit", in_4bit, "USE_BNB_QUANT in the environment")

    # A checkpoint or a config file changes the defaults, and the flags change what they say.
    resume_from = arguments.resume_from
    auto = resume_from == "auto"
    saved = None
    if resume_from and not auto:
        require_checkpoint(resume_from)
        saved = resume.checkpoint_config(resume_from, config)
    config_file = find_config(arguments.config)
    named = ("base_model", "train_data", "eval_data", "use_prm800k", "use_eqasc", "use_reveal")
    names_nothing = all(getattr(arguments, name) is None for name in named)
    if not config_file and not saved and names_nothing:
        config_file = str(ROOT / "configs" / default_file)
    if config_file:
        set_tables(config, read_file(config_file), config_file)
    elif saved:
        config = copy.deepcopy(saved)
    apply_flags(config, arguments, [*fields_by_key(config), *DTYPE_SWITCHES])
    settle_dtype(config, vars(arguments), "flags")

    # Checks that need no folder of a run.
    require_model_and_data(config)
    require_packages(config.output.report_to)
    print_unread_keys(config)
    if arguments.check:
        require_one_process()

    # The run to continue, or the stage to begin from.
    if auto:
        resume_from = newest_checkpoint(config)
        if resume_from:
            saved = resume.checkpoint_config(resume_from, config)
    output = config.output
    if saved:
        output.experiment_name = output.experiment_name or saved.output.experiment_name
        if config.data.max_length == "auto":  # the checkpoint has the number that it became
            config.data.max_length = saved.data.max_length
        resume.refuse_changed_keys(saved, config, resume_from, arguments.allow_change)
    elif config.model.init_from not in ("", "scratch"):
        from lora.config.earlier_stage import require_stage

        require_stage(config)
    if arguments.check:  # begins with the weights of the base, or of a stage, and writes no run
        return Command(config, Path(), check=True)
    if arguments.dry_run:
        return Command(config, Path(), resume_from, allowed=arguments.allow_change, dry_run=True)

    output.experiment_name = output.experiment_name or new_name(config, config_file)
    run_dir = choose_run_dir(config, saved, resume_from, auto)
    command = Command(config, run_dir, resume_from, auto, arguments.allow_change)
    if saved and command.continues:
        resume.refuse_other_losses(saved, config)
    return command


def new_name(config: Config, config_file: str | None) -> str:
    """Return a name for a run that was given none: its config file or base, and the time."""
    stem = Path(config_file).stem if config_file else Path(config.model.base_model).name
    now = time.strftime("%Y%m%d-%H%M%S")
    return f"{stem}_{now}-{os.getpid()}"  # several may start in one second


def choose_run_dir(config: Config, saved: Config | None, resume_from: str, auto: bool) -> Path:
    """Return the folder of a run that is named: its own, or that of the run that it continues."""
    if auto:
        return run_folder(config)
    if saved:
        return continued_folder(saved, config, Path(resume_from))
    return new_folder(config)


def find_config(name: str | None) -> str | None:
    """Return the --config file `name`, or the packaged one of that name, and print which."""
    found = or_packaged(name or "", ".", "configs")
    if name and found != name:
        print_on_rank_zero(f"--config {name}: no such file here; using the packaged {found}")
    return found or None


def parse_arguments(argv: list[str], config: Config, description: str) -> Namespace:
    """Parse the flags, without applying them. Raises UserError for one that is unknown."""
    parser = Parser(description)
    parser.usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
    parser.description += " Without a base, data or --config it trains a small built-in example."
    parser.epilog = "A flag overrides the same key of the file, in the table named in brackets."
    add, tables, keys = parser.add_argument, tables_of(config), fields_by_key(config)
    for table in tables.values():
        add_flags(parser, table, EVERYDAY_KEYS)
    add("--config", metavar="FILE", help="TOML, JSON or YAML file that sets any of the keys")
    help = "checkpoint to continue, or auto: the newest of --experiment_name, if there is one"
    add("--resume_from", metavar="DIR|auto", default="", help=help)
    add("--resume_from_checkpoint", dest="resume_from", default=SUPPRESS, help=SUPPRESS)
    add("--dry_run", action="store_true", help="print the memory and time of the run and stop")
    add("--check", action="store_true", help="test data, model and exactness of training and stop")
    for title, table in tables.items():
        add_flags(parser.add_argument_group(f"[{title}]"), table, keys.keys() - EVERYDAY_KEYS)
    add = parser.add_argument_group("other options").add_argument
    help = "keys that may change on resume"
    add("--allow_change", metavar="KEY", nargs="+", action="extend", default=[], help=help)
    for switch, dtype in DTYPE_SWITCHES.items():
        add(f"--{switch}", help=f"the same as --dtype {dtype}", **SWITCH)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        from lora.config.other_trainers import our_arguments

        arguments, unknown = parser.parse_known_args(our_arguments(config, argv, unknown))
    if unknown:
        raise UserError(f"{unknown[0]}: not expected here. See --help.")
    names = ",".join(arguments.allow_change).split(",")
    arguments.allow_change = tuple(name for name in names if name)
    for name in arguments.allow_change:
        if name not in keys:
            raise UserError(f"--allow_change {name}: no such key.{key_hint(name, keys)}")
    return arguments


def require_checkpoint(folder: str) -> None:
    """Raise UserError where `folder` is no checkpoint, or a damaged one."""
    if Path(folder).name.startswith("checkpoint-"):
        hint = "start from its adapter with --init_from, or name its model as --base_model"
        raise UserError(f"--resume_from {folder}: another trainer's, which is not read; {hint}.")
    if not (Path(folder) / "trainer_state.json").is_file():
        expected = "expected RUN/checkpoints/checkpoint_step_N"
        raise UserError(f"--resume_from {folder}: no checkpoint; {expected}.")
    damage = find_damage(folder, "trainer_state.json")
    if damage:
        hint = "--resume_from auto takes the newest whole one of an --experiment_name"
        raise UserError(f"--resume_from {folder}: damaged: {damage}; {hint}.")
    if not has_optimizer(Path(folder)):
        resumable = resumable_by_step(Path(folder).resolve().parent)
        hint = "start a run from its weights with --init_from"
        if resumable:
            hint = f"resume {resumable[max(resumable)].name}, the last; or {hint}"
        raise UserError(f"--resume_from {folder}: it has no optimizer, only weights; {hint}.")
