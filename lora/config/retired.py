"""Keys that former versions had. Imported where the configuration of a run is read."""

import copy
from typing import Any

from lora.common.errors import UserError
from lora.common.toml_json import toml_value

# Former keys -> the default they had; a run saved with that default is read.
RETIRED: dict[str, Any] = {"share_prompts": False, "reveal_columns": {}}


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
