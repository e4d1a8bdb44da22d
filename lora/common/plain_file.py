"""Files that others may have written: plain, of a bounded size, inside their folder."""

import os
from pathlib import Path

from lora.common.errors import UserError

MAX_BYTES = 2**28  # of a text file that others may have written


def plain_file(path: Path, home: Path | None = None) -> Path:
    """Return `path`. Raises UserError as `inside_folder` does, and for folders, devices, pipes and
    files of an odd size.
    """
    inside_folder(path, home)
    if not path.is_file() and (path.exists() or path.is_symlink()):
        raise UserError(f"{path}: no plain file; expected one.")
    if path.suffix != ".safetensors" and path.is_file() and path.stat().st_size > MAX_BYTES:
        size = f"{path.stat().st_size:,} bytes"
        raise UserError(f"{path}: {size}; expected at most {MAX_BYTES:,}.")
    return path


def inside_folder(path: Path, home: Path | None = None) -> Path:
    """Return `path`. Raises UserError for a link out of `home` (default: the file's own folder)."""
    folder = Path(os.path.realpath(home or path.parent))
    allowed = [folder]
    # Links within the folder's repository in the Hub's cache are allowed.
    allowed += [parent for parent in folder.parents if parent.name.startswith("models--")]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(allowed_folder) for allowed_folder in allowed):
        raise UserError(f"{path}: a link that leads out of its folder; put the file itself there.")
    return path
