"""The language model's head in chunks equals the plain formula, in value, gradient and memory it
does not take.
"""

import copy

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from lora import inject
from lora.model.heads import LMHead
from tests.lora.test_layer import randomise


class Shape:
    def __init__(self, **values):
        vars(self).update(values)


SHAPES = {
    "plain": {},
    "granite": dict(logits_scaling=8.0),
    "cohere": dict(logit_scale=0.25),
    "gemma": dict(final_logit_softcapping=3.0),
}


@pytest.fixture
def small_chunks(monkeypatch):
    sevens = staticmethod(
        lambda hidden, vocabulary: [slice(i, i + 7) for i in range(0, len(hidden), 7)]
    )
    monkeypatch.setattr(LMHead, "chunks", sevens)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_the_plain_formulas(shape, trained, bias, small_chunks):
    torch.manual_seed(0)
    layer = nn.Linear(16, 300, bias=bias).requires_grad_(trained)
    head = LMHead(lambda: layer, Shape(**SHAPES[shape]))
    hidden, targets = torch.randn(45, 16, requires_grad=True), torch.randint(300, (45,))
    (head(hidden, targets, torch.ones(len(targets))) * 0.3).backward()
    ours = [hidden.grad.clone(), *(p.grad for p in layer.parameters() if trained)]
    assert trained or all(p.grad is None for p in layer.parameters())

    layer.zero_grad()
    hidden.grad = None
    values = SHAPES[shape]
    logits = layer(hidden) * values.get("logit_scale", 1.0) / values.get("logits_scaling", 1.0)
    cap = values.get("final_logit_softcapping")
    logits = cap * torch.tanh(logits / cap) if cap else logits
    losses = F.cross_entropy(logits, targets, reduction="none")
    (losses.sum() * 0.3).backward()
    theirs = [hidden.grad, *(p.grad for p in layer.parameters() if trained)]
    torch.testing.assert_close(
        head(hidden, targets, torch.ones(len(targets))), losses.sum(), rtol=1e-6, atol=0
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-6 * max(1.0, other.abs().max().item())
        )
    said = head.predict(hidden, targets)
    torch.testing.assert_close(said[:, 0], losses.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(said[:, 1].bool(), logits.argmax(-1) == targets)


def test_an_output_layer_with_lora_is_learned_by_the_plain_formula(small_chunks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 300))
    inject(model, r=4)
    randomise(model)
    hidden, targets = torch.randn(45, 16), torch.randint(300, (45,))
    factors = [model[0].lora_A.weight, model[0].lora_B.weight]
    ours, theirs = (
        LMHead(lambda: model[0], Shape())(hidden, targets, torch.ones(len(targets))),
        F.cross_entropy(model(hidden), targets, reduction="sum"),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(ours, factors), torch.autograd.grad(theirs, factors)):
        # Sums in another order
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_large_logits_cost_no_precision():
    torch.manual_seed(0)
    layer = nn.Linear(16, 300)
    nn.init.constant_(layer.bias, 1000.0)
    hidden = 20 * torch.randn(45, 16)
    targets = layer(hidden).argmax(1)  # small losses
    exact = F.cross_entropy(layer(hidden).double(), targets, reduction="sum").float()
    torch.testing.assert_close(
        LMHead(lambda: layer, Shape())(hidden, targets, torch.ones(len(targets))),
        exact,
        rtol=1e-6,
        atol=0,
    )


def test_all_the_logits_never_exist_at_once(monkeypatch):
    """Of 8,192 targets over 151,936 tokens the logits alone would take 5 GB in fp32; here 200
    targets show the chunks.
    """
    sizes, linear = [], F.linear
    monkeypatch.setattr(
        F, "linear", lambda *arguments: sizes.append((out := linear(*arguments)).numel()) or out
    )
    layer = nn.Linear(4, 151_936, bias=False).requires_grad_(False)
    head = LMHead(lambda: layer, Shape())
    hidden = torch.randn(200, 4, requires_grad=True)
    head(hidden, torch.randint(151_936, (200,)), torch.ones(200)).backward()
    head.predict(hidden, torch.randint(151_936, (200,)))
    assert len(sizes) >= 8 and max(sizes) <= 2**23 and hidden.grad.abs().sum() > 0


def test_bfloat16_hidden_states_lose_nothing_but_their_own_rounding():
    torch.manual_seed(0)
    layer = nn.Linear(16, 300, bias=False).bfloat16()
    head = LMHead(lambda: layer, Shape())
    hidden, targets = torch.randn(45, 16).bfloat16(), torch.randint(300, (45,))
    exact = F.cross_entropy(
        F.linear(hidden.float(), layer.weight.float()), targets, reduction="sum"
    )
    assert head(hidden, targets, torch.ones(len(targets))).dtype == torch.float32
    # Logits have 8 bits
    torch.testing.assert_close(
        head(hidden, targets, torch.ones(len(targets))), exact, rtol=2e-3, atol=0
    )


def test_a_bfloat16_head_is_summed_over_the_chunks_in_fp32(small_chunks):
    torch.manual_seed(0)
    layer = nn.Linear(16, 300).bfloat16()
    hidden, targets = torch.randn(4500, 16).bfloat16(), torch.randint(300, (4500,))
    LMHead(lambda: layer, Shape())(hidden, targets, torch.ones(len(targets))).backward()
    exact = copy.deepcopy(layer).float()
    F.cross_entropy(exact(hidden.float()), targets, reduction="sum").backward()
    for ours, theirs in zip(layer.parameters(), exact.parameters()):
        # Gradients of logits have 8 bits
        assert (ours.grad - theirs.grad).norm() < 4e-3 * theirs.grad.norm()
