"""Peak memory of a run's start, beside the bytes of its parameters.

    python benchmarks/loading_memory.py [--cases lora full sharded]

The base has the shape of Qwen2.5-0.5B and random weights in bfloat16. A case begins a run as the
scripts do, and ends it before its first step: the base is loaded, sharded where there are several
processes, and hashed, and the data is tokenised.

    lora      train_lora.py, one process: the base stays in bfloat16
    full      train.py, one process: fp32 masters
    sharded   train.py, four processes: fp32 masters, sharded by FSDP2

The memory is the sum of PSS over the processes (smaps_rollup; Linux), sampled every 10 ms, less
what they held after their imports and one load of the embedded base. It is divided by the bytes of
the parameters in their final type, which the processes hold when they are loaded.
"""

import argparse
import os
from pathlib import Path
import socket
import subprocess
import sys
import tempfile
import time

from common import QWEN_05B, ROOT, save_base

SCRIPTS = {"lora": ("train_lora", 1), "full": ("train", 1), "sharded": ("train", 4)}


def begin_run(script: str, base: str, folder: str) -> None:
    """Import a script, wait for a line, begin a run, and write the bytes of its parameters."""
    from lora.common.allocator import keep_freed_memory

    keep_freed_memory()
    from importlib import import_module

    import torch

    from lora.config.command_line import Command
    from lora.config.schema import Config, ModelConfig, get_lora_config
    from lora.data.raw_data import RawData
    from lora.distributed.sharding import local_tensor
    from lora.model.load import load_task

    module, train = import_module(script), import_module("train")
    # Loading the embedded base makes transformers import what it imports only when it is used.
    load_task(Config(ModelConfig("embedded")), torch.float32)
    if os.environ["WORLD_SIZE"] != "1":
        import_module("torch.distributed.fsdp")  # an import of a sharded run
    config = get_lora_config() if script == "train_lora" else Config()
    config.model.base_model, config.model.task = base, "lm"
    config.data.train_data = config.data.eval_data = ["arithmetic:train:40"]
    config.training.dtype, config.training.device = "bfloat16", "cpu"
    config.output.output_dir, config.output.experiment_name = folder, "run"

    def write_size(run, *_):
        size = sum(local_tensor(parameter).nbytes for parameter in run.task.parameters())
        (Path(folder) / f"rank_{os.environ['RANK']}.txt").write_text(str(size))
        time.sleep(600)  # until it is killed

    setattr(train, "train", write_size)  # noqa: B010  mypy knows no attributes of a module's name
    print("imported", flush=True)
    sys.stdin.readline()
    module.main(Command(config, Path(folder) / "run"), RawData(config))


def pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no Pss in smaps_rollup")


def total_pss(processes: list[subprocess.Popen]) -> int:
    return sum(pss(process.pid) for process in processes)


def measure(case: str, base: str) -> str:
    script, num_processes = SCRIPTS[case]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(num_processes):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": num_processes,
                "LOCAL_WORLD_SIZE": num_processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
                "PLAINLORA_CACHE": folder,
            }
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            command = [sys.executable, __file__, "--begin", script, base, folder]
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
            )
            processes.append(process)
        for process in processes:
            assert process.stdout.readline() == "imported\n"
        time.sleep(1)
        before = peak = total_pss(processes)
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        started = time.monotonic()
        files = [Path(folder) / f"rank_{rank}.txt" for rank in range(num_processes)]
        while not all(file.exists() for file in files):
            assert all(process.poll() is None for process in processes), "its error is above"
            peak = max(peak, total_pss(processes))
            time.sleep(0.01)
        seconds = time.monotonic() - started
        time.sleep(1)
        after = total_pss(processes)
        size = sum(int(file.read_text()) for file in files)
        for process in processes:
            process.kill()
            process.wait()
    held = f"{(peak - before) / 1e9:.2f} GB at most, {(after - before) / 1e9:.2f} GB at the end"
    ratio = f"{(peak - before) / size:.2f} of {size / 1e9:.2f} GB of parameters"
    return f"{case}: {num_processes} processes, {held}: {ratio}; {seconds:.1f} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--begin", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.begin:
        begin_run(*arguments.begin)
    else:
        with tempfile.TemporaryDirectory() as base:
            save_base(base, **QWEN_05B)
            for case in arguments.cases:
                print(measure(case, base), flush=True)
