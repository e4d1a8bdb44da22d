"""Folders and files that are whole or absent whenever a process ends: written beside their place,
made durable, renamed.

.tmp_NAME is being written, .old_NAME has given way to a new NAME, .del_NAME is being deleted;
`remove_leftovers` takes away what a killed process left of them. Standard library only.
"""

from contextlib import contextmanager
import os
from pathlib import Path
import shutil

from lora.common.errors import ResourceExhausted, UserError, is_disk_full


def fsync_path(path):
    """Make a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder):
    """Make a folder and all that is in it durable, its files with the mode that umask gives:
    safetensors' own is 0600.
    """
    os.umask(umask := os.umask(0))
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o666 & ~umask)
        fsync_path(path)


@contextmanager
def atomic_file(final):
    """A path beside `final` to write to; the file takes its place if nothing goes wrong, and is
    taken away if it does.
    """
    temporary = final.with_name(f".tmp_{final.name}")
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path, text):
    """Put a file in the place of another, or of none, in one step."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(final):
    """A folder beside `final` to write to, which takes its place if nothing goes wrong, and is
    taken away if it does.

    Raises UserError where it cannot be written, Exhausted where the disk is full.
    """
    final = Path(final)
    temporary, old = (final.with_name(f"{mark}{final.name}") for mark in (".tmp_", ".old_"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        fsync_folder(temporary)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        fsync_path(final.parent)
        fsync_path(final.parent.parent)  # the folder around it may be new as well
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise ResourceExhausted(
                f"{final}: no room for it; nothing of it is kept, the rest is as it was."
            ) from None
        if isinstance(error, OSError):
            raise UserError(f"{final}: {error.strerror or error}.") from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder):
    """Delete a folder; what is half deleted does not bear its name."""
    doomed = folder.with_name(f".del_{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder):
    """Take away what a killed process was writing or deleting in `folder`, and put back what it had
    no successor for.
    """
    for old in folder.glob(".old_*"):
        final = old.with_name(old.name.removeprefix(".old_"))
        if not final.exists():
            old.rename(final)
    for mark in (".tmp_*", ".old_*", ".del_*"):
        for path in folder.glob(mark):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
