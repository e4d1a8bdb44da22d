"""Programs in a process of their own, forked from a server that has loaded torch already.

A fresh interpreter takes seconds to import torch and transformers. The server imports nothing of
this project, so what a fork imports may be a changed copy of it.
"""

import multiprocessing
import os
from pathlib import Path
import runpy
import sys

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "bitsandbytes",
        "torch.distributed",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ]
)


def run_programs(commands: list[list[str]], folder: Path) -> str:
    """Run programs one after the other in `folder`, as `python` would, but in one process.

    A command is a script with its arguments, or -m and a module with its arguments. Returns what
    they print. Raises AssertionError where one of them does not end with status 0.
    """
    output = folder / "output.txt"
    process = context.Process(target=run_here, args=(commands, folder, output), daemon=True)
    process.start()
    process.join()
    printed = output.read_text(encoding="utf-8")
    output.unlink()
    assert process.exitcode == 0, printed
    return printed


def run_here(commands: list[list[str]], folder: Path, output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for command in commands:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
