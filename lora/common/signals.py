"""Ctrl-C and SIGTERM while training: the step is finished and saved before the run ends. A second
one ends it at once.

The processes of a run tell each other in the sum that they make every step anyway, so that all stop
at the same step.
"""

from contextlib import contextmanager
import os
import signal
import threading

from lora.common.errors import Interrupted

received = 0  # the number of the signal that asks this process to stop


@contextmanager
def watching():
    """Keep the first SIGINT or SIGTERM in `received`."""
    global received
    received, before = 0, {}
    if threading.current_thread() is threading.main_thread():  # no other may set a handler
        before = {
            number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def receive(number, frame):
    global received
    if received:
        os._exit(128 + number)
    received = number


def stopped(step):
    """What ends a run whose processes have agreed to stop; one that got no signal itself was
    stopped by another's.
    """
    number = signal.Signals(received or signal.SIGTERM)
    return Interrupted(f"stopped by {number.name} after step {step}, which is saved.", number)
