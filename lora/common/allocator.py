"""The C library's memory on a CPU: pages of 2 MB, and what is freed is kept for the next tensor."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory():
    """Set this process's allocators. To be called before torch is imported, which reads the
    environment then.

    glibc gives blocks above 32 MB, and the end of its heap, back to the system when they are freed,
    and gets them again page by page: up to half of a step's time. Other C libraries have no
    mallopt, and MALLOC_... in the environment is the user's word.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        # And not M_MMAP_THRESHOLD, which older versions do not let above 32 MB
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
