"""plainlora from Python. Names are imported when they are first used, so that `import lora.config` does not load torch."""

_HOMES = {
    "Config": "lora.config",
    "get_lora_config": "lora.config",
    "inject": "lora.layer",
    "merge": "lora.layer",
    "save_adapter": "lora.adapter",
    "load_adapter": "lora.adapter",
    "verify_artifact": "lora.checksums",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
