"""What differs between operating systems. What a system lacks is None, or is left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import ctypes
import os
from pathlib import Path
import signal
import sys
import threading


def physical_memory_bytes() -> int | None:
    """Return the size of the machine's main memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return None


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int | None:
    """Return the most main memory that this process has held."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Return the main memory that this process holds now, or its peak where that is not known."""
    resident = proc_bytes("self/status", "VmRSS")
    return peak_memory_bytes() if resident is None else resident


def data_segment_bytes() -> int | None:
    """Return the memory of this process that RLIMIT_DATA limits."""
    return proc_bytes("self/status", "VmData")


def available_memory_bytes() -> int | None:
    """Return the machine's main memory that programs can still take."""
    return proc_bytes("meminfo", "MemAvailable")


def proc_bytes(file: str, name: str) -> int | None:
    """Return the bytes that the line "NAME: 123 kB" of a file in Linux's /proc tells."""
    try:
        lines = Path("/proc", file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    sizes = (1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return next(sizes, None)


def c_library_function(name: str) -> Callable | None:
    """Return a function of the C library that this process runs with."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except TypeError:
        return None


def fsync_path(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    is_posix = hasattr(os, "O_DIRECTORY")
    if not is_posix and path.is_dir():
        return
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if is_posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`. Only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError

    old_handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)
