"""The command line of the training scripts: flags over config file over defaults.

Like the rest of config/ it is read before torch is loaded.
"""

import copy
from dataclasses import dataclass, field
import os
from pathlib import Path
import time

from lora.common.checksums import find_damage
from lora.common.errors import UserError
from lora.common.exit_status import RunStatus, require_one_process
from lora.common.paths import ROOT
from lora.common.serialization import read_file
from lora.config.cross_checks import require_model_and_data, require_packages, require_stage
from lora.config.flags import SWITCH, Parser, add_flags, apply_flags
from lora.config.resume import config_of, refuse, refuse_changes, shown
from lora.config.run_folder import continued_folder, new_folder, newest_checkpoint, run_folder
from lora.config.schema import Config, tables_of
from lora.config.tables import DTYPE_SWITCHES, fields_by_key, refuse_two_dtypes, set_key, set_tables
from lora.config.values import nearest, parse_text


def read_command_line(argv, config, default_file, description):
    """The Command: `config` changed by the --config file, then by the flags. Raises UserError.

    Where neither a config file nor a model nor data is named, `default_file` is the config file. A
    resumed run starts from the configuration in its checkpoint, and may differ from it in
    FREE_ON_RESUME only.
    """
    parser = Parser(description)
    parser.add_argument("--config", metavar="FILE", help="TOML (or JSON) file with the keys below")
    help = "continue the run of this checkpoint; auto: the newest whole one of --experiment_name, or a new run"
    parser.add_argument(
        "--resume_from", "--resume_from_checkpoint", metavar="DIR", default="", help=help
    )
    help = "with --resume_from: keys that may differ from the checkpoint's, as a,b,c"
    parser.add_argument("--allow_change", metavar="KEYS", default="", help=help)
    help = "say what the run would need, memory and time; train nothing"
    parser.add_argument("--dry_run", action="store_true", help=help)
    parser.add_argument(
        "--check",
        action="store_true",
        help="prove data, model and equalities before a run; train nothing",
    )
    keys = [*fields_by_key(config), *DTYPE_SWITCHES]
    for title, table in tables_of(config).items():
        add_flags(parser.add_argument_group(f"[{title}]"), table, keys)
    for switch, dtype in DTYPE_SWITCHES.items():
        parser.add_argument(f"--{switch}", help=f"true: --dtype {dtype}", **SWITCH)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and unknown[0].startswith("--"):
        flag = unknown[0].split("=")[0]
        # Raises, and names the nearest flag
        set_key(config, flag[2:], unknown[0].partition("=")[2], flag)
    if unknown:
        raise UserError(f"{unknown[0]}: not expected here. See --help.")
    flags = {
        name: value for name, value in vars(arguments).items() if name in keys and value is not None
    }
    refuse_two_dtypes(flags, "flags")

    file, resume_from, saved = arguments.config, arguments.resume_from, None
    auto = resume_from == "auto"
    allowed = tuple(filter(None, arguments.allow_change.split(",")))
    for name in allowed:
        if name not in fields_by_key(config):
            raise UserError(
                f"--allow_change {name}: no such key.{nearest(name, [*fields_by_key(config)])}"
            )
    if config.lora:
        asked = os.environ.get("USE_BNB_QUANT") or "false"
        set_key(config, "load_in_4bit", parse_text(asked, bool), "USE_BNB_QUANT in the environment")
    if resume_from and not auto:
        if not (Path(resume_from) / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from {resume_from}: no checkpoint; expected RUN/checkpoints/checkpoint_step_N."
            )
        found = find_damage(resume_from, "trainer_state.json")
        if found:
            hint = "--resume_from auto takes the newest whole one"
            raise UserError(
                f"--resume_from {resume_from}: damaged: {found}; {hint} of an --experiment_name."
            )
        saved = config_of(resume_from, config)
    elif not file and not {"base_model", "train_data", "eval_data"} & flags.keys():
        file = str(ROOT / "configs" / default_file)
    if file:
        set_tables(config, read_file(file), file)
    elif saved:
        config = copy.deepcopy(saved)
    apply_flags(config, arguments, keys)

    require_model_and_data(config)
    require_packages(config.output.report_to)
    if arguments.check:
        require_one_process()
    if arguments.dry_run or arguments.check:
        return Command(config, Path(), dry_run=arguments.dry_run, check=arguments.check)
    if auto:
        resume_from = newest_checkpoint(config)
        saved = config_of(resume_from, config) if resume_from else None
    if saved:
        config.output.experiment_name = (
            config.output.experiment_name or saved.output.experiment_name
        )
        refuse_changes(saved, config, resume_from, allowed)
    elif config.model.init_from not in ("", "scratch"):
        require_stage(config)
    if not config.output.experiment_name:
        stem = Path(file).stem if file else Path(config.model.base_model).name
        config.output.experiment_name = f"{stem}_{time.strftime('%Y%m%d-%H%M%S')}"
    if auto:
        run_dir = run_folder(config)
    else:
        run_dir = (
            continued_folder(saved, config, Path(resume_from)) if saved else new_folder(config)
        )
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
    status: RunStatus = field(default_factory=RunStatus)

    @property
    def continues(self):
        """Whether the folder is that of the run which is resumed, so that it may be there."""
        return self.auto or Path(self.resume_from).resolve().parent.parent == self.run_dir.resolve()

    def require_same(self, facts):
        """Raises UserError where `facts` (JSON, by name) are not those that the checkpoint was made
        with.
        """
        if not self.resume_from:
            return
        before = read_file(Path(self.resume_from) / "trainer_state.json")["facts"]
        changed = {
            name: (shown(before[name]), shown(now))
            for name, now in facts.items()
            if now != before[name]
        }
        refuse(self.resume_from, changed, self.allowed)
