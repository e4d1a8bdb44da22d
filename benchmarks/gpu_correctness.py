"""The correctness parts of benchmarks/gpu.py: what must hold on a device, on a few layers.

Each part returns its checks, and leaves the process as it found it. (a) to (d), which compare
gradients, stand here; those that train are in gpu_runs.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import copy
from functools import partial
import importlib.util
import tempfile

from common import save_base
from gpu_runs import (
    out_of_memory_halves,
    planned_memory_is_taken,
    resumed_is_uninterrupted,
    synchronisations,
)
from gpu_work import (
    SAME_SUMS,
    Check,
    NotRun,
    Place,
    add_lora,
    at_most,
    gradients,
    largest,
    largest_difference,
    make_rows,
    make_task,
    mixed_lengths,
    wrap_layers,
)
import torch
from torch._dynamo.utils import counters

from lora.config.schema import get_lora_config
from lora.data.batches import Batch
from lora.layer import lora_layers
from lora.model import attention
from lora.model.load import load_task
from lora.quantization import dense

BFLOAT16 = torch.bfloat16
# Relative difference that bfloat16 makes in the gradients of a few layers: 0.025 for SDPA itself.
ROUNDING = 5e-2
LOSS_ROUNDING = 1e-3  # ... and in their loss, a mean over thousands of targets: 5e-5
WINDOW = 8  # so small that one position more or less shows
TIMES_SDPA = 1.5  # how much larger our difference from fp32 may be than that of SDPA in bfloat16
MOST_GRAPHS = 3  # of --compile, over all lengths


@contextmanager
def count_flash_calls() -> Iterator[list]:
    """Collect the calls of FlashAttention in the block."""
    calls: list = []
    original = attention.varlen_attn

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return original(*arguments, **options)

    attention.varlen_attn = counted
    try:
        yield calls
    finally:
        attention.varlen_attn = original


def packed_is_separate(place: Place) -> list[Check]:
    """(a) Packed documents = each of them alone with SDPA in fp32"""
    shapes = {
        "Qwen2.5-0.5B's shape": {},
        f"a window of {WINDOW}": {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
        },
        "heads of width 20": {"head_dim": 20},
    }
    checks = []
    for name, changes in shapes.items():
        shape = place.correctness_shape() | changes
        task = make_task(place, shape)
        rows = make_rows([1, 7, place.tokens(128), place.tokens(2048)], shape["vocab_size"])
        packed = [rows.batch(range(len(rows)))]
        separate = [rows.batch([i], packed=False) for i in range(len(rows))]
        with_sdpa = copy.deepcopy(task)
        with_sdpa.packed = False
        with_sdpa.model.set_attn_implementation("sdpa")
        in_fp32 = copy.deepcopy(with_sdpa).float()

        expected_loss, expected = gradients(in_fp32, separate, torch.float32)
        _, sdpa_gradients = gradients(with_sdpa, separate, BFLOAT16)
        with count_flash_calls() as calls:
            loss, found = gradients(task, packed, BFLOAT16)
        difference = largest_difference(found, expected)
        sdpa_difference = largest_difference(sdpa_gradients, expected)
        checks += [
            at_most(f"{name}: loss", abs(loss / expected_loss - 1), LOSS_ROUNDING),
            at_most(f"{name}: gradients", difference, ROUNDING),
            at_most(
                f"{name}: gradients, times SDPA's own difference in bfloat16",
                difference / sdpa_difference,
                TIMES_SDPA,
            ),
        ]
        if place.is_cuda:
            # FlashAttention takes widths that are multiples of 8.
            layers = 0 if "head_dim" in changes else shape["num_hidden_layers"]
            passed = len(calls) == layers
            what = f"{name}: calls of FlashAttention"
            checks.append(Check(what, str(len(calls)), str(layers), passed))
    return checks


def four_bits_are_dequantised(place: Place) -> list[Check]:
    """(b) A base in 4 bits = the dense base of its dequantised weights"""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed")
    config = get_lora_config()
    config.lora.load_in_4bit = True
    config.training.device = place.device_type
    shape = place.correctness_shape()
    with tempfile.TemporaryDirectory() as folder:
        save_base(folder, **shape)
        config.model.base_model = folder
        task = load_task(config, BFLOAT16)
    add_lora(task.model)
    task.to(place.device).train()
    batches = make_batches(place, shape)
    loss, found = gradients(task, batches, BFLOAT16)
    for layer in lora_layers(task.model).values():
        layer.base_layer = dense(layer.base_layer)
    expected_loss, expected = gradients(task, batches, BFLOAT16)
    return [
        at_most("loss", abs(loss / expected_loss - 1), SAME_SUMS),
        at_most("gradients", largest_difference(found, expected), SAME_SUMS),
    ]


def checkpointing_changes_nothing(place: Place) -> list[Check]:
    """(c) Gradient checkpointing = none"""
    shape = place.correctness_shape()
    task = make_task(place, shape)
    batches = make_batches(place, shape)
    loss, expected = gradients(task, batches, BFLOAT16)
    _, repeated = gradients(task, batches, BFLOAT16)
    settings = get_lora_config().training
    settings.gradient_checkpointing = True
    wrap_layers(task, settings)
    checkpointed_loss, found = gradients(task, batches, BFLOAT16)
    return [
        at_most("loss", abs(checkpointed_loss / loss - 1), SAME_SUMS),
        at_most("gradients", largest_difference(found, expected), SAME_SUMS),
        Check("gradients of two equal calls", f"{largest_difference(repeated, expected):.2g}"),
    ]


def compiled_is_eager(place: Place) -> list[Check]:
    """(d) --compile = eager, without a graph for every length"""
    shape = place.correctness_shape()
    task = make_task(place, shape)
    mixes = []
    for i in range(1, 7):
        lengths = mixed_lengths(place, count=i + 1, longest=256 * i)
        mixes.append([make_rows(lengths, shape["vocab_size"], seed=i).batch(range(i + 1))])
    expected = [gradients(task, batches, BFLOAT16) for batches in mixes]
    settings = get_lora_config().training
    settings.compile = True
    with quick_compiler(place):
        wrap_layers(task, settings)
    torch._dynamo.reset()
    counters.clear()
    losses, differences, graphs = [], [], []
    for batches, (eager_loss, eager) in zip(mixes, expected):
        loss, found = gradients(task, batches, BFLOAT16)
        losses.append(abs(loss / eager_loss - 1))
        differences.append(largest_difference(found, eager))
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    checks = [
        at_most("loss", largest(losses), LOSS_ROUNDING),
        at_most("gradients", largest(differences), ROUNDING),
    ]
    if place.is_cuda:
        checks.append(at_most("graphs over six mixes of lengths", graphs[-1], MOST_GRAPHS))
    else:  # a CPU's attention is outside the graphs, and breaks them
        checks.append(at_most("graphs that later lengths add", graphs[-1] - graphs[0], 0))
    return checks


@contextmanager
def quick_compiler(place: Place) -> Iterator[None]:
    """On a CPU, let torch.compile in the block run the graphs that it finds as they are.

    They are the same there, but to make programs of them takes minutes.
    """
    compile = torch.compile
    if not place.is_cuda:
        torch.compile = partial(compile, backend="eager")
    try:
        yield
    finally:
        torch.compile = compile


def make_batches(place: Place, shape: dict) -> list[Batch]:
    """Return two packed micro-batches of documents of mixed lengths."""
    rows = make_rows(mixed_lengths(place, count=8, longest=1024), shape["vocab_size"])
    return [rows.batch(range(4)), rows.batch(range(4, 8))]


CORRECTNESS: dict[str, Callable[[Place], list[Check]]] = {
    "a": packed_is_separate,
    "b": four_bits_are_dequantised,
    "c": checkpointing_changes_nothing,
    "d": compiled_is_eager,
    "e": resumed_is_uninterrupted,
    "f": out_of_memory_halves,
    "g": planned_memory_is_taken,
    "h": synchronisations,
}
