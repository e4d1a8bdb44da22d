"""The C library's memory on a CPU: pages of 2 MB, and what is freed is kept for the next tensor."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3), in bytes
NEVER = 2**31 - 1  # the largest that mallopt takes


def keep_memory():
    """Set this process's allocators. To be called before torch is imported, which reads the environment then.

    glibc gives every large block back to the system when it is freed, and gets it again page by page: up to half of a
    step's time. Other C libraries have no mallopt, and MALLOC_MMAP_THRESHOLD_ in the environment is the user's own choice.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, NEVER)
        mallopt(M_TRIM_THRESHOLD, NEVER)
