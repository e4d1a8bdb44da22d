"""What is freed is kept for the next tensor, unless the user has chosen otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from lora.common.paths import ROOT

BLOCK = 2**28
HELD_AFTERWARDS = f"""
import os, lora.common.allocator
lora.common.allocator.keep_freed_memory()
block = b"x" * {BLOCK}
del block
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no mallopt")
@pytest.mark.parametrize("chosen, kept", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)])
def test_a_large_block_is_kept_when_it_is_freed(chosen, kept):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    } | chosen
    command = [sys.executable, "-c", HELD_AFTERWARDS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > BLOCK) == kept
