"""Which exceptions are no bugs, and what they mean. Imported where there is one."""

import os
from pathlib import Path
import re
import shlex
import signal
import sys

from lora.common import errors
from lora.common.checkpoint_folders import resumable_by_step
from lora.common.errors import Interrupted, ProcessLost, ResourceExhausted, UserError
from lora.common.paths import script_call

MAX_NAME_LENGTH = 200  # characters of a file's name that a line quotes
SIGPIPE = 13  # Windows' signal module has none


def as_known_error(error: BaseException) -> UserError | None:
    """Return an exception as one of the errors that have an exit status; None: it is a bug."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, UserError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted.", signal.SIGINT)
    if isinstance(error, BrokenPipeError):
        return Interrupted("the reader of standard output, or of another pipe, has ended.", SIGPIPE)
    if errors.is_disk_full(error):
        return ResourceExhausted(f"{text}: no room for it; the checkpoints are as they were.")
    if errors.is_out_of_memory(error):
        return ResourceExhausted(f"{text.rstrip('.')}. {errors.LESS_MEMORY}")
    if "EADDRINUSE" in text:
        taken = f"port {os.environ.get('MASTER_PORT')} is taken"
        return ResourceExhausted(f"{taken}: let torchrun --standalone choose a free one.")
    under_torchrun = "LOCAL_WORLD_SIZE" in os.environ and isinstance(error, RuntimeError)
    if under_torchrun and re.search("gloo|NCCL", text):
        lost = "another process of this run was lost (torchrun says which)"
        return ProcessLost(f"{lost}, or: {text}")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return UserError(f"{str(error.filename)[:MAX_NAME_LENGTH]}: {error.strerror}.")
    if re.search(r"\(os error \d+\)", text):  # of safetensors, in Rust
        return UserError(f"{text}.")
    return None


def close_unread_output() -> bool:
    """Return whether nobody reads standard output any more, as after `| head`."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def error_line(error: UserError, run_dir: Path | None) -> str:
    """Return an error as one printable line; it may quote somebody's file."""
    text = str(error)
    command = resume_command(run_dir)
    if error.status >= 4 and command:
        text += f" Go on with: {command}"
    one_line = " ".join(text.split())
    return "".join(character for character in one_line if character.isprintable())


def resume_command(run_dir: Path | None) -> str:
    """Return the command that continues the run from its newest checkpoint, or ""."""
    if run_dir is None:
        return ""
    checkpoints = resumable_by_step(run_dir / "checkpoints")
    if not checkpoints:
        return ""
    newest = checkpoints[max(checkpoints)]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # set by torchrun
    if os.environ.get("WORLD_SIZE", "1") != processes:
        return f"the same command for every process, with --resume_from {newest.as_posix()}"
    call = script_call(sys.argv[0], int(processes) if processes.isdecimal() else 1)
    return shlex.join([*call, "--resume_from", newest.as_posix()])
