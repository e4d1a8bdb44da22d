"""checksums.json: the sha256 and the size of every other file in a folder, and the proof that they
are still so.

`python eval.py --verify_only` runs this before torch is loaded, so it imports the standard library
only.
"""

import hashlib
import json
from pathlib import Path

from lora.common.errors import UserError

NAME = "checksums.json"


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder):
    """Write checksums.json, the last file of `folder`: {"relative/path": {"sha256", "bytes"}} of
    every other one.
    """
    (Path(folder) / NAME).write_bytes(as_written(sums_of(Path(folder))))


def sums_of(folder):
    """{"relative/path": {"sha256", "bytes"}, or why it has none} of every file in `folder` but
    checksums.json.

    Files are found by walking through the folder, never by following what checksums.json or a link
    says. So a name that is listed there and leads out of the folder counts as missing.
    """
    found = {
        p.relative_to(folder).as_posix(): p
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or not p.is_dir()
    }
    return map_in_threads(of_file, {name: path for name, path in found.items() if name != NAME})


def map_in_threads(function, arguments):
    """{name: what the function gives of its argument}; hashing lets go of the interpreter."""
    # A fifth of the time of a script that only reads its flags
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(arguments, pool.map(function, arguments.values())))


def of_file(path):
    if path.is_symlink() or not path.is_file():
        return "a link or no plain file"
    try:
        return {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def as_written(sums):
    """The only bytes that checksums.json may consist of: so no byte of it can change unseen either."""
    return (json.dumps(sums, indent=2) + "\n").encode()


def find_damage(folder, needed):
    """What is not as it was written in `folder`, which must hold the file `needed`, in a line; ""
    where all is well.
    """
    folder = Path(folder)
    if (folder / NAME).is_symlink() or not (folder / NAME).is_file():
        return f"{NAME}: no such file (or a link); only a final_artifact/ or a checkpoint has one"
    content = (folder / NAME).read_bytes()
    try:
        sums = json.loads(content)
        whole = isinstance(sums, dict) and as_written(sums) == content
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        return f"{NAME}: damaged: not the bytes that were written"
    now = sums_of(folder)
    problems = {name: "missing" for name in {*sums, needed} - {*now, NAME}}
    odd = {name: one for name, one in now.items() if one != sums.get(name)}
    problems |= {
        n: one if isinstance(one, str) else "changed" if n in sums else "extra"
        for n, one in odd.items()
    }
    return "; ".join(f"{name!r}: {what}" for name, what in sorted(problems.items()))


def verify_checksums(folder, needed=None):
    """Raises UserError that names what is not as a run wrote it; a folder without checksums.json
    others wrote.
    """
    found = find_damage(folder, needed or NAME) if needed or (Path(folder) / NAME).exists() else ""
    if found:
        raise UserError(
            f"{folder}: not as it was written: {found}. Copy the folder again, or take another."
        )


def verify_artifact(folder):
    """The metadata of a final artifact. Raises UserError as `verify_checksums` does, and where it
    is no artifact.
    """
    verify_checksums(folder, "metadata.json")
    return json.loads((Path(folder) / "metadata.json").read_bytes())
