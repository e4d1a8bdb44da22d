"""Folders that others wrote, looked at before any library reads them: nothing leads out of them,
nothing is cut short.

Neither torch nor transformers is imported here, so that a base that is not there or not whole is
answered before they are.
"""

import json
from pathlib import Path

from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.common.serialization import read_file

EMBEDDED_BASE = ROOT / "assets" / "tiny_base"


def locate_base(base_model):
    """(where transformers finds the base, whether that is a folder). What looks like a path is
    never a Hub name.
    """
    path = EMBEDDED_BASE if base_model == "embedded" else Path(base_model).expanduser()
    if path.is_dir():
        return str(path), True
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") > 1:
        raise UserError(f"base_model {base_model}: no such folder (and no Hub name OWNER/NAME).")
    return base_model, False


def check_weight_files(folder):
    """That `folder` holds whole safetensors files, and that its index names files in it alone.
    Raises UserError.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed, here = read_file(index).get("weight_map"), {path.name for path in files}
        if not isinstance(listed, dict):
            raise UserError(
                f"base_model {index}: no weight_map; expected an index of weight files."
            )
        absent = [name for name in listed.values() if not isinstance(name, str) or name not in here]
        if absent:
            raise UserError(
                f"base_model {index}: {absent[0]!r} is not the name of a file beside it; copy the base again."
            )
    if not files:
        old = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")
        )
        hint = (
            f"{old[0]} may run code when it is read, and is not; convert it: "
            if old
            else "expected *.safetensors; "
        )
        hint += (
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
            if old
            else "name the base's folder"
        )
        raise UserError(f"base_model {folder}: no weights in safetensors: {hint}.")
    for path in files:
        check_length(path)


def check_length(path):
    """That a safetensors file is as long as its header says. Raises UserError."""
    found = path.stat().st_size
    with open(path, "rb") as file:
        begin = file.read(8)
        if begin.startswith(b"version "):
            raise UserError(
                f"base_model {path}: a pointer of Git LFS, not the file itself; fetch it: git lfs pull."
            )
        length = int.from_bytes(begin, "little")
        try:
            header = json.loads(file.read(length)) if length < found else None
            ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
            expected = 8 + length + max(ends, default=0)
        except (AttributeError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise UserError(
                f"base_model {path}: damaged: {found:,} bytes that are no safetensors; copy it again."
            ) from None
    if found != expected:
        raise UserError(f"base_model {path}: {found:,} of {expected:,} bytes; copy it again.")


def refuse_outside_link(path):
    """`path`, if it is a file that is no link, or one within its folder or its repository in the
    Hub's cache.
    """
    folder = path.parent.resolve()
    homes = [folder, *(parent for parent in folder.parents if parent.name.startswith("models--"))]
    if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
        raise UserError(f"{path}: a link that leads out of its folder; put the file itself there.")
    return path
