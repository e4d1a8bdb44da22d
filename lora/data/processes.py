"""Call a function for many arguments, in as many processes as the machine has cores."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import gc
import multiprocessing
import os
import signal
import sys
from threading import Thread
from typing import Any

from lora.common.errors import ResourceExhausted

AHEAD = 2  # arguments for each process that are read before their results are taken

worker_function: Callable[[Any], Any]  # of a worker process, where it is set


def in_processes(function: Callable, arguments: Iterable, num_processes: int) -> Iterator:
    """Yield function(argument) for each argument, in their order. Raises what it raises."""
    # A forked process shares what this one has loaded, as those of torch's DataLoader do. A lock
    # that another thread holds stays locked in it; tokenising takes none of torch's.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_processes, context, start_worker, (function,))
    waiting: deque[Future] = deque()
    try:
        for argument in arguments:
            waiting.append(pool.submit(call_in_worker, argument))
            if len(waiting) >= AHEAD * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        problem = "a process that tokenised the data was killed, perhaps because memory ran out"
        raise ResourceExhausted(f"{problem}; its finished work is kept: start again.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(function: Callable) -> None:
    """Prepare this process, which calls one function only."""
    global worker_function
    worker_function = function
    gc.freeze()  # memory that is shared with the parent is not looked at, and so not copied
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this one
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def call_in_worker(argument: Any) -> Any:
    return worker_function(argument)
