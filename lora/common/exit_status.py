"""From an exception to one line on stderr, an exit status and the run's status files.

RUN/status.json   {"exit": null while the run goes on, "error": its line, ...}; torchrun itself exits with 1 for all
RUN/error.log     the traceback, where there was an error
"""

from contextlib import contextmanager
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback

from lora.common.checkpoint_folders import by_step
from lora.common.errors import (
    LESS_MEMORY,
    Exhausted,
    Interrupted,
    Lost,
    UserError,
    is_full,
    ran_out_of_memory,
)

# Seconds that a process waits before it speaks: what all of them find wrong the first one says,
# what one finds wrong that one says, and torchrun ends the others meanwhile.
PATIENCE = 5
run_dir = None  # of the run in this process, once it has one


@contextmanager
def one_line_errors():
    """Turn what `named` knows into its one line on stderr and its exit status; keep a record of how
    a run ended.
    """
    global run_dir
    run_dir = None
    try:
        yield
    except SystemExit:  # --help
        raise
    except BaseException as raised:
        error = named(raised)
        if error is None:
            record(1, f"{type(raised).__name__}: {raised}")
            raise
        sys.stdout.flush()
        first = int(os.environ.get("RANK", 0)) == 0
        # All have agreed, and the first one speaks
        if isinstance(error, Interrupted) and not first:
            raise SystemExit(error.status) from None
        if isinstance(error, Lost) or not first:
            time.sleep(PATIENCE)
        line = " ".join(f"{error}{how_to_go_on() if error.status >= 4 else ''}".split())
        # It may quote somebody's file
        line = "".join(character for character in line if character.isprintable())
        if not (isinstance(error, Lost) and has_ended()):
            record(error.status, line, **getattr(error, "facts", {}))
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(error.status) from None
    if int(os.environ.get("RANK", 0)) == 0:  # the others are done before its artifact is
        record(0)


def require_one_process():
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{sys.argv[0]} runs in one process; call it without torchrun.")


def named(error):
    """What went wrong as one of the errors above, or None: then it is a bug."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted.", signal.SIGINT)
    if is_full(error):
        return Exhausted(f"{text}: no room for it; the checkpoints are as they were.")
    if ran_out_of_memory(error):
        return Exhausted(f"{text.rstrip('.')}. {LESS_MEMORY}")
    if "EADDRINUSE" in text:
        return Exhausted(
            f"port {os.environ.get('MASTER_PORT')} is taken: let torchrun --standalone choose a free one."
        )
    if (
        "LOCAL_WORLD_SIZE" in os.environ
        and isinstance(error, RuntimeError)
        and re.search("gloo|NCCL", text)
    ):
        return Lost("another process of this run was lost (torchrun says which).")
    return None


def how_to_go_on():
    """The command that continues this process's run from its newest checkpoint, if it has one."""
    found = by_step(run_dir / "checkpoints") if run_dir else {}
    if not found:
        return ""
    newest = found[max(found)]
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's
    launcher = f"torchrun --nproc_per_node={processes}" if processes else "python"
    return f" Go on with: {launcher} {shlex.join([sys.argv[0], '--resume_from', str(newest)])}"


def has_ended():
    """Whether a process of this run has written how it ended."""
    try:
        return (
            run_dir is not None
            and json.loads((run_dir / "status.json").read_text())["exit"] is not None
        )
    except (OSError, ValueError):
        return False


def record(status, line=None, **facts):
    """Write the run's status.json, and error.log where an error is being handled."""
    if run_dir is None:
        return
    path = run_dir / "status.json"
    try:
        if status and sys.exc_info()[0]:
            (run_dir / "error.log").write_text(traceback.format_exc())
        temporary = path.with_name(f".tmp_{path.name}_{os.getpid()}")
        temporary.write_text(json.dumps({"exit": status, "error": line, **facts}, indent=2) + "\n")
        temporary.replace(path)
    except OSError:  # the disk may be what is full
        pass
