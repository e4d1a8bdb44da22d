"""Ctrl-C and SIGTERM while training: the step is finished and saved before the run ends.

A second signal ends the process at once. The processes of a run tell each other in the sum that
they make at every step anyway, so that all of them stop at the same step. Before the first step and
while the artifact is written there is nothing to save: either signal ends the run at once.

While torch is being imported there is nothing to save: Ctrl-C ends the process at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import os
import signal
import sys
import threading
from types import FrameType

from lora.common.errors import Interrupted


class StopSignal:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal that was received

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; the second one ends the process."""
        if self.number:
            os._exit(128 + number)
        self.number = number
        if os.environ.get("RANK", "0") == "0":
            say_at_once("finishing this step and saving; again to leave without saving")

    def interrupted(self, step: int) -> Interrupted:
        """Return the error that ends a run whose processes have agreed to stop after `step`."""
        # A process that got no signal itself was stopped by another one's.
        number = signal.Signals(self.number or signal.SIGTERM)
        return Interrupted(f"stopped by {number.name} after step {step}, which is saved.", number)


@contextmanager
def catch_signals() -> Iterator[StopSignal]:
    """Keep the first SIGINT or SIGTERM of the block in the StopSignal that it is given."""
    stop_signal = StopSignal()
    with handling([signal.SIGINT, signal.SIGTERM], stop_signal.receive):
        yield stop_signal


def end_on_sigterm(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM outside of steps as Ctrl-C is: by an error, so that the end is recorded."""
    raise Interrupted("ended by SIGTERM.", number)


@contextmanager
def handling(numbers: list[int], handler: Callable) -> Iterator[None]:
    """Have `handler` receive these signals in the block, if it runs in the main thread."""
    previous = {}
    if threading.current_thread() is threading.main_thread():  # no other may set a handler
        for number in numbers:
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def say_at_once(line: str) -> None:
    """Write a line to stderr from a signal handler: below the progress bar of a terminal."""
    start = "\n" if os.isatty(2) else ""
    os.write(2, f"{start}{line}\n".encode())


def begin_loading_torch(is_shown: bool = True) -> None:
    """Say that torch is being loaded, unless it is already, and let Ctrl-C end that in one line."""
    if "torch" in sys.modules:
        return
    # A process that ignores Ctrl-C, as a shell's background jobs do, goes on ignoring it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
    if is_shown and os.environ.get("RANK", "0") == "0":
        print("loading torch ...", flush=True)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C during imports, in which KeyboardInterrupt may be taken for another error."""
    say_at_once("interrupted.")
    os._exit(128 + number)
