"""A limit on this process's memory on a CPU: beyond it an allocation fails, as on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
import sys

import torch

from lora.distributed.process_group import processes_on_this_machine

# The usable share of a device's memory: kernels and gaps take some of a GPU's, other programs
# take some of a CPU's.
USABLE = 0.9


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Make allocations in the block fail where they exceed the machine's available memory.

    Linux grants them all, and kills the process when it uses what is not there: a step could not be
    done again in smaller micro-batches. An earlier limit of the process is kept. Start no thread
    in the block: one that finds no memory for its first lines leaves Python waiting for it forever.
    """
    try:
        import resource
    except ImportError:  # on Windows
        resource = None
    if not resource or device.type != "cpu" or sys.platform != "linux":
        yield
        return
    before, maximum = resource.getrlimit(resource.RLIMIT_DATA)
    limit = before
    if before == resource.RLIM_INFINITY:
        available = kilobytes("/proc/meminfo", "MemAvailable") / processes_on_this_machine()
        held = kilobytes("/proc/self/status", "VmData")
        limit = int(1024 * (held + USABLE * available))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, maximum))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, maximum))


def kilobytes(file: str, name: str) -> int:
    """Return the number in the line "NAME: 123 kB" of a file in /proc."""
    lines = Path(file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
