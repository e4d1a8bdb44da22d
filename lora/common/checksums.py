"""checksums.json: sha256 and size of every other file in a folder. Needs no torch."""

from collections.abc import Callable
import hashlib
import json
from pathlib import Path
from typing import Any

from lora.common.checkpoint_folders import is_written_by_us
from lora.common.errors import UserError
from lora.common.plain_file import inside_folder
from lora.common.toml_json import to_json

CHECKSUMS_FILE = "checksums.json"
# What the Hub and a file manager put into a folder that is uploaded, downloaded or looked at.
NOT_OURS = (".git", ".gitattributes", ".cache", ".DS_Store")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write checksums.json, which must be the last file of `folder`."""
    (folder / CHECKSUMS_FILE).write_bytes(checksums_to_bytes(checksums_of(folder)))


def checksums_of(folder: Path) -> dict[str, Any]:
    """Return {"relative/path": {"sha256", "bytes"}, or why it has none} of a folder's other files.

    Files are found by walking through the folder, never by following what checksums.json says. So
    a name that is listed there and leads out of the folder counts as missing.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_ours = name.parts[0] not in NOT_OURS and name.name not in NOT_OURS
        if is_ours and (path.is_symlink() or not path.is_dir()):
            files[name.as_posix()] = path
    files.pop(CHECKSUMS_FILE, None)
    return map_in_threads(checksum_of_file, files)


def map_in_threads(function: Callable, arguments: dict) -> dict:
    """Return {name: function(argument)}. Threads help because hashing releases the GIL."""
    # Importing this takes a fifth of the time of a script that only reads its flags.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(arguments, pool.map(function, arguments.values())))


def checksum_of_file(path: Path) -> dict[str, str | int] | str:
    if not is_plain(path):
        return "a link or no plain file"
    try:
        return {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def is_plain(path: Path) -> bool:
    """Return whether this is a file, and no link that leads out of its folder."""
    try:
        return inside_folder(path).is_file()
    except UserError:
        return False


def checksums_to_bytes(checksums: dict) -> bytes:
    return to_json(checksums).encode()


def read_checksums(path: Path) -> dict | None:
    """Return what checksums.json holds; None where any of its bytes has changed."""
    content = path.read_bytes()
    try:
        checksums = json.loads(content)
        if isinstance(checksums, dict) and checksums_to_bytes(checksums) == content:
            return checksums
    except (ValueError, RecursionError):
        pass
    return None


def find_damage(folder: str | Path, needed: str) -> str:
    """Return in one line what is damaged in a folder that must hold the file `needed`, or ""."""
    path = Path(folder) / CHECKSUMS_FILE
    if not is_plain(path):
        absent = "no such file (or a link); only a final_artifact/ or a checkpoint has one"
        return f"{CHECKSUMS_FILE}: {absent}"
    written = read_checksums(path)
    if written is None:
        return f"{CHECKSUMS_FILE}: damaged: not the bytes that were written"
    current = checksums_of(Path(folder))
    problems = {}
    for name in {*written, needed} - {*current, CHECKSUMS_FILE}:
        problems[name] = "missing"
    for name, checksum in current.items():
        if checksum != written.get(name):
            problems[name] = "changed" if name in written else "extra"
            if isinstance(checksum, str):
                problems[name] = checksum
    return "; ".join(f"{name!r}: {problem}" for name, problem in sorted(problems.items()))


def verify_checksums(folder: str | Path, needed: str | None = None) -> None:
    """Raise UserError where a folder is not as a run wrote it, as `find_damage` reports."""
    is_listed = (Path(folder) / CHECKSUMS_FILE).exists()
    if needed is None and not is_listed and not is_written_by_us(Path(folder)):
        return
    damage = find_damage(folder, needed or CHECKSUMS_FILE)
    if damage:
        problem = f"not as it was written: {damage}"
        raise UserError(f"{folder}: {problem}. Copy the folder again, or take another.")
