"""The two ways a run ends early on purpose. Anything else that escapes is a bug of ours and keeps its traceback."""

from contextlib import contextmanager
import os
import sys
import time


class UserError(Exception):
    """Something the user can mend: one line that says where, what was found, what was expected. Exit status 2."""

    status = 2


class Stopped(UserError):
    """A guard stopped the run (a loss that is not finite, say). Exit status 3."""

    status = 3


class Exhausted(UserError):
    """The machine has not enough of something: memory, disk. Exit status 4."""

    status = 4


LESS_MEMORY = "Use less: --batch_size 1 (or auto), --gradient_checkpointing, a smaller --max_length, --load_in_4bit."


def ran_out_of_memory(error):
    """Whether torch says so: on a GPU by a class of its own, on a CPU in words only."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


# Seconds that a process waits before it speaks: what all of them find wrong the first one says, what one finds wrong that
# one says, and torchrun ends the others meanwhile.
PATIENCE = 5


@contextmanager
def one_line_errors():
    """Turn a UserError into its one line on stderr and its exit status."""
    try:
        yield
    except UserError as error:
        sys.stdout.flush()
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(PATIENCE)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            print(f"error: {str(error).splitlines()[0]}. {LESS_MEMORY}", file=sys.stderr)
            raise SystemExit(Exhausted.status) from None
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        time.sleep(PATIENCE)
        print("error: another process of this run was lost.", file=sys.stderr)
        raise SystemExit(4) from None
