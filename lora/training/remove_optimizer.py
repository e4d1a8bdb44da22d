"""Taking the optimizer's state from a checkpoint that is no longer the last one."""

import os
from pathlib import Path
import shutil

from lora.common.atomic_files import atomic_folder
from lora.common.checkpoint_folders import OPTIMIZER_FILE
from lora.common.checksums import CHECKSUMS_FILE, checksums_to_bytes, read_checksums


def remove_optimizer(checkpoint: Path) -> None:
    """Replace a checkpoint by one of the same files without the optimizer's state."""
    checksums = read_checksums(checkpoint / CHECKSUMS_FILE)
    if checksums is None:  # the next start of this run finds it and sets the checkpoint aside
        return
    del checksums[OPTIMIZER_FILE]
    with atomic_folder(checkpoint) as temporary:
        without = shutil.ignore_patterns(OPTIMIZER_FILE, CHECKSUMS_FILE)
        shutil.copytree(checkpoint, temporary, False, without, link_or_copy, dirs_exist_ok=True)
        (temporary / CHECKSUMS_FILE).write_bytes(checksums_to_bytes(checksums))


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
