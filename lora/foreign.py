"""Folders that others wrote, looked at before any library reads them: nothing leads out of them, nothing is cut short.

Neither torch nor transformers is imported here, so that a base that is not there or not whole is answered before they are.
"""

from contextlib import contextmanager
import json
from pathlib import Path

from safetensors import SafetensorError

from lora.config import ROOT
from lora.errors import UserError, ran_out_of_memory

EMBEDDED = ROOT / "assets" / "tiny_base"
INDEX = "model.safetensors.index.json"


def locate(base_model):
    """(where transformers finds the base, whether that is a folder). What looks like a path is never a Hub name."""
    path = EMBEDDED if base_model == "embedded" else Path(base_model).expanduser()
    if path.is_dir():
        return str(path), True
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") > 1:
        raise UserError(f"base_model {base_model}: no such folder (and no Hub name OWNER/NAME).")
    return base_model, False


def check_weights(folder):
    """That `folder` holds whole safetensors files, and that its index names files in it alone. Raises UserError."""
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        listed = set(weight_map(folder / INDEX).values())
        odd = [name for name in listed if not isinstance(name, str) or Path(name).name != name or name in (".", "..")]
        if odd:
            raise UserError(f"base_model {folder / INDEX}: {odd[0]!r} is not the name of a file beside it.")
        absent = sorted(listed - {path.name for path in files})
        if absent:
            raise UserError(f"base_model {folder}: {absent[0]}, which {INDEX} names, is not there.")
    if not files:
        old = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        hint = f"{old[0]} may run code when it is read, and is not; convert it: " if old else "expected *.safetensors; "
        hint += "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)" if old else "name the base's folder"
        raise UserError(f"base_model {folder}: no weights in safetensors: {hint}.")
    for path in files:
        check_length(path)


def weight_map(path):
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"base_model {path}: no index of weight files (expected a weight_map).") from None


def check_length(path):
    """That a safetensors file is as long as its header says. Raises UserError."""
    found = path.stat().st_size
    with open(path, "rb") as file:
        begin = file.read(8)
        if begin.startswith(b"version "):
            raise UserError(f"base_model {path}: a pointer of Git LFS, not the file itself; fetch it: git lfs pull.")
        length = int.from_bytes(begin, "little")
        try:
            header = json.loads(file.read(length)) if length < found else None
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (AttributeError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise UserError(
                f"base_model {path}: damaged: {found:,} bytes that are no safetensors; copy it again."
            ) from None
    if found != expected:
        raise UserError(f"base_model {path}: {found:,} of {expected:,} bytes; copy it again.")


def plain_file(path):
    """`path`, if it is a file that is no link, or one within its folder or its repository in the Hub's cache."""
    folder = path.parent.resolve()
    homes = [folder, *(parent for parent in folder.parents if parent.name.startswith("models--"))]
    if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
        raise UserError(f"{path}: a link that leads out of its folder; put the file itself there.")
    return path


@contextmanager
def one_line(what):
    """The first line of what safetensors, transformers or torch say of weights that they cannot load."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if ran_out_of_memory(error):
            raise
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{what}: {first[:300]}") from None
