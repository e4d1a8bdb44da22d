"""Compare the arrays of the token cache with their hashes while training begins."""

from concurrent.futures import Future
import hashlib
from io import BufferedReader
from pathlib import Path
import shutil
from threading import Thread

from lora.common.errors import UserError


class ArrayCheck:
    """Hashes arrays in a thread while training begins; without a call of `start` it passes.

    As a context manager: if an exception ends the block, damaged arrays are reported in its place,
    since they may be its cause.
    """

    def __init__(self) -> None:
        self.entry = Path()
        self.changed: Future[list[str]] = Future()
        self.changed.set_result([])

    def start(self, entry: Path, sums: dict[str, str]) -> None:
        """Begin to compare the arrays of the folder `entry` with their hashes, by name."""
        self.entry = entry
        self.changed = Future()
        # They are read as files: what is read of a mapping counts as this process's memory. And
        # they are opened here, because a temporary folder may be gone when it is their turn.
        files = {name: open(entry / f"{name}.bin", "rb") for name in sums}
        # A daemon: a run that ends does not wait for it.
        Thread(target=self.compare, args=(files, sums), daemon=True).start()

    def compare(self, files: dict[str, BufferedReader], sums: dict[str, str]) -> None:
        changed = []
        try:
            for name, file in files.items():
                with file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sums[name]:
                        changed.append(name)
        except Exception as error:
            self.changed.set_exception(error)
        else:
            self.changed.set_result(changed)

    def require_undamaged(self) -> None:
        """Wait for the result. Raises UserError, and removes the entry, where it is damaged."""
        names = self.changed.result()
        if names:
            shutil.rmtree(self.entry, ignore_errors=True)
            changed = f"{', '.join(names)} changed since they were written"
            mend = "the entry is removed, and made again by the next run"
            raise UserError(f"{self.entry}: {changed}; {mend}.")

    def __enter__(self) -> "ArrayCheck":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            self.require_undamaged()
