"""The processes of a run under torchrun: joining, leaving, rank and world size. Without torchrun
there is one process.
"""

from datetime import timedelta
import os
import sys

import torch
import torch.distributed as dist

from lora.common.errors import UserError

TIMEOUT = timedelta(minutes=10)  # of a process that waits for the others


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def micro_batch_index(i):
    """The number of this process's i-th part, where the parts are dealt in turn."""
    return i * world_size() + rank()


def join(device):
    """Join the processes of this run; of what is printed, the first one's is shown."""
    if world_size() == 1:
        return
    if device.type == "mps":
        raise UserError(
            "device mps: one process only; call the script without torchrun, or add --device cpu."
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        mine, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if mine >= there:
            asked = os.environ["LOCAL_WORLD_SIZE"]
            raise UserError(
                f"--nproc_per_node={asked}: this machine has {there} GPUs; expected that at most."
            )
        torch.cuda.set_device(mine)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Torchrun itself then keeps the store
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        address, port, world_size(), is_master=rank() == 0 and not agents, timeout=TIMEOUT
    )
    # A restart by torchrun finds what the attempt before left in the store, and would wait for
    # processes that are gone.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        backend, store=store, rank=rank(), world_size=world_size(), timeout=TIMEOUT
    )
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def barrier():
    """Until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def leave():
    if world_size() > 1:
        dist.destroy_process_group()
