"""The base of the configuration's tables: keys have aliases, and an unknown name is an error."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
            hint = nearest(name, [*keys, *ALIASES])
            raise AttributeError(f"{type(self).__name__} has no key {name}.{hint}")
        return own_name
