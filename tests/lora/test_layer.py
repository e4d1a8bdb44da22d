"""LoRA's identities: injected = base, merged = unmerged, frozen stays frozen."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lora import inject, merge
from lora.common.errors import UserError
from lora.layer import lora_layers
from tests.conftest import tiny_llama

TOKENS = torch.arange(40).view(2, 20)


def tiny_gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()


def randomise(model):
    """Give B values, as training would."""
    torch.manual_seed(2)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_injected_equals_base_bitwise(make):
    model = make()
    before = model(TOKENS).logits
    inject(model, r=4)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merged_equals_unmerged_and_leaves_no_wrapper(make):
    model = make()
    names = [name for name, _ in model.named_parameters()]
    inject(model, r=4, alpha=16)
    randomise(model)
    unmerged = model(TOKENS).logits
    assert not torch.equal(unmerged, make()(TOKENS).logits)
    merge(model)
    assert [name for name, _ in model.named_parameters()] == names
    # Sums in another order
    torch.testing.assert_close(model(TOKENS).logits, unmerged, rtol=0, atol=1e-5)


def test_training_changes_the_factors_and_no_frozen_tensor():
    model = tiny_llama()
    inject(model, r=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_the_seed_decides_a_and_b_is_zero():
    models = [tiny_llama() for _ in range(2)]
    for model in models:
        torch.manual_seed(7)
        inject(model, r=4)
    for one, other in zip(*(lora_layers(model).values() for model in models)):
        assert (
            torch.equal(one.lora_A.weight, other.lora_A.weight)
            and one.lora_A.weight.dtype == torch.float32
        )
        assert not one.lora_B.weight.any()


def test_dropout_acts_in_training_only():
    model = tiny_llama()
    inject(model, r=4, dropout=0.5)
    randomise(model)
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("all-linear", 14),  # 7 in each of 2 layers; the head is left out
        (["q_proj", "v_proj"], 4),
        (["self_attn.q_proj"], 2),
        ([r"model\.layers\.1\..*_proj"], 7),
        (["layers.0.mlp.up_proj", "q_proj"], 3),
    ],
)
def test_targets_are_endings_or_whole_name_patterns(targets, expected):
    assert len(inject(tiny_llama(), r=4, target_modules=targets)) == expected
    # The same names hold on the bare backbone of a scorer, whose modules lack the "model." in
    # front.
    assert len(inject(tiny_llama().model, r=4, target_modules=targets)) == expected


def test_a_target_that_matches_nothing_is_an_error_that_lists_what_there_is():
    with pytest.raises(
        UserError,
        match="'nope_proj' matches no layer that LoRA adapts; there are down_proj, gate_proj",
    ):
        inject(tiny_llama(), target_modules=["q_proj", "nope_proj"])


def test_injecting_twice_is_an_error():
    model = tiny_llama()
    inject(model, r=4, target_modules="q_proj")
    with pytest.raises(ValueError, match="has LoRA layers already"):
        inject(model, r=4, target_modules="v_proj")


def test_a_rank_above_every_layer_is_an_error():
    with pytest.raises(UserError, match=r"lora_r = 33: expected 1..32, for which"):
        inject(tiny_llama(), r=33)
    # K_proj is 32 x 16; PEFT has no limit, and one layer of 32 x 1 limits nothing
    inject(tiny_llama(), r=17)


def test_a_pattern_must_be_one_and_match_a_layer():
    with pytest.raises(
        UserError, match="'q_prj' matches none of the layers, such as model.layers.0"
    ):
        inject(tiny_llama(), r=4, alpha_pattern={"q_prj": 2})
    with pytest.raises(UserError, match="'q_proj\\(' is no regular expression"):
        inject(tiny_llama(), r=4, rank_pattern={"q_proj(": 2})


class SharedHead(torch.nn.Module):
    """As nanoGPT: the head has the embedding's weight, and the model no get_output_embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 8)
        self.head = torch.nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_merging_leaves_what_shares_a_weight_with_a_layer_as_it_is():
    torch.manual_seed(0)
    model = SharedHead()
    embedding = model.embedding.weight.detach().clone()
    inject(model, r=4)
    randomise(model)
    adapted = model(torch.arange(12)).detach()
    merge(model)
    assert torch.equal(model.embedding.weight, embedding)
    # Sums in another order
    torch.testing.assert_close(model(torch.arange(12)), adapted, rtol=0, atol=1e-5)


def test_a_layer_whose_weight_torch_reads_itself_is_refused():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(UserError, match="MultiheadAttention computes with its weight itself"):
        inject(layer, r=4)


def test_dora_keeps_a_row_of_zeros():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].weight.data[1] = 0
    x = torch.randn(3, 4)
    before = model(x)
    inject(model, r=2, alpha=2, dora=True)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)  # each length is divided out
