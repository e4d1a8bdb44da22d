"""What a GPU's run asks of torch, without a GPU: which attention, no waiting, one graph a layer.

A CPU's tensors without contents (FakeTensorMode) stand for the GPU's: torch does not let a CPU's
build index a GPU's. What waits for a GPU needs a tensor's contents, and so fails with them.
"""

from functools import partial
import random

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from lora.data.batches import Rows
from lora.data.tokenise import NO_TOKEN, Row
from lora.model import attention
from lora.model.attention import why_without_flash
from lora.model.device import autocast
from lora.model.placement import prepare_layers
from tests.conftest import run
from tests.model.test_families import (
    ENCODERS,
    GROUPED,
    PACKED,
    SHAPE,
    base,
    documents,
    scored,
    task_of,
)
from tests.model.test_model import task_with_lora

CPU = torch.device("cpu")
# Layers of a family whose attention FlashAttention computes, of two; the others have a soft cap or
# sinks.
OTHERS = {"Gemma2": 0, "GptOss": 0}


@pytest.fixture
def flash_calls(monkeypatch):
    """The heads' widths of all calls of FlashAttention, on a device that has it."""
    widths = []

    def counted(query, *arguments, **options):
        widths.append(query.shape[-1])
        return varlen_attn(query, *arguments, **options)

    monkeypatch.setattr(attention, "has_flash", lambda device: True)
    monkeypatch.setattr(attention, "varlen_attn", counted)
    return widths


def step_without_contents(task, rows, backward=True):
    """A micro-batch forward and backward; what needs the contents of a tensor is an error."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch = rows.batch(range(len(rows)), task.packed)
    with fake_mode:
        tensors = (*task.named_parameters(), *task.named_buffers())
        fakes = {}
        for name, tensor in tensors:
            fake = fake_mode.from_tensor(tensor.detach())
            fakes[name] = fake.requires_grad_(tensor.requires_grad)
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                setattr(batch, name, fake_mode.from_tensor(value))
        with autocast(CPU, torch.bfloat16):
            loss, _ = torch.func.functional_call(task, fakes, (batch,))
        if backward:
            loss.backward()


@pytest.mark.parametrize(
    "family, kind",
    [*((f, "lm") for f in PACKED), *((f, "score") for f in (*ENCODERS, "Llama", "Gemma2"))],
)
def test_what_goes_to_flash_attention_and_that_no_micro_batch_waits_for_the_device(
    family, kind, tmp_path, flash_calls
):
    folder = base(family, (PACKED | ENCODERS)[family], tmp_path)
    task = task_of(folder, kind).bfloat16().train()
    flash_calls.clear()
    rows = Rows.from_rows(documents() if kind == "lm" else scored(), kind)
    step_without_contents(task, rows)
    assert flash_calls == [8] * OTHERS.get(family, 2)
    assert bool(why_without_flash(task.model, CPU, torch.bfloat16)) == (not flash_calls)


@pytest.mark.parametrize("width, calls", [(20, 0), (256, 2), (264, 0)])
def test_heads_of_a_width_that_flash_attention_does_not_take_are_computed_otherwise(
    width, calls, tmp_path, flash_calls
):
    task = task_of(base("Qwen3", GROUPED | dict(head_dim=width), tmp_path), "lm")
    step_without_contents(task, Rows.from_rows(documents(), "lm"))
    assert len(flash_calls) == calls
    assert bool(why_without_flash(task.model, CPU, torch.bfloat16)) == (calls == 0)


@pytest.mark.parametrize("value_width, calls", [(24, 2), (16, 0)])
def test_values_of_a_width_of_their_own_are_computed_otherwise(
    value_width, calls, tmp_path, flash_calls
):
    shape = SHAPE | dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16)
    shape |= dict(qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=value_width)
    task = task_of(base("DeepseekV3", shape | {"first_k_dense_replace": 2}, tmp_path), "lm")
    step_without_contents(task, Rows.from_rows(documents(), "lm"))
    assert len(flash_calls) == calls
    assert bool(why_without_flash(task.model, CPU, torch.bfloat16)) == (calls == 0)


@pytest.mark.parametrize("family, name", [("Qwen3", "attention_dropout"), ("GPT2", "attn_pdrop")])
def test_attention_with_dropout_is_computed_otherwise(family, name, tmp_path, flash_calls):
    shape = (PACKED | ENCODERS)[family] | {name: 0.1}
    task = task_of(base(family, shape, tmp_path), "lm").bfloat16().train()
    step_without_contents(task, Rows.from_rows(documents(), "lm"))
    assert not flash_calls
    assert "no dropout" in why_without_flash(task.model, CPU, torch.bfloat16)
    task.model.requires_grad_(False).eval()  # as the base of a head that is trained alone
    step_without_contents(task, Rows.from_rows(documents(), "lm"), backward=False)
    assert flash_calls and not why_without_flash(task.model, CPU, torch.bfloat16)


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that Python asks for, and shapes that depend on
    contents.
    """

    OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._opname in self.OPERATIONS
        return func(*args, **(kwargs or {}))

    def counting(self, method):
        def counted(tensor):
            self.count += 1
            return method(tensor)

        return counted


