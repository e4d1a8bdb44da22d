"""A limit on this process's memory on a CPU: beyond it an allocation fails, as on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora.common.operating_system import available_memory_bytes, data_segment_bytes
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
    available, held = available_memory_bytes(), data_segment_bytes()
    if not resource or device.type != "cpu" or available is None or held is None:
        yield
        return
    before, maximum = resource.getrlimit(resource.RLIMIT_DATA)
    limit = before
    if before == resource.RLIM_INFINITY:
        limit = int(held + USABLE * available / processes_on_this_machine())
    resource.setrlimit(resource.RLIMIT_DATA, (limit, maximum))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, maximum))
