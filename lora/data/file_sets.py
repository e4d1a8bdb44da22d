"""The data files that a folder or a glob names."""

from collections.abc import Iterable, Iterator
from functools import cache
import glob
import os
from pathlib import Path
import re

from lora.common.errors import UserError
from lora.common.printable_text import print_on_rank_zero
from lora.data.file_kinds import ARROW, SPLIT_NAMES, kind_of

SPLIT_IN_PATH = re.compile(rf"(?<![a-z])({SPLIT_NAMES})(?:ing)?(?![a-z])")


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
        visible_files = list(visible(folder))
        note_unread(path, [file.relative_to(folder) for file in visible_files])
        found = [str(file) for file in visible_files if is_data(file)]
    else:
        found = glob.glob(path, recursive=True) if glob.has_magic(path) else []
        found = [file for file in found if not is_note(Path(file))] or found
    files = {file: Path(file) for file in sorted(found) if Path(file).is_file()}
    if not files:
        problem = "a folder without data files" if folder.is_dir() else "No such file or directory"
        hint = ""
        if "," in path:
            hint = "; several files are separate words, or a list in a configuration file"
        raise UserError(f"{path}: {problem}{hint}.")

    require_one_set(path, list(files))
    return files


def require_one_set(path: str, files: list[str]) -> None:
    """Raise UserError for a text beside its table, or a test set beside the training data."""
    common = os.path.commonpath([os.path.dirname(file) for file in files]) or "."
    splits_found = set()
    for file in files:
        splits_found.update(SPLIT_IN_PATH.findall(os.path.relpath(file, common).lower()))
    kinds = {kind_of(file) or Path(file).suffix.lower() for file in files}
    for several, what in ((kinds, "kinds"), (splits_found, "splits")):
        if len(several) > 1:
            found_here = f"its files are of several {what} ({', '.join(sorted(several))})"
            raise UserError(f"{path}: {found_here}; name the files, or a glob such as '*.jsonl'.")


def visible(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that are not hidden. Raises UserError for a link that leads to
    nothing or to a folder: what is behind it would be missing.
    """
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() and not path.is_file():
            raise UserError(f"{path}: a link to a folder, or a broken one; put the files there.")
        if path.is_file():
            yield path


@cache  # a run reads its files several times
def print_once(text: str) -> None:
    print_on_rank_zero(text)


def note_unread(path: str, files: Iterable[Path]) -> None:
    """Print which files of a set are not read."""
    names = sorted(file.as_posix() for file in files if not is_note(file) and not is_data(file))
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    if names:
        print_once(f"note: {path}: not read: {', '.join(names[:2] if more else names)}{more}")


def is_note(file: Path) -> bool:
    """Return whether a file tells about the data, or is hidden, by its name."""
    return file.stem.upper() in ("README", "LICENSE", "NOTICE") or file.name[0] in "._"


def is_data(file: Path) -> bool:
    """Return whether a file of a folder is data, by its name."""
    return not is_note(file) and bool(kind_of(file.name) or file.suffix.lower() in ARROW)