@pytest.mark.parametrize("lora", [True, False])
def test_a_step_waits_for_the_device_twice_however_many_micro_batches_it_has(
    configure, monkeypatch, lora
):
    counts = []
    for name, steps, micro_batches in (("two", 2, 1), ("four", 4, 1), ("cut", 4, 4)):
        with Waits() as waits, monkeypatch.context() as patch:
            # On a CPU these two copy nothing, and no operation shows.
            for method in ("tolist", "cpu"):
                patch.setattr(torch.Tensor, method, waits.counting(getattr(torch.Tensor, method)))
            settings = {"eval_steps": 100, "save_steps": 100, "max_steps": steps, "task": "lm"}
            settings |= {"max_length": 256, "batch_size": 8 // micro_batches}
            settings |= {"gradient_accumulation_steps": micro_batches}
            run(configure(lora, name, **settings))
        counts.append(waits.count)
    assert counts[1] - counts[0] == 2 * 2
    assert counts[2] == counts[1]


def lengths_of_documents():
    """The lengths of the documents of six micro-batches."""
    draw = random.Random(0)
    return [[draw.randint(5, 60) for _ in range(draw.randint(2, 6))] for _ in range(6)]


def compiled_step(config, monkeypatch, num_layers=2):
    """The gradients, and the counters of torch.compile, of a run's layers over all lengths."""
    task = task_with_lora(config)
    del task.model.base_model.layers[num_layers:]
    with monkeypatch.context() as patch:
        # What is traced is the question; compiling it as well takes minutes.
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        checkpointing = config.training.gradient_checkpointing is True
        prepare_layers(task.model, config.training, checkpointing)
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for seq_lens in lengths_of_documents():
        rows = [(Row(list(range(5, 5 + n)), [*range(6, 5 + n), NO_TOKEN]), 0) for n in seq_lens]
        loss, _ = task(Rows.from_rows(rows, "lm").batch(range(len(rows))))
        loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = counters["graph_break"].total()
    gradients = [p.grad.flatten() for p in task.parameters() if p.requires_grad]
    return torch.cat(gradients), graphs, breaks


@pytest.mark.slow
def test_a_compiled_layer_with_flash_attention_is_one_graph_for_all_lengths(configure, monkeypatch):
    monkeypatch.setattr(attention, "has_flash", lambda device: True)
    monkeypatch.setattr(attention, "flash_takes", lambda *widths: True)
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    eager, _, _ = compiled_step(configure(True, task="lm"), monkeypatch)
    for checkpointing in (False, True):
        asked = {"compile": True, "gradient_checkpointing": checkpointing}
        config = configure(True, task="lm", **asked)
        gradients, graphs, breaks = compiled_step(config, monkeypatch)
        assert torch.equal(gradients, eager)
        # Of two layers, and the input of the first alone needs no gradient.
        assert graphs == [2] * 6 and breaks == 0


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients_and_are_compiled_once_for_all_lengths(
    configure, monkeypatch
):
    eager, _, _ = compiled_step(configure(True, task="lm"), monkeypatch, num_layers=1)
    config = configure(True, task="lm", compile=True)
    gradients, graphs, _ = compiled_step(config, monkeypatch, num_layers=1)
    assert torch.equal(gradients, eager)
    assert graphs[0] > 0 and graphs == graphs[:1] * 6


# A stand-in for FlashAttention's operation, which only GPUs have, as one operation to the compiler.


def attention_weights(query, key, ends, scale, window):
    place = torch.arange(len(query))
    document = torch.bucketize(place, ends[1:], right=True)
    before, after = (len(query) if side == -1 else side for side in window)
    distance = place[:, None] - place
    seen = (document[:, None] == document) & (distance <= before) & (-distance <= after)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@torch.library.custom_op("plainlora_tests::attention", mutates_args=())
def stand_in_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor,
    longest: int, scale: float, window: list[int],
) -> torch.Tensor:  # fmt: skip
    count = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(count, 1) for x in (key, value))
    weights = attention_weights(query, key, ends, scale, window)
    return torch.einsum("hqk,khd->qhd", weights, value).contiguous()


@torch.library.custom_op("plainlora_tests::attention_backward", mutates_args=())
def stand_in_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    ends: torch.Tensor, scale: float, window: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    count = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(count, 1) for x in (key, value))
    weights = attention_weights(query, key, ends, scale, window)
    weights_grad = torch.einsum("qhd,khd->hqk", grad, value)
    scores_grad = weights * (weights_grad - (weights_grad * weights).sum(-1, keepdim=True)) * scale
    query_grad = torch.einsum("hqk,khd->qhd", scores_grad, key)
    key_grad = torch.einsum("hqk,qhd->khd", scores_grad, query)
    value_grad = torch.einsum("hqk,qhd->khd", weights, grad)
    key_grad, value_grad = (x.unflatten(1, (-1, count)).sum(2) for x in (key_grad, value_grad))
    return query_grad.contiguous(), key_grad, value_grad


@stand_in_forward.register_fake
def _(query, key, value, ends, longest, scale, window):
    return torch.empty(query.shape)


@stand_in_backward.register_fake
def _(grad, query, key, value, ends, scale, window):
    return torch.empty(query.shape), torch.empty(key.shape), torch.empty(value.shape)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.scale, ctx.window = inputs[5:]


def backward(ctx, grad):
    return *stand_in_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window), *[None] * 4


stand_in_forward.register_autograd(backward, setup_context=keep)


def stand_in(q, k, v, ends, _ends, longest, _longest, *, scale, window_size, enable_gqa=None):
    return stand_in_forward(q, k, v, ends, longest, scale, list(window_size))
