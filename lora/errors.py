"""The two ways a run ends early on purpose. Anything else that escapes is a bug of ours and keeps its traceback."""

from contextlib import contextmanager
import sys


class UserError(Exception):
    """Something the user can mend: one line that says where, what was found, what was expected. Exit status 2."""

    status = 2


class Stopped(UserError):
    """A guard stopped the run (a loss that is not finite, say). Exit status 3."""

    status = 3


@contextmanager
def one_line_errors():
    """Turn a UserError into its one line on stderr and its exit status."""
    try:
        yield
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
