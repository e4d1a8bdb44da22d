"""The data files that a folder or a glob names."""

from collections.abc import Iterator
import glob
import os
from pathlib import Path
import re

from lora.common.errors import UserError
from lora.data.file_kinds import ARROW, SPLIT_NAMES, kind_of

SPLIT_IN_PATH = re.compile(rf"(?<![a-z])({SPLIT_NAMES})(?![a-z])")


def files_of_set(path: str) -> dict[str, Path]:
    """Return {name in messages: file} of a folder or a glob, sorted. Raises UserError."""
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir()))
        raise UserError(f"{path}: a data set of several splits; name the folder of one: {splits}.")
    if (folder / "state.json").is_file():  # of `datasets.Dataset.save_to_disk`
        files_there = folder.glob("*.arrow")  # with what `map` and others keep there
        found = [str(file) for file in files_there if not file.name.startswith("cache-")]
    elif path and folder.is_dir():
        found = [str(file) for file in visible(folder) if is_data(file) or is_unread_data(file)]
    else:
        found = glob.glob(path, recursive=True) if glob.has_magic(path) else []
    files = {file: Path(file) for file in sorted(found) if Path(file).is_file()}
    if not files:
        problem = "a folder without data files" if folder.is_dir() else "No such file or directory"
        raise UserError(f"{path}: {problem}.")

    require_one_set(path, list(files))
    return files


def require_one_set(path: str, files: list[str]) -> None:
    """Raise UserError for a text beside its table, or a test set beside the training data."""
    common = os.path.commonpath([os.path.dirname(file) for file in files]) or "."
    splits_found = set()
    for file in files:
        splits_found.update(SPLIT_IN_PATH.findall(os.path.relpath(file, common).lower()))
    kinds = {kind_of(file) or Path(file).suffix for file in files}
    for several, what in ((kinds, "kinds"), (splits_found, "splits")):
        if len(several) > 1:
            found_here = f"its files are of several {what} ({', '.join(sorted(several))})"
            raise UserError(f"{path}: {found_here}; name the files, or a glob such as '*.jsonl'.")


def visible(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder and not hidden. Raises UserError for a link that leads nowhere, or
    to a folder: what is behind it would be missing.
    """
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() and not path.is_file():
            raise UserError(f"{path}: a link to a folder or to nothing; put the files there.")
        yield path


def is_data(file: Path) -> bool:
    """Return whether a file of a folder is data, by its name."""
    is_note = file.stem.upper() in ("README", "LICENSE", "NOTICE") or file.name[0] in "._"
    return not is_note and bool(kind_of(file.name) or file.suffix in ARROW)


def is_unread_data(file: Path) -> bool:
    """Return whether it is data in a compression that is not read: its folder is refused."""
    return file.suffix in (".zst", ".zip") and bool(kind_of(file.stem))
