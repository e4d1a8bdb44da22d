"""The arrays of the token cache are compared with their hashes while the training begins."""

from concurrent.futures import Future
import hashlib
from pathlib import Path
import shutil
from threading import Thread

import numpy as np

from lora.common.errors import UserError


def array_sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


class ArrayCheck:
    """Hashes arrays in a thread, which does not hold up the training. Without any it is passed.

    Used as a context manager, it checks the data first where an error ends the block: damaged data
    may be the reason.
    """

    def __init__(self) -> None:
        self.entry = Path()
        self.changed: Future[list[str]] = Future()
        self.changed.set_result([])

    def start(self, entry: Path, arrays: dict[str, np.ndarray], sums: dict[str, str]) -> None:
        """Begin to compare the arrays of the folder `entry` with their hashes, by name."""
        self.entry = entry
        self.changed = Future()
        # A daemon: a run that ends does not wait for it.
        Thread(target=self.compare, args=(arrays, sums), daemon=True).start()

    def compare(self, arrays: dict[str, np.ndarray], sums: dict[str, str]) -> None:
        try:
            changed = [name for name, array in arrays.items() if array_sha256(array) != sums[name]]
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
