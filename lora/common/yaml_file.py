"""YAML, for configuration files that other trainers have. Imported when such a file is read."""

import json
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds, with JSON's types. Raises ValueError."""
    try:
        refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        # Dates become texts. A table that holds itself is a ValueError.
        return json.loads(json.dumps(yaml.safe_load(text), default=str))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def refuse_repeated_keys(node: yaml.Node | None) -> None:
    """Raise ValueError where a table has a key twice, of which safe_load takes the last."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            refuse_repeated_keys(item)
    if not isinstance(node, yaml.MappingNode):
        return
    names = []
    for name, value in node.value:
        if name.value in names:
            raise ValueError(f"{name.value!r} is given twice")
        names.append(name.value)
        refuse_repeated_keys(value)
