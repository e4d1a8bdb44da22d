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
import re
import shlex
import signal
import sys
import time
import traceback

from lora.common import errors
from lora.common.checkpoint_folders import resumable_by_step
from lora.common.errors import Interrupted, ProcessLost, ResourceExhausted, UserError
from lora.common.paths import INSTALLED, script_call

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
        path = self.run_dir / "status.json"
        try:
            if exit_status and sys.exc_info()[0]:
                (self.run_dir / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
            status = {"exit": exit_status, "error": line, **facts}
            temporary = path.with_name(f".tmp_{path.name}_{os.getpid()}")
            temporary.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
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

    def resume_command(self) -> str:
        """Return the command that continues the run from its newest checkpoint, or ""."""
        if self.run_dir is None:
            return ""
        checkpoints = resumable_by_step(self.run_dir / "checkpoints")
        if not checkpoints:
            return ""
        newest = checkpoints[max(checkpoints)]
        processes = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
        call = script_call(sys.argv[0])
        if processes and INSTALLED:
            call = ["torchrun", f"--nproc_per_node={processes}", "--no-python", *call]
        elif processes:
            call = ["torchrun", f"--nproc_per_node={processes}", sys.argv[0]]
        return shlex.join([*call, "--resume_from", newest.as_posix()])


@contextmanager
def one_line_errors(status: RunStatus | None = None) -> Iterator[None]:
    """Report an error that is no bug in one line, and exit with its status."""
    if hasattr(sys.stdout, "reconfigure") and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="backslashreplace")  # Windows' pipes lack some
    status = status or RunStatus()
    is_first_process = int(os.environ.get("RANK", 0)) == 0
    try:
        yield
    except SystemExit:  # --help
        raise
    except BaseException as raised:
        error = as_known_error(raised)
        if error is None:
            status.write(1, f"{type(raised).__name__}: {raised}")
            raise
        sys.stdout.flush()
        # All processes have agreed to stop after a signal, and rank 0 says so.
        if isinstance(error, Interrupted) and not is_first_process:
            raise SystemExit(error.status) from None
        if isinstance(error, ProcessLost) or not is_first_process:
            time.sleep(PATIENCE)
        line = error_line(error, status)
        if not (isinstance(error, ProcessLost) and status.has_ended()):
            status.write(error.status, line, **getattr(error, "facts", {}))
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(error.status) from None
    if is_first_process:  # the others are done before rank 0 has written the artifact
        status.write(0)


def error_line(error: UserError, status: RunStatus) -> str:
    """Return an error as one printable line; it may quote somebody's file."""
    text = str(error)
    resume_command = status.resume_command()
    if error.status >= 4 and resume_command:
        text += f" Go on with: {resume_command}"
    one_line = " ".join(text.split())
    return "".join(character for character in one_line if character.isprintable())


def require_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{sys.argv[0]} runs in one process; call it without torchrun.")


def as_known_error(error: BaseException) -> UserError | None:
    """Return an exception as one of the errors that have an exit status; None: it is a bug."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted.", signal.SIGINT)
    if errors.is_disk_full(error):
        return ResourceExhausted(f"{text}: no room for it; the checkpoints are as they were.")
    if errors.is_out_of_memory(error):
        return ResourceExhausted(f"{text.rstrip('.')}. {errors.LESS_MEMORY}")
    if "EADDRINUSE" in text:
        taken = f"port {os.environ.get('MASTER_PORT')} is taken"
        return ResourceExhausted(f"{taken}: let torchrun --standalone choose a free one.")
    under_torchrun = "LOCAL_WORLD_SIZE" in os.environ and isinstance(error, RuntimeError)
    if under_torchrun and re.search("gloo|NCCL", text):
        return ProcessLost("another process of this run was lost (torchrun says which).")
    return None
