"""What is freed is kept for the next tensor, unless the user has chosen otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from lora.common.allocator import keep_freed_memory
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


@pytest.mark.skipif(sys.platform != "linux", reason="torch has these segments on Linux alone")
@pytest.mark.parametrize("chosen", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_gpus_memory_grows_in_segments_unless_the_user_says_how(monkeypatch, chosen):
    # What the call sets is put back when the test ends.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_CHECK_", "0")  # this process's own allocator stays as it is
    if chosen:
        monkeypatch.setenv(chosen, "max_split_size_mb:64")
    keep_freed_memory()
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    settings = {name: os.environ[name] for name in names if name in os.environ}
    if chosen:
        assert settings == {chosen: "max_split_size_mb:64"}
    else:
        assert settings == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
