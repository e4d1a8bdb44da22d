"""plainlora from Python.

Names are imported when they are first used (PEP 562), so that `import lora` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.adapter import load_adapter as load_adapter
    from lora.adapter import save_adapter as save_adapter
    from lora.common.saved_files import verify_artifact as verify_artifact
    from lora.config.schema import Config as Config
    from lora.config.schema import get_lora_config as get_lora_config
    from lora.layer import inject as inject
    from lora.layer import merge as merge
    from lora.tools.from_python import evaluate as evaluate
    from lora.tools.from_python import generate as generate
    from lora.tools.from_python import load_and_verify_adapter as load_and_verify_adapter
    from lora.tools.from_python import train as train
    from lora.tools.from_python import (
        verify_only_adapter_trainable as verify_only_adapter_trainable,
    )

__version__ = "0.3.0.dev0"

_MODULES = {
    "Config": "lora.config.schema",
    "get_lora_config": "lora.config.schema",
    "inject": "lora.layer",
    "merge": "lora.layer",
    "save_adapter": "lora.adapter",
    "load_adapter": "lora.adapter",
    "verify_artifact": "lora.common.saved_files",
    "train": "lora.tools.from_python",
    "evaluate": "lora.tools.from_python",
    "generate": "lora.tools.from_python",
    "verify_only_adapter_trainable": "lora.tools.from_python",
    "load_and_verify_adapter": "lora.tools.from_python",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
