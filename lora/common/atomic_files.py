"""Files and folders that are complete or absent, whenever the process ends.

They are written under a temporary name beside their place, made durable and renamed. A killed
process may leave .tmp_NAME (being written), .old_NAME (replaced by a new NAME) and .del_NAME (being
deleted); `remove_leftovers` clears them away.
"""

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import shutil

from lora.common.errors import ResourceExhausted, UserError, is_disk_full
from lora.common.operating_system import fsync_path


def fsync_folder(folder: Path) -> None:
    """Make a folder and everything in it durable, and give its files the mode of the umask."""
    umask = os.umask(0)  # reading it means setting it
    os.umask(umask)
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors writes files of mode 0600
        fsync_path(path)


@contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `final` unless an error is raised."""
    temporary = final.with_name(f".tmp_{final.name}")
    try:
        temporary.unlink(missing_ok=True)  # it may be a link, which would be written through
        yield temporary
        fsync_path(temporary)
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")  # on Windows too


@contextmanager
def atomic_folder(final: str | Path, resumable: bool = False) -> Iterator[Path]:
    """Give a temporary folder to write to, which becomes `final` unless an error is raised.

    An OSError becomes a UserError; that is a ResourceExhausted where the disk is full. With
    `resumable`, what an interrupted or killed process has written is there again in the next one.
    """
    final = Path(final)
    temporary = final.with_name(f".tmp_{final.name}")
    old = final.with_name(f".old_{final.name}")
    if not resumable:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync_folder(temporary)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        fsync_path(final.parent)
        fsync_path(final.parent.parent)  # the parent folder may be new as well
    except BaseException as error:
        is_mistake = isinstance(error, (UserError, OSError))
        if not resumable or (is_mistake and not isinstance(error, ResourceExhausted)):
            shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            no_room = "no room for it; nothing of it is kept, the rest is as it was"
            raise ResourceExhausted(f"{final}: {no_room}.") from None
        if isinstance(error, OSError):
            raise UserError(f"{final}: {error.strerror or error}.") from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that a half deleted folder never has its name."""
    renamed = folder.with_name(f".del_{folder.name}")
    folder.rename(renamed)
    shutil.rmtree(renamed)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left in `folder`; restore what it had not yet replaced."""
    for old in folder.glob(".old_*"):
        final = old.with_name(old.name.removeprefix(".old_"))
        if not final.exists():
            old.rename(final)
    for pattern in (".tmp_*", ".old_*", ".del_*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
