"""plainlora from Python.

Names are imported when they are first used (PEP 562), so that `import lora` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.adapter import load_adapter, save_adapter
    from lora.common.checksums import verify_artifact
    from lora.config.schema import Config, get_lora_config
    from lora.layer import inject, merge

__version__ = "0.2.0"

_MODULES = {
    "Config": "lora.config.schema",
    "get_lora_config": "lora.config.schema",
    "inject": "lora.layer",
    "merge": "lora.layer",
    "save_adapter": "lora.adapter",
    "load_adapter": "lora.adapter",
    "verify_artifact": "lora.common.checksums",
}
__all__ = [
    "__version__",
    "Config",
    "get_lora_config",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "verify_artifact",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
