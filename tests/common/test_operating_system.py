"""Everything is imported, says its --help and trains where a system lacks what POSIX has.

A child process takes the place of Windows: what that lacks is taken away before anything of the
project is imported. It is no run on such a system, where the libraries differ as well.
"""

import json
import os
import subprocess
import sys

import pytest

from lora.common import operating_system
from lora.common.paths import ROOT
from tests.test_package import modules

WITHOUT_POSIX = """
import ctypes, errno, fcntl, importlib, json, os, runpy, shutil, signal, sys

# The libraries come first: those of this machine may use what only POSIX has.
import filelock, torch
from transformers import AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

# Text is ASCII where no encoding is named, and what is printed goes through a Windows code page.
assert open(os.devnull).encoding != "utf-8" and sys.stdout.encoding == "cp1252"

get_flags, fsync, open_descriptor = fcntl.fcntl, os.fsync, os.open
GET_FLAGS, ACCESS_MODE = fcntl.F_GETFL, 3

def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return open_descriptor(path, *arguments, **options)

def fsync_what_is_written(descriptor):
    if get_flags(descriptor, GET_FLAGS) & ACCESS_MODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    fsync(descriptor)

class LibraryOfAFile(ctypes.CDLL):
    def __init__(self, name, *arguments, **options):
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *arguments, **options)

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # to import it is an ImportError
for name in ("SIGALRM", "ITIMER_REAL", "setitimer", "alarm"):
    delattr(signal, name)
for name in ("sysconf", "fork", "O_DIRECTORY"):
    delattr(os, name)
os.open, os.fsync, ctypes.CDLL = open_no_folder, fsync_what_is_written, LibraryOfAFile
shutil._use_fd_functions = False  # it opens folders

for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
for arguments in json.loads(sys.argv[2]):
    print("\\n$", *arguments, flush=True)
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""
SCRIPTS = ("train.py", "train_lora.py", "eval.py", "merge.py", "lora/__main__.py")
OTHER_TEXT_ENCODING = {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "cp1252",
}


@pytest.mark.slow
def test_all_modules_help_and_two_steps_work_without_what_only_posix_has(tmp_path):
    chat = [{"role": "user", "content": "naïve"}, {"role": "assistant", "content": "文"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": chat}, ensure_ascii=False), encoding="utf-8")
    short = ["--config=tiny_lora.toml", "--train_data=arithmetic:train:40", "--max_steps=2"]
    short += ["--batch_size=2", "--max_eval_batches=1", "--device=cpu"]
    commands = [[script, "--help"] for script in SCRIPTS]
    commands += [
        ["train_lora.py", *short, f"--output_dir={tmp_path}", "--experiment_name=run"],
        ["train_lora.py", *short, "--dry_run"],
        ["lora/__main__.py", "env"],
        ["lora/__main__.py", "render", str(chats), "--base_model=embedded"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, json.dumps(modules()), json.dumps(commands)],
        cwd=ROOT,
        env=os.environ | OTHER_TEXT_ENCODING | {"PLAINLORA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        encoding="cp1252",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "run" / "logs" / "final_results.json").read_bytes())
    assert results["last"]["step"] == 2 and results["peak_memory_gb"] is None
    metadata = json.loads((tmp_path / "run" / "final_artifact" / "metadata.json").read_bytes())
    assert metadata["hardware"]["memory_gb"] is None
    # --dry_run has added up the parts, and cannot say of how much.
    assert "  total " in done.stdout and " on this cpu" not in done.stdout
    # What cp1252 does not have: the brackets of render, and a letter of the chat.
    assert "naïve" in done.stdout and r"\u27e6\u6587" in done.stdout


def test_memory_is_not_known_where_the_system_does_not_tell_it(monkeypatch):
    assert operating_system.physical_memory_bytes() > operating_system.peak_memory_bytes() > 2**20
    assert operating_system.proc_bytes("meminfo", "NoSuchLine") is None
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(operating_system, "proc_bytes", lambda file, name: None)
    assert operating_system.physical_memory_bytes() is None
    assert operating_system.resident_bytes() is None
    assert operating_system.peak_memory_bytes() is None


def test_a_block_is_ended_when_its_time_is_up():
    with pytest.raises(TimeoutError), operating_system.time_limit(0.05):
        while True:
            pass
