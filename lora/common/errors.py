"""The ways a run ends early on purpose. Any other exception is a bug and keeps its traceback."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
import errno
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can mend, in one line: where, what was found, what was expected."""

    status = 2


class Stopped(UserError):
    """A guard stopped the run, because a loss is not finite, say. `facts` go into status.json."""

    status = 3

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class ResourceExhausted(UserError):
    """The machine could not go on: disk or memory full, a port taken, another process lost."""

    status = 4


class ProcessLost(ResourceExhausted):
    """Another process of the run has ended, and may have reported the reason itself."""


class Interrupted(UserError):
    """A signal ended the run. Exit status 128 + its number: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


def raise_if_any(names: Iterable[str], problem: str) -> None:
    """Raise UserError with the problem and the first five names, unless there are none."""
    first_names = sorted(names)[:5]
    if first_names:
        raise UserError(f"{problem}: {', '.join(first_names)}.")


LESS_MEMORY = (
    "Use less: --batch_size 1 (or auto), --gradient_checkpointing, "
    "a smaller --max_length, --load_in_4bit."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. On a CPU torch says so in the message only."""
    words = (
        "out of memory", "not enough memory", "can't allocate memory",
        "ALLOC_FAILED", "bad_alloc", "CUBLAS_STATUS_NOT_INITIALIZED",  # no room for its workspace
    )  # fmt: skip
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


# The disk is full, a quota is used up, a file has reached the limit of its size.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Return whether there is no room on the disk, as Python or a library in Rust reports it."""
    if getattr(error, "errno", None) in DISK_FULL:
        return True
    return any(f"os error {number})" in str(error) for number in DISK_FULL)


@contextmanager
def library_errors(what: str | Path, passed: type[Exception] = UserError) -> Iterator[None]:
    """Raise UserError with the first line of what a library reports of files it cannot load.

    A library may raise anything on files that others wrote. `passed` errors are not converted.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (UserError, passed)):
            raise
        first_line = str(error).strip().replace(":\n", ":").partition("\n")[0]
        if "custom code" in first_line:
            first_line = "needs code of its own, which is never run; take a conversion (NAME-hf)."
        if not isinstance(error, (OSError, ValueError, RuntimeError, SafetensorError)):
            first_line = f"cannot be loaded ({type(error).__name__}: {first_line})"
        raise UserError(f"{what}: {first_line[:300]}") from None
