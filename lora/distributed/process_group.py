"""The processes of a run: joining, leaving, rank and world size. Without torchrun there is one."""

from datetime import timedelta
import os
import sys

import torch
import torch.distributed as dist

from lora.common.errors import UserError

TIMEOUT = timedelta(minutes=10)  # of a process that waits for the others


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def micro_batch_index(i: int) -> int:
    """Return the index of this process's micro-batch i among those of all, dealt in turn."""
    return i * world_size() + rank()


def join(device: torch.device) -> None:
    """Join this run's processes; only the first keeps standard output. Raises UserError."""
    size = world_size()
    if size == 1:
        return
    if device.type == "mps":
        hint = "call the script without torchrun, or add --device cpu"
        raise UserError(f"device mps: one process only; {hint}.")
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            problem = f"this machine has {num_gpus} GPUs; expected that at most"
            raise UserError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}: {problem}.")
        torch.cuda.set_device(local_rank)
    # Where torchrun's agent keeps the store itself, no process of the run is its master.
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = connect(is_master=rank() == 0 and not agent_keeps_store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=size, timeout=TIMEOUT)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def connect(is_master: bool = False) -> dist.Store:
    """Return the store through which the processes meet."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size(), is_master=is_master, timeout=TIMEOUT)
    # After a restart by torchrun the store still holds entries of processes that are gone.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"attempt_{attempt}", store)


def wait_for_all(phase: str) -> None:
    """Wait until every process has ended a phase, which has a name of its own, however long.

    In a collective they would wait for TIMEOUT at most, and one of them may read or hash for more.
    If a process is lost meanwhile, torchrun ends the others.
    """
    if world_size() == 1:
        return
    store = connect()
    if store.add(phase, 1) == world_size():
        store.set(f"{phase}, all", "")
    store.wait([f"{phase}, all"], timedelta(days=7))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    if world_size() > 1:
        dist.destroy_process_group()
