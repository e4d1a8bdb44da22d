"""Setting the keys of a configuration, from the tables of a file or one by one."""

import dataclasses
from pathlib import Path
from typing import Any

from lora.common.errors import UserError
from lora.common.toml_json import read_file, toml_value
from lora.config.parse_values import check_value, key, nearest
from lora.config.schema import Config, get_lora_config, tables_of

ALIASES = {
    "per_device_train_batch_size": "batch_size",
    "num_epochs": "num_train_epochs",
    "max_seq_length": "max_length",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "base_model_id": "base_model",
    "model_name": "base_model",
    "optim": "optimizer",
}
# Former keys -> the default they had. A run saved with that default is read as if they had never
# existed.
RETIRED = {"share_prompts": False}
# HfArgumentParser's habit: `bf16 = true` chooses the dtype, `bf16 = false` (alone) asks for full
# precision.
DTYPE_SWITCHES = {"bf16": "bfloat16", "fp16": "float16"}
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
    fields = fields_by_key(config)
    if name in DTYPE_SWITCHES:
        set_dtype_switch(config, name, value, where)
        return
    name = ALIASES.get(name, name)
    if name not in fields:
        if config.lora is None and name in fields_by_key(get_lora_config()):
            raise UserError(f"{where}: {NO_LORA} key; use train_lora.py.")
        hint = nearest(name, [*fields, *ALIASES, *DTYPE_SWITCHES]) or " See --help."
        raise UserError(f"{where}: no such key.{hint}")
    table, field = fields[name]
    setattr(table, name, check_value(where, value, field.type, field.metadata))


def set_dtype_switch(config: Config, name: str, value: Any, where: str) -> None:
    dtype = DTYPE_SWITCHES[name]
    is_on = check_value(where, value, bool, key(None, "").metadata)
    if is_on:
        config.training.dtype = dtype
    elif config.training.dtype in ("auto", dtype):
        config.training.dtype = "float32"


def refuse_two_dtypes(values: dict[str, Any], where: str) -> None:
    """Raise UserError where two of dtype, bf16 = true and fp16 = true are given in one place."""
    chosen = [n for n in ("dtype", *DTYPE_SWITCHES) if values.get(n, False) is not False]
    if len(chosen) > 1:
        raise UserError(f"{where}: {' and '.join(chosen)} both choose the dtype; give one of them.")


def set_tables(config: Config, tables: dict[str, Any], where: str) -> None:
    """Set the keys of a config file, each of which must stand in its own table.

    Raises UserError; `where`, the file, begins its message.
    """
    known_tables = tables_of(config)
    title_of = {}
    for title, table in known_tables.items():
        title_of.update({field.name: title for field in dataclasses.fields(table)})
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
    """Return the configuration in a file that a user wrote."""
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
    kept = {}
    for title, table in tables.items():
        kept[title] = table
        if not isinstance(table, dict):
            continue  # `set_tables` refuses it
        for name, default in RETIRED.items():
            if table.get(name, default) != default:
                retired = f"{title}.{name} = {toml_value(table[name])} was retired"
                raise UserError(f"{where}: {retired}; plainlora 0.1.0 reads it.")
        kept[title] = {name: value for name, value in table.items() if name not in RETIRED}
    return kept


def saved_config(folder: str | Path) -> Config:
    """Return the configuration that a checkpoint or an artifact was made with."""
    state = Path(folder) / "trainer_state.json"
    toml = Path(folder) / "training_config.toml"
    if state.is_file():
        tables = read_file(state).get("config")
        if not isinstance(tables, dict):
            raise UserError(f"{state}: holds no config; expected a checkpoint of ours.")
        return from_dict(tables, str(state))
    if toml.is_file():
        return from_dict(read_file(toml), str(toml))
    absent = f"no {state.name} and no {toml.name}"
    raise UserError(f"{folder}: {absent}; expected a checkpoint or a final_artifact of ours.")
