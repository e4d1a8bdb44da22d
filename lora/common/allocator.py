"""The C library's allocator: pages of 2 MB, and freed memory is kept for the next tensor."""

import os

from lora.common.operating_system import c_library_function

# Parameters of mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Set this process's allocators. Call it before torch is imported and reads the environment.

    glibc gives blocks above 32 MB, and the end of its heap, back to the system when they are freed,
    and gets them again page by page: that is up to half of a step's time. Other C libraries have no
    mallopt. Whoever sets MALLOC_... or GLIBC_TUNABLES in the environment has chosen otherwise.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = c_library_function("mallopt")
    user_settings = ("MALLOC_", "GLIBC_TUNABLES")
    if mallopt and not any(name.startswith(user_settings) for name in os.environ):
        # M_MMAP_THRESHOLD would not do: older versions of glibc do not let it above 32 MB.
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
