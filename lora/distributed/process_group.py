"""The processes of a run: joining, leaving, rank and world size. Without torchrun there is one."""

from datetime import timedelta
from functools import cache
import itertools
import os
import sys

import torch
import torch.distributed as dist

from lora.common.errors import UserError

TIMEOUT = timedelta(minutes=10)  # of a process that waits for the others
JOINED = itertools.count()  # the groups that this process has joined


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def hide_bar() -> bool | None:
    """Return tqdm's `disable`: None (a bar on a terminal only) on rank 0, True on the others."""
    return True if rank() > 0 else None


def micro_batch_index(i: int) -> int:
    """Return the index of this process's micro-batch i among those of all, assigned round-robin."""
    return i * world_size() + rank()


def join(device: torch.device) -> None:
    """Join this run's processes; only the first keeps standard output. Raises UserError."""
    size = world_size()
    if size == 1:
        return
    if device.type == "mps":
        hint = "call the script without torchrun, or add --device cpu"
        raise UserError(f"device mps: one process only; {hint}.")
    backend, gpu = "gloo", None
    if device.type == "cuda":
        backend = "nccl"
        local_rank = int(os.environ["LOCAL_RANK"])
        num_gpus = torch.cuda.device_count()
        if local_rank >= num_gpus:
            problem = f"this machine has {num_gpus} GPUs; expected that at most"
            raise UserError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}: {problem}.")
        gpu = torch.device("cuda", local_rank)
        torch.cuda.set_device(gpu)
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # The store still holds entries of processes that are gone after a restart by torchrun, and of
    # the group that this process has left before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"attempt_{attempt}_{next(JOINED)}", store)
    dist.init_process_group(
        backend, store=store, rank=rank(), world_size=size, timeout=TIMEOUT, device_id=gpu
    )
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


@cache
def patient_group() -> dist.ProcessGroup:
    """Return the group for collectives that wait while the first process reads, hashes or writes.

    Such work may last longer than TIMEOUT. If a process ends, the others notice it at once.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(hours=24))


def leave() -> None:
    if world_size() > 1:
        patient_group.cache_clear()
        dist.destroy_process_group()
