"""Setting the keys of a configuration, from the tables of a file or one by one."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from lora.common.checkpoint_folders import require_known_format
from lora.common.errors import UserError
from lora.common.toml_json import read_file, toml_value
from lora.config.parse_values import check_value, key, nearest
from lora.config.schema import Config, get_lora_config, tables_of
from lora.config.table import ALIASES, DTYPE_SWITCHES

# Former keys -> the default they had; a run saved with that default is read.
RETIRED = {"share_prompts": False}
NO_LORA = "train.py trains all weights and has no such"


def fields_by_key(config: Config) -> dict[str, tuple[Any, dataclasses.Field]]:
    """Return {key: (its table, its dataclass field)}."""
    fields = {}
    for table in tables_of(config).values():
        for field in dataclasses.fields(table):
            fields[field.name] = (table, field)
    return fields


def key_values(config: Config) -> dict[str, Any]:
    return {name: getattr(table, name) for name, (table, _) in fields_by_key(config).items()}


def set_key(config: Config, name: str, value: Any, where: str) -> None:
    """Set one key by its name or an alias. Raises UserError.

    `where` ("--lora_r", "run.toml: lora.lora_r") begins the error messages.
    """
    if name in DTYPE_SWITCHES:
        setattr(config.training, name, check_value(where, value, bool, key(None, "").metadata))
        return
    fields = fields_by_key(config)
    name = ALIASES.get(name, name)
    if name not in fields:
        if config.lora is None and name in fields_by_key(get_lora_config()):
            raise UserError(f"{where}: {NO_LORA} key; use train_lora.py.")
        hint = nearest(name, [*fields, *ALIASES, *DTYPE_SWITCHES]) or " See --help."
        raise UserError(f"{where}: no such key.{hint}")
    table, field = fields[name]
    setattr(table, name, check_value(where, value, field.type, field.metadata))


def refuse_two_dtypes(values: dict[str, Any], where: str) -> None:
    """Raise UserError where two of dtype, bf16 = true and fp16 = true are given in one place."""
    chosen = [n for n in ("dtype", *DTYPE_SWITCHES) if values.get(n, False) is not False]
    if len(chosen) > 1:
        raise UserError(f"{where}: {' and '.join(chosen)} both choose the dtype; give one of them.")


def set_tables(config: Config, tables: dict[str, Any], where: str) -> None:
    """Set the keys of the file `where`, each of which must be in its own table, or UserError."""
    known_tables = tables_of(config)
    title_of = {}
    for title, table in known_tables.items():
        for name in vars(table):
            title_of[name] = title
    given = set()
    for title, table in tables.items():
        if title == "lora" and config.lora is None:
            raise UserError(f"{where}: [lora]: {NO_LORA} table; use train_lora.py.")
        if title not in known_tables or not isinstance(table, dict):
            hint = nearest(title, known_tables) or f" Expected: {', '.join(known_tables)}."
            own_title = title_of.get(ALIASES.get(title, title))
            if own_title:
                hint = f" It belongs in [{own_title}]."
            raise UserError(f"{where}: {title}: no such table.{hint}")
        refuse_two_dtypes(table, f"{where}: {title}")
        for name, value in table.items():
            name = name.replace("-", "_")
            full_name = "dtype" if name in DTYPE_SWITCHES else ALIASES.get(name, name)
            own_title = title_of.get(full_name, title)
            if own_title != title:
                raise UserError(f"{where}: {title}.{name}: it belongs in [{own_title}].")
            if full_name in given and name not in DTYPE_SWITCHES:
                raise UserError(f"{where}: {title}.{name}: {full_name} is given twice.")
            set_key(config, name, value, f"{where}: {title}.{name}")
            given.add(full_name)


def from_file(path: str) -> Config:
    return from_tables(read_file(path), path)


def from_tables(tables: dict[str, Any], where: str) -> Config:
    config = get_lora_config() if "lora" in tables else Config()
    set_tables(config, tables, where)
    return config


def from_dict(tables: dict[str, Any], where: str) -> Config:
    """Return the configuration saved with a run, perhaps by an older version, from its tables."""
    return from_tables(without_retired(tables, where), where)


def without_retired(tables: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `tables` without the RETIRED keys. Raises UserError where one has no default value."""
    kept = copy.deepcopy(tables)
    for title, table in kept.items():
        for name, default in RETIRED.items():
            # `set_tables` refuses what is no table.
            if isinstance(table, dict) and table.pop(name, default) != default:
                retired = f"{title}.{name} = {toml_value(tables[title][name])} was retired"
                raise UserError(f"{where}: {retired}; plainlora 0.1.0 reads it.")
    return kept


def saved_config(folder: str | Path) -> Config:
    """Return the configuration that a checkpoint or an artifact was made with."""
    state = Path(folder) / "trainer_state.json"
    toml = Path(folder) / "training_config.toml"
    if state.is_file():
        saved = read_file(state)
        require_known_format(Path(folder), saved)
        tables = saved.get("config")
        if not isinstance(tables, dict):
            raise UserError(f"{state}: holds no config; expected a checkpoint of ours.")
        return from_dict(tables, str(state))
    if toml.is_file():
        metadata = toml.with_name("metadata.json")  # a merged scorer has none
        if metadata.is_file():
            require_known_format(Path(folder), read_file(metadata))
        return from_dict(read_file(toml), str(toml))
    absent = f"no {state.name} and no {toml.name}"
    raise UserError(f"{folder}: {absent}; expected a checkpoint or a final_artifact of ours.")
