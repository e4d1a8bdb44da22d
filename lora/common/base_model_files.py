"""Checks of base folders, which others wrote, before torch and transformers are loaded."""

import json
from pathlib import Path
import re

from lora.common.errors import UserError
from lora.common.paths import ROOT, or_packaged
from lora.common.plain_file import plain_file
from lora.common.toml_json import read_file

EMBEDDED_BASE = ROOT / "assets" / "tiny_base"
MAX_MODULES = 10_000  # layers, experts or labels; a model of a billion would be built for days


def locate_base(base_model: str) -> tuple[str, bool]:
    """Return where transformers finds the base, and whether that is a folder (else a Hub name)."""
    path = Path(or_packaged(base_model, ".")).expanduser()
    if base_model == "embedded":
        path = EMBEDDED_BASE
    if path.is_dir():
        return str(path), True
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") > 1:
        raise UserError(f"base_model {base_model}: no such folder (and no Hub name OWNER/NAME).")
    if re.fullmatch(r"allenai/OLMo-[17]B.*(?<!-hf)", base_model):
        raise UserError(f"base_model {base_model}: needs code of its own; take {base_model}-hf.")
    return base_model, False


def require_base(model_name: str) -> str:
    """Return a `model_name`. Raises UserError where it is no base, but perhaps the run's name."""
    if "/" not in model_name and not locate_base(model_name)[1]:
        which = "is base_model or experiment_name meant?"
        raise UserError(f"model_name {model_name}: no folder, no Hub name OWNER/NAME; {which}")
    return model_name


def describe_base(base_model: str) -> str:
    """Return the name of a base, with its folder if that is packaged with plainlora."""
    found = or_packaged(base_model, ".")
    return base_model if found == base_model else f"{base_model} (packaged: {found})"


def check_shape(folder: str | Path) -> None:
    """Check that config.json is a table of plausible numbers, or raise UserError."""
    path = plain_file(Path(folder) / "config.json")
    if not path.is_file():
        return  # transformers says so
    tables = [read_file(path)]
    while tables:
        for name, value in tables.pop().items():
            if isinstance(value, dict):
                tables.append(value)
            is_count = re.search("layer|expert|labels", name) and "size" not in name
            if is_count and type(value) in (int, float) and value > MAX_MODULES:
                expected = f"expected at most {MAX_MODULES:,}"
                raise UserError(f"base_model {path}: {name} = {value}; {expected}.")


def check_weight_files(folder: str | Path) -> None:
    """Check that a base has complete safetensors files and no other in its index, or raise."""
    folder = Path(folder)
    files = [plain_file(path) for path in sorted(folder.glob("*.safetensors"))]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_file(index).get("weight_map")
        where = f"base_model {index}"
        if not isinstance(weight_map, dict):
            raise UserError(f"{where}: no weight_map; expected an index of weight files.")
        names = [path.name for path in files]
        for name in weight_map.values():
            if name not in names:
                problem = f"{name!r} is not the name of a file beside it"
                raise UserError(f"{where}: {problem}; copy the base again.")
    if (folder / "adapter_config.json").is_file():
        mend = "merge it (merge.py), or begin with it (--init_from)"
        raise UserError(f"base_model {folder}: an adapter, no whole model; {mend}.")
    if not files:
        hint = "expected *.safetensors; name the base's folder"
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        if pickled:
            hint = f"{min(pickled)} may run code when it is read, and is not; convert it: "
            hint += "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        raise UserError(f"base_model {folder}: no weights in safetensors: {hint}.")
    for path in files:
        check_length(path)


def check_length(path: Path) -> None:
    """Check that a safetensors file is as long as its header says. Raises UserError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length_field = file.read(8)
        if length_field.startswith(b"version "):
            pointer = "a pointer of Git LFS, not the file itself"
            raise UserError(f"base_model {path}: {pointer}; fetch it: git lfs pull.")
        header_length = int.from_bytes(length_field, "little")
        try:
            if header_length >= size:
                raise ValueError
            header = json.loads(file.read(header_length))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
            expected = 8 + header_length + max(ends, default=0)
        except (AttributeError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            damaged = f"damaged: {size:,} bytes that are no safetensors"
            raise UserError(f"base_model {path}: {damaged}; copy it again.") from None
    if size != expected:
        raise UserError(f"base_model {path}: {size:,} of {expected:,} bytes; copy it again.")
