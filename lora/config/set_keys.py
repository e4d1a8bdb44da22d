"""Setting the keys of a configuration, from the tables of a file or one by one."""

from pathlib import Path
from typing import Any

from lora.common.checkpoint_folders import require_known_format
from lora.common.errors import UserError
from lora.common.plain_file import plain_file
from lora.common.toml_json import read_file
from lora.config.parse_values import NO_LIMITS, check_value
from lora.config.schema import Config, fields_by_key, get_lora_config, table_keys, tables_of
from lora.config.table import ALIASES, DTYPE_SWITCHES


def key_values(config: Config) -> dict[str, Any]:
    return {name: getattr(table, name) for name, (table, _) in fields_by_key(config).items()}


def set_key(config: Config, name: str, value: Any, where: str) -> None:
    """Set one key by its name or an alias. Raises UserError.

    `where` ("--lora_r", "run.toml: lora.lora_r") begins the error messages.
    """
    if name in DTYPE_SWITCHES:
        value = check_value(where, value, bool, {**NO_LIMITS, "word": "auto"})
        setattr(config.training, "dtype" if value == "auto" else name, value)
        return
    fields = fields_by_key(config)
    name = ALIASES.get(name, name)
    if name not in fields:
        from lora.config.other_trainers import why_unknown

        raise UserError(f"{where}: {why_unknown(config, name)}")
    table, field = fields[name]
    if name == "max_steps" and value in (-1, "-1"):  # in Transformers: not given
        table.max_steps = None
        return
    setattr(table, name, check_value(where, value, field.type, field.metadata))


def settle_dtype(config: Config, values: dict[str, Any], where: str) -> None:
    """Set the dtype that dtype, bf16 and fp16 choose, where several are given in one place.

    Their order does not matter: "auto" gives way to a choice, and bf16 = false to both. Raises
    UserError where two choices differ.
    """
    chosen = {}
    for name in ("dtype", *DTYPE_SWITCHES):
        if values.get(name) is not None:
            alone = Config()
            set_key(alone, name, values[name], f"{where}: {name}")
            if name == "dtype" or alone.training.dtype != "float32":  # no switch that is false
                chosen[name] = alone.training.dtype
    choices = {name: dtype for name, dtype in chosen.items() if dtype != "auto"} or chosen
    if len(set(choices.values())) > 1:
        names = " and ".join(choices)
        raise UserError(f"{where}: {names} both choose the dtype; give one of them.")
    if choices:
        config.training.dtype = next(iter(choices.values()))


def set_tables(config: Config, tables: dict[str, Any], where: str) -> None:
    """Set the keys of the file `where`. Raises UserError."""
    if not all(is_own_table(config, title, table) for title, table in tables.items()):
        from lora.config.other_trainers import our_tables

        tables = our_tables(config, tables, where)
    given: dict[str, Any] = {}
    for title, table in tables.items():
        for name, value in table.items():
            key_in_file = f"{where}: {title}.{name}" if title else f"{where}: {name}"
            name = ALIASES.get(name, name)
            if name in given:
                raise UserError(f"{key_in_file}: {name} is given twice.")
            set_key(config, name, value, key_in_file)
            given[name] = value
    settle_dtype(config, given, where)


def is_own_table(config: Config, title: str, table: Any) -> bool:
    """Return whether a table has our name, and each of its keys belongs there and has a value."""
    own_table = tables_of(config).get(title)
    if own_table is None or not isinstance(table, dict) or None in table.values():
        return False
    for name, value in table.items():
        # [training.optimizer] is another trainer's.
        is_table = isinstance(value, dict) and name not in table_keys()
        if not hasattr(own_table, name) or is_table:
            return False
    return True


def from_file(path: str) -> Config:
    return from_tables(read_file(path), path)


def from_tables(tables: dict[str, Any], where: str) -> Config:
    # Another trainer's tables may have keys of LoRA anywhere.
    config = Config() if set(tables) <= set(tables_of(Config())) else get_lora_config()
    set_tables(config, tables, where)
    return config


def from_dict(tables: dict[str, Any], where: str) -> Config:
    """Return the configuration saved with a run, perhaps by an older version, from its tables."""
    from lora.config.retired import without_retired

    return from_tables(without_retired(tables, where), where)


def saved_config(folder: str | Path) -> Config:
    """Return the configuration that a checkpoint or an artifact was made with."""
    from lora.common.saved_files import read_state

    state = Path(folder) / "trainer_state.json"
    toml = Path(folder) / "training_config.toml"
    if state.is_file():
        return from_dict(read_state(folder)["config"], str(state))
    if toml.is_file():
        metadata = toml.with_name("metadata.json")  # a merged scorer has none
        if metadata.is_file():
            require_known_format(Path(folder), read_file(plain_file(metadata)))
        return from_dict(read_file(plain_file(toml)), str(toml))
    absent = f"no {state.name} and no {toml.name}"
    expected = "expected a checkpoint or a final_artifact of ours; any other model is a base_model"
    raise UserError(f"{folder}: {absent}; {expected}.")
