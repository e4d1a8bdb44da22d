"""The base of the configuration's tables: keys have aliases, and an unknown name is an error."""

from collections.abc import Collection
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora.config.other_words import SAME
from lora.config.parse_values import nearest

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
# As in HfArgumentParser: true chooses the dtype, false (alone) asks for full precision.
DTYPE_SWITCHES = {"bf16": "bfloat16", "fp16": "float16"}


def key_hint(name: str, keys: Collection[str]) -> str:
    """Return a question that names the key among `keys` that is meant most likely, or ""."""
    meanings = {key: key for key in keys}
    meanings.update((word, key) for word, key in {**SAME, **ALIASES}.items() if key in keys)
    return nearest(name, meanings)


@dataclass
class Table:
    """A table of keys, which are also set and read by their aliases.

    Another name is an AttributeError; Python would add an attribute that nothing reads.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, self.key_of(name), value)

    if not TYPE_CHECKING:  # mypy finds a name that is no key

        def __getattr__(self, name: str) -> Any:  # called for what is no attribute
            return object.__getattribute__(self, self.key_of(name))

    def key_of(self, name: str) -> str:
        keys = [field.name for field in dataclasses.fields(self)]
        own_name = ALIASES.get(name, name)
        if own_name not in keys and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no key {name}.{key_hint(name, keys)}")
        return own_name
