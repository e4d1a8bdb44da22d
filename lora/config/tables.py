"""Setting keys of a configuration from the tables of a file, or one by one; reading the
configuration of a saved run.
"""

import dataclasses
from pathlib import Path

from lora.common.errors import UserError
from lora.common.serialization import read_file, toml_value
from lora.config.schema import Config, get_lora_config, key, tables_of
from lora.config.values import check_value, nearest

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
# Keys that are no more -> the default they had. A run saved with that default is read as if they
# had never been.
RETIRED = {"share_prompts": False}
# HfArgumentParser's habit: `bf16 = true` chooses the dtype, `bf16 = false` (alone) asks for full
# precision.
DTYPE_SWITCHES = {"bf16": "bfloat16", "fp16": "float16"}


def fields_by_key(config):
    """Every key's name -> (its table, its dataclass field)."""
    return {
        f.name: (table, f)
        for table in tables_of(config).values()
        for f in dataclasses.fields(table)
    }


def set_key(config, name, value, where):
    """Set one key by its name or an alias; `where` ("--lora_r", "run.toml: lora.lora_r") begins the
    error messages.
    """
    keys = fields_by_key(config)
    if name in DTYPE_SWITCHES:
        if check_value(where, value, bool, key(None, "").metadata):
            config.training.dtype = DTYPE_SWITCHES[name]
        elif config.training.dtype in ("auto", DTYPE_SWITCHES[name]):
            config.training.dtype = "float32"
        return
    name = ALIASES.get(name, name)
    if name not in keys:
        if config.lora is None and name in fields_by_key(get_lora_config()):
            raise UserError(
                f"{where}: train.py trains all weights and has no such key; use train_lora.py."
            )
        hint = nearest(name, [*keys, *ALIASES, *DTYPE_SWITCHES]) or " See --help."
        raise UserError(f"{where}: no such key.{hint}")
    table, f = keys[name]
    setattr(table, name, check_value(where, value, f.type, f.metadata))


def refuse_two_dtypes(values, where):
    """dtype, bf16 = true and fp16 = true each choose the dtype: one of them may be given in one
    place.
    """
    chosen = [n for n in ("dtype", *DTYPE_SWITCHES) if values.get(n, False) is not False]
    if len(chosen) > 1:
        raise UserError(f"{where}: {' and '.join(chosen)} both choose the dtype; give one of them.")


def set_tables(config, tables, where):
    """Set what a config file says, table by table. Each key must stand in its own table."""
    tables_known = tables_of(config)
    home = {
        name: title
        for title, table in tables_known.items()
        for name in (f.name for f in dataclasses.fields(table))
    }
    given = set()
    for title, table in tables.items():
        if title == "lora" and config.lora is None:
            raise UserError(
                f"{where}: [lora]: train.py trains all weights and has no such table; use train_lora.py."
            )
        if title not in tables_known or not isinstance(table, dict):
            belongs = home.get(ALIASES.get(title, title))
            hint = f" It belongs in [{belongs}]." if belongs else nearest(title, list(tables_known))
            raise UserError(
                f"{where}: {title}: no such table.{hint or ' Expected: ' + ', '.join(tables_known) + '.'}"
            )
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


def from_file(path):
    """The configuration in a file that a user wrote."""
    tables = read_file(path)
    config = get_lora_config() if "lora" in tables else Config()
    set_tables(config, tables, path)
    return config


def from_dict(tables, where):
    """The configuration saved with a run, maybe by an older version, from its tables."""
    config = get_lora_config() if "lora" in tables else Config()
    set_tables(config, without_retired(tables, where), where)
    return config


def without_retired(tables, where):
    """`tables` without the RETIRED keys. Raises UserError where one has another value than its old
    default.
    """
    kept = {}
    for title, table in tables.items():
        if not isinstance(table, dict):  # `set_tables` refuses it
            kept[title] = table
            continue
        for name in RETIRED.keys() & table.keys():
            if table[name] != RETIRED[name]:
                value = toml_value(table[name])
                raise UserError(
                    f"{where}: {title}.{name} = {value} was retired; plainlora 0.1.0 reads it."
                )
        kept[title] = {name: value for name, value in table.items() if name not in RETIRED}
    return kept


def saved_config(folder):
    """The configuration that a checkpoint (trainer_state.json) or an artifact
    (training_config.toml) was made with.
    """
    state, toml = Path(folder) / "trainer_state.json", Path(folder) / "training_config.toml"
    if state.is_file():
        tables = read_file(state).get("config")
        if not isinstance(tables, dict):
            raise UserError(f"{state}: holds no config; expected a checkpoint of ours.")
        return from_dict(tables, str(state))
    if toml.is_file():
        return from_dict(read_file(toml), str(toml))
    raise UserError(
        f"{folder}: no {state.name} and no {toml.name}; expected a checkpoint or a final_artifact of ours."
    )
