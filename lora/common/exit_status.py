"""From an exception to one line on stderr, an exit status and the status files of a run.

RUN/status.json   {"exit": null while the run goes on, "error": its line, ...}; torchrun itself
                  exits with 1 whatever its processes exit with
RUN/error.log     the traceback, where there was an error
"""

from collections.abc import Iterator
from contextlib import contextmanager
import json
import os
from pathlib import Path
import signal
import sys
import time
import traceback

from lora.common.errors import Interrupted, ProcessLost, UserError
from lora.common.signals import leave_at_once
from lora.common.toml_json import to_json

# Seconds that the other processes wait before they report an error. An error that all of them have
# is reported by rank 0, and torchrun ends the others meanwhile.
PATIENCE = 5


class RunStatus:
    """The status files of the run in this process. Nothing is written before it has a folder."""

    def __init__(self) -> None:
        self.run_dir: Path | None = None

    def write(self, exit_status: int | None, line: str | None = None, **facts: object) -> None:
        """Write status.json, and error.log where an error is being handled."""
        if self.run_dir is None:
            return
        try:
            status = {"exit": exit_status, "error": line, **facts}
            texts = {"status.json": to_json(status)}
            if exit_status and sys.exc_info()[0]:
                texts["error.log"] = traceback.format_exc()
            for name, text in texts.items():
                temporary = self.run_dir / f".tmp_{name}_{os.getpid()}"
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(self.run_dir / name)
        except OSError:  # the disk may be what is full
            pass

    def has_ended(self) -> bool:
        """Return whether a process of this run has written how it ended."""
        if self.run_dir is None:
            return False
        try:
            return json.loads((self.run_dir / "status.json").read_bytes())["exit"] is not None
        except (OSError, ValueError):
            return False


@contextmanager
def one_line_errors(status: RunStatus | None = None) -> Iterator[None]:
    """Report an error that is no bug in one line, and exit with its status."""
    if hasattr(sys.stdout, "reconfigure") and sys.stdout.encoding.lower() != "utf-8":
        # On Windows a pipe's encoding has no code for some characters.
        sys.stdout.reconfigure(errors="backslashreplace")
    status = status or RunStatus()
    rank = os.environ.get("RANK", "0")
    is_first_process = rank == "0" or not rank.isdecimal()
    if signal.getsignal(signal.SIGINT) is leave_at_once:  # torch has been loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        require_launcher()
        yield
        sys.stdout.flush()
    except SystemExit:  # --help
        raise
    except BaseException as raised:
        from lora.common.known_errors import as_known_error, close_unread_output, error_line

        error = as_known_error(raised)
        if error is None:
            status.write(1, f"{type(raised).__name__}: {raised}")
            raise
        is_unread = isinstance(raised, BrokenPipeError) and close_unread_output()
        sys.stdout.flush()
        # All processes have agreed to stop after a signal, and rank 0 says so.
        if isinstance(error, Interrupted) and not is_first_process:
            raise SystemExit(error.status) from None
        if isinstance(error, ProcessLost) or not is_first_process:
            time.sleep(PATIENCE)
        is_reported = status.has_ended()
        if is_reported and not is_first_process and not isinstance(error, ProcessLost):
            raise SystemExit(error.status) from None
        line = error_line(error, status.run_dir)
        if not (is_reported and isinstance(error, (ProcessLost, Interrupted))):
            status.write(error.status, line, **getattr(error, "facts", {}))
        start = "" if isinstance(error, Interrupted) else "error: "
        if not is_unread:
            print(f"{start}{line}", file=sys.stderr)
        raise SystemExit(error.status) from None
    if is_first_process:  # the others are done before rank 0 has written the artifact
        status.write(0)


def require_launcher() -> None:
    """Raise UserError where torchrun's variables in the environment are not as it sets them."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    port = os.environ.get("MASTER_PORT", "0" if size == "1" else "")
    are_numbers = rank.isdecimal() and size.isdecimal() and port.isdecimal()
    if not are_numbers or int(rank) >= int(size):
        found = f"RANK={rank}, WORLD_SIZE={size}, MASTER_PORT={port}"
        mend = "start several processes with torchrun, and one without these variables"
        raise UserError(f"environment: {found}, which torchrun does not set so; {mend}.")


def require_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{sys.argv[0]} runs in one process; call it without torchrun.")
