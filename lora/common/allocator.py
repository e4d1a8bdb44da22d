"""The allocators: pages of 2 MB, freed memory kept for the next tensor, a GPU's without gaps."""

import os
import sys

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
    # Packed batches differ in length at every step: blocks of fixed sizes would leave gaps in a
    # GPU's memory. Only Linux has the other kind. torch reads the older name first.
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    mallopt = c_library_function("mallopt")
    user_settings = ("MALLOC_", "GLIBC_TUNABLES")
    if mallopt and not any(name.startswith(user_settings) for name in os.environ):
        # M_MMAP_THRESHOLD would not do: older versions of glibc do not let it above 32 MB.
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
