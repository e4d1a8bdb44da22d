"""The ways a run ends early on purpose, each with its exit status. Any other exception is a bug and
keeps its traceback.
"""

from contextlib import contextmanager
import errno

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can mend: one line that says where, what was found, what was expected.
    Exit status 2.
    """

    status = 2


class Stopped(UserError):
    """A guard stopped the run (a loss that is not finite, say); `facts` go into status.json. Exit
    status 3.
    """

    status = 3

    def __init__(self, message, **facts):
        super().__init__(message)
        self.facts = facts


class ResourceExhausted(UserError):
    """The machine could not go on: its disk or memory is full, a port is taken, another process was
    lost. Exit status 4.
    """

    status = 4


class ProcessLost(ResourceExhausted):
    """Another process of the run is gone, and may have said why."""


class Interrupted(UserError):
    """A signal ended the run. Exit status 128 + its number: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message, number):
        super().__init__(message)
        self.status = 128 + number


def raise_if_any(odd, what):
    """Raises UserError where anything is odd: `what` it is, and the first five names."""
    odd = sorted(odd)
    if odd:
        raise UserError(f"{what}: {', '.join(odd[:5])}.")


LESS_MEMORY = "Use less: --batch_size 1 (or auto), --gradient_checkpointing, a smaller --max_length, --load_in_4bit."


def is_out_of_memory(error):
    """Whether torch says so: on a GPU by a class of its own, on a CPU in words only."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error):
    """Whether a disk (or a quota, or a limit) has no room left, as Python or a library in Rust says
    it.
    """
    return getattr(error, "errno", None) in FULL or any(
        f"os error {number})" in str(error) for number in FULL
    )


@contextmanager
def library_errors(what):
    """The first line of what safetensors, transformers or torch say of weights that they cannot
    load.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{what}: {first[:300]}") from None
