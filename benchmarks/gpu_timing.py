"""The timing parts of benchmarks/gpu.py: the device's ceilings, and the speed of training steps."""

from collections.abc import Callable
from importlib.metadata import version
import inspect
from pathlib import Path
import platform
import statistics
import tempfile

from common import describe_cpu
from gpu_work import (
    RANK,
    Place,
    make_rows,
    make_run,
    make_task,
    mark_time,
    seconds_between,
    train_in,
)
from scaling import PLAIN, flops
import torch
from torch.nn.attention.varlen import varlen_attn

from lora.target_modules import linear_names

WARM_UP_STEPS = 3
TIMED_STEPS = 8
REPEATS = 20  # of a product and a copy, after one more


def ceilings(place: Place) -> dict:
    """Return the versions, and the rates of a bfloat16 product and of a copy."""
    size = place.tokens(8192)
    a = torch.randn(size, size, device=place.device, dtype=torch.bfloat16)
    b = torch.randn_like(a)
    product = median_seconds(lambda: a @ b, place)
    copy = median_seconds(lambda: b.copy_(a), place)
    device = torch.cuda.get_device_name() if place.is_cuda else describe_cpu()
    return {
        "device": device,
        "device_type": place.device_type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": version("transformers"),
        "varlen_attn": str(inspect.signature(varlen_attn)),
        "product": f"{size} x {size} in bfloat16",
        "flops_per_second": 2 * size**3 / product,
        "bytes_per_second": 2 * a.nbytes / copy,  # read and written
    }


def median_seconds(function: Callable[[], object], place: Place) -> float:
    function()
    marks = [mark_time()]
    for _ in range(REPEATS):
        function()
        marks.append(mark_time())
    if place.is_cuda:
        torch.cuda.synchronize()
    return statistics.median(map(seconds_between, marks, marks[1:]))


def lora_steps(place: Place, shape_name: str, num_tokens: int, seq_len: int) -> dict:
    """Time steps of LoRA in one packed micro-batch of `num_tokens`, in documents of `seq_len`."""
    shape = place.shape(shape_name)
    batch_size = num_tokens // seq_len
    seq_len = place.tokens(seq_len)
    settings = {"batch_size": batch_size, "gradient_accumulation_steps": 1}
    settings["max_steps"] = WARM_UP_STEPS + TIMED_STEPS
    settings["logging_steps"] = 1000
    rows = make_rows([seq_len] * 2 * batch_size, shape["vocab_size"])
    task = make_task(place, shape)
    linear = 0
    for name in linear_names(task.model):
        linear += task.model.get_submodule(name).weight.numel()
    run = make_run(place, task, rows, settings)
    with tempfile.TemporaryDirectory() as folder:
        seconds = train_in(Path(folder) / "run", run)[-TIMED_STEPS:]
    point = {"length": seq_len, "batch": batch_size, "vocabulary": shape["vocab_size"]}
    point |= {"width": shape["hidden_size"], "layers": shape["num_hidden_layers"]}
    label = shape_name if place.size == "full" else f"tiny for {shape_name}"
    return {
        "what": f"LoRA r {RANK}, {label}, {batch_size} x {seq_len} tokens, eager",
        "tokens": batch_size * seq_len,
        "flops": flops(PLAIN | point, linear),
        "seconds": seconds,
        "allocated": torch.cuda.max_memory_allocated() if place.is_cuda else None,
        "reserved": torch.cuda.max_memory_reserved() if place.is_cuda else None,
    }


TIMING: dict[str, Callable[[Place], dict]] = {
    "lora 0.5b": lambda place: lora_steps(place, "0.5b", 16_384, 2048),
    "lora 8b": lambda place: lora_steps(place, "8b", 8192, 2048),
    "lora 7b": lambda place: lora_steps(place, "7b", 8192, 4096),
}
