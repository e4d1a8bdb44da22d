"""Several processes under torchrun: which one this is, how rows are dealt, and the sums that make all of them one.

Without torchrun there is one process, and nothing here does anything.
"""

from datetime import timedelta
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from lora.errors import UserError
from lora.targets import decoder_layers

TIMEOUT = timedelta(minutes=10)  # of a process that waits for the others


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def place(i):
    """The number of this process's i-th part, where the parts are dealt in turn."""
    return i * world() + rank()


def place_of(device, before):
    """Where the sums are made, which decides their bits. A run that goes on from a checkpoint takes as many threads."""
    if before and before["facts"]["place"]["processes"] == world():
        torch.set_num_threads(before["facts"]["place"]["threads"])
    versions = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return {"device": device.type, "processes": world(), "threads": torch.get_num_threads(), **versions}


def moved(before, place):
    """What is to be said where a run goes on from a checkpoint (its state, or None) in another place; else ""."""
    was = before["facts"]["place"] if before else place
    changed = [f"{name} {was[name]} -> {now}" for name, now in place.items() if now != was[name]]
    return f"resumed with {', '.join(changed)}: the same examples and targets a step, not the same bits" if changed else ""


def start(device):
    """Join the processes of this run; of what is printed, the first one's is shown."""
    if world() == 1:
        return
    if device.type == "mps":
        raise UserError("device mps: one process only; call the script without torchrun, or add --device cpu.")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        mine, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if mine >= there:
            asked = os.environ["LOCAL_WORLD_SIZE"]
            raise UserError(f"--nproc_per_node={asked}: this machine has {there} GPUs; expected that at most.")
        torch.cuda.set_device(mine)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself then keeps the store
    store = dist.TCPStore(address, port, world(), is_master=rank() == 0 and not agents, timeout=TIMEOUT)
    # A restart by torchrun finds what the attempt before left in the store, and would wait for processes that are gone.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world(), timeout=TIMEOUT)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def shard(task, dtype, optimizer, device):
    """Lay out the weights of `task` over the processes (FSDP2): each holds a part of every layer, and of its optimizer.

    A layer is gathered when it is computed, in `dtype`; the parts and the sums of the gradients are fp32. Raises UserError.
    """
    if dtype == torch.float16:
        raise UserError("dtype float16: full fine-tuning on several processes computes in bfloat16 or float32; name one.")
    if optimizer != "adamw":
        raise UserError(f"optimizer {optimizer}: full fine-tuning on several processes has adamw only; leave it out.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # a second

    mesh = init_device_mesh(device.type, (world(),))  # fully_shard's own is of GPUs wherever there are some
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for module in (*decoder_layers(task.model), task):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the loss is divided by the targets of all processes
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    register_fsdp_forward_method(task, "predict")


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")  # a DTensor


def whole(tensor):
    """A sharded tensor's value, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def rows(count, processes):
    """[processes + 1]: where in `count` rows the part of each process begins, and the end; as torch.chunk has it."""
    size = -(-count // processes)
    return [min(i * size, count) for i in range(processes + 1)]


def my_rows(tensor):
    """(first, last + 1) of the rows of `tensor`, and of what an optimizer keeps of it, that this process holds."""
    if not is_sharded(tensor):
        return 0, sys.maxsize  # the scales of 8-bit states can be more than the tensor's rows
    return tuple(rows(len(tensor), world())[rank() : rank() + 2])


def local(tensor):
    """The rows that this process holds, as a plain tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill(tensor, value):
    """Copy a whole `value` into a tensor that may be sharded. Raises ValueError where it is of another shape."""
    if tensor.shape != value.shape:
        raise ValueError(f"a tensor of {list(value.shape)} for a place of {list(tensor.shape)}")
    local(tensor).copy_(value[slice(*my_rows(tensor))] if value.ndim else value)


def like(parameter, local):
    """This process's rows, as a tensor that is sharded as `parameter` is, if it is."""
    local = local.to(parameter.device)
    if not is_sharded(parameter) or local.ndim == 0:
        return local
    layout = {"shape": parameter.shape, "stride": parameter.stride()}
    return type(parameter.data).from_local(local, parameter.device_mesh, parameter.placements, **layout)


def wait():
    """Until every process has come here."""
    if world() > 1:
        dist.barrier()


def stop():
    if world() > 1:
        dist.destroy_process_group()


def sum_over_all(tensor):
    """The sum of every process's `tensor`, in its place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters, totals):
    """Give every process the sum of all processes' gradients, and of their `totals`; one call over all, once a step."""
    if world() == 1:
        return
    if any(map(is_sharded, parameters)):  # these are summed on the way
        sum_over_all(totals)
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = sum_over_all(torch.cat([part.flatten() for part in (*gradients, totals)]))
    *parts, summed = flat.split([part.numel() for part in (*gradients, totals)])
    for parameter, part in zip(parameters, parts):
        parameter.grad = part.view_as(parameter)
    totals.copy_(summed)


def deal(lengths, world):
    """[len(lengths)]: which process gets each row; the longest first, each to the one that has the least to do."""
    owner, load = np.zeros(len(lengths), np.int64), np.zeros(world, np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        owner[i] = load.argmin()
        load[owner[i]] += lengths[i]
    return owner


def cut(groups, count):
    """The groups in `count` parts: the largest are halved, and where there is nothing to halve a part is empty."""
    groups = [group for group in groups if group]
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]), default=None)
        if largest is None or len(groups[largest]) == 1:
            groups.append([])
        else:
            group = groups[largest]
            groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups


def of_first(function, *arguments):
    """What `function` gives in the first process, for all; no other calls it."""
    values = [function(*arguments) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def interleaved(mine, lengths, device):
    """What the processes made of parts 0, world, 2 world, ... (the first one), 1, world + 1, ..., in the parts' order.

    mine: tensors [n, ...]; lengths: of all the parts.
    """
    if world() == 1:
        return torch.cat(mine)
    shape = of_first(lambda: list(mine[0].shape[1:]))
    whole = torch.zeros(sum(lengths), *shape, device=device)
    for i, part in enumerate(mine):
        begin = sum(lengths[: place(i)])
        whole[begin : begin + len(part)] = part
    return sum_over_all(whole)  # every place is filled by one process, and the others add zero
