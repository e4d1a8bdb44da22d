"""checksums.json: the sha256 and the size of every other file in a folder, and the proof that they are still so.

`python eval.py --verify_only` runs this before torch is loaded, so it imports the standard library only.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath

from lora.errors import UserError

NAME = "checksums.json"


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder):
    """Write checksums.json, the last file of `folder`: {"relative/path": {"sha256", "bytes"}} of every other one."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): of_file(path) for path in paths}
    (folder / NAME).write_bytes(as_written(sums))


def of_file(path):
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def as_written(sums):
    """The only bytes that checksums.json may consist of: so no byte of it can change unseen either."""
    return (json.dumps(sums, indent=2) + "\n").encode()


def read_checksums(path):
    """checksums.json, {name: {"sha256", "bytes"}}. Raises UserError where it is absent or not as it was written."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: no such file (or a link); only a final_artifact/ as a run wrote it can be verified.")
    content = path.read_bytes()
    try:
        sums = json.loads(content)
        whole = isinstance(sums, dict) and as_written(sums) == content
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path}: damaged: not the bytes that were written. Copy the folder again, or make a new one.")
    return sums


def leaves(name):
    """Whether a listed name could lead out of the folder, or is a second spelling of another."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name


def verify_artifact(folder):
    """The metadata of a final artifact. Raises UserError that names every file that is not as it was written.

    Files are found by walking through the folder, never by following what checksums.json or a link says.
    """
    folder = Path(folder)
    sums = read_checksums(folder / NAME)
    problems = [(name, "a name that leaves the folder") for name in sums if leaves(name)]
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            problems.append((name, "a link or no plain file"))
        elif path.is_dir() or name == NAME:
            continue
        elif name not in sums:
            problems.append((name, "extra"))
        else:
            try:
                if of_file(path) != sums[name]:
                    problems.append((name, "changed"))
            except OSError as error:
                problems.append((name, f"cannot be read ({error.strerror})"))
        found.add(name)
    problems += [(name, "missing") for name in {*sums, "metadata.json"} - found if not leaves(name)]
    if problems:
        listed = "; ".join(f"{name!r}: {what}" for name, what in sorted(problems))
        raise UserError(f"{folder}: not as it was written: {listed}. Copy the folder again, or make a new one.")
    return json.loads((folder / "metadata.json").read_bytes())
