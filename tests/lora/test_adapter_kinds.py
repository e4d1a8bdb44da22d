"""Every kind of LoRA adapter that PEFT writes: PEFT = ours = merged, and written by us PEFT = ours
again.

`benchmarks/equalities.py` makes a table of the same differences.
"""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from lora import inject, load_adapter, merge, save_adapter
from lora.common.errors import UserError
from lora.layer import lora_layers
from tests.conftest import tiny_llama
from tests.lora.test_layer import TOKENS, randomise, tiny_gpt2

ATTENTION = ["q_proj", "v_proj", "down_proj"]
Q_V = ["q_proj", "v_proj"]
BIASES = {"attention_bias": True}
TIED = {"tie_word_embeddings": True}
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
    "alpha_pattern": {"v_proj": 5},
}
KINDS = {  # name -> (LoraConfig settings, changes to the Llama, or None for GPT-2)
    "all-linear": ({"target_modules": "all-linear"}, {}),
    "rsLoRA": ({"target_modules": ATTENTION, "use_rslora": True}, {}),
    "rank and alpha patterns": ({"target_modules": ATTENTION, **PATTERNS}, {}),
    "rsLoRA with patterns": ({"target_modules": ATTENTION, "use_rslora": True, **PATTERNS}, {}),
    "layers_to_transform": ({"target_modules": ATTENTION, "layers_to_transform": [1]}, {}),
    "DoRA": ({"target_modules": "all-linear", "use_dora": True}, {}),
    "DoRA with rsLoRA": ({"target_modules": ATTENTION, "use_dora": True, "use_rslora": True}, {}),
    "lora_bias": ({"target_modules": Q_V, "lora_bias": True}, BIASES),
    "bias lora_only": ({"target_modules": Q_V, "bias": "lora_only"}, BIASES),
    "bias all": ({"target_modules": Q_V, "bias": "all"}, {**BIASES, "mlp_bias": True}),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, {}),
    "embeddings, tied": ({"target_modules": ["q_proj", "embed_tokens"]}, TIED),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, {}),
    "head, tied": ({"target_modules": ["q_proj", "lm_head"]}, TIED),
    "modules_to_save": (
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
        {},
    ),
    "norms saved": ({"target_modules": ATTENTION, "modules_to_save": ["norm"]}, {}),
    "one of two tied saved": ({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, TIED),
    "GPT-2's Conv1D": ({"target_modules": "all-linear", "fan_in_fan_out": True}, None),
    "GPT-2's Conv1D, DoRA": (
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
        None,
    ),
}


def base(changes):
    if changes is None:
        return tiny_gpt2()
    torch.manual_seed(1)
    model = tiny_llama(**changes)
    with torch.no_grad():  # biases begin at zero, where a mistake in them could not be seen
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
    return model


def differences(settings, changes, folder):
    """Largest differences of the logits: PEFT and ours, merged by PEFT and by us, ours read back by
    PEFT.
    """
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, task_type="CAUSAL_LM", init_lora_weights=False, **settings
    )
    theirs = peft.get_peft_model(base(changes), config).eval()
    with torch.no_grad():  # what PEFT trains whole is another than the base's from now on
        for name, parameter in theirs.named_parameters():
            if "lora_" not in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(folder / "theirs")
    wanted = theirs(TOKENS).logits
    assert (wanted - base(changes)(TOKENS).logits).abs().max() > 1e-3  # it does something

    ours = base(changes)
    load_adapter(ours, folder / "theirs")
    loaded = ours(TOKENS).logits
    save_adapter(ours, folder / "ours")
    back = peft.PeftModel.from_pretrained(base(changes), folder / "ours").eval()(TOKENS).logits
    merge(ours)
    merged = ours(TOKENS).logits
    ours.save_pretrained(folder / "merged")
    written = AutoModelForCausalLM.from_pretrained(folder / "merged")(TOKENS).logits
    return {
        "PEFT -> ours": (loaded - wanted).abs().max().item(),
        "ours -> PEFT": (back - wanted).abs().max().item(),
        "merged": (merged - wanted).abs().max().item(),
        "merged, written and read": (written - wanted).abs().max().item(),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_peft_equals_ours_equals_merged(kind, tmp_path):
    for what, difference in differences(*KINDS[kind], tmp_path).items():
        # Fp32 sums in another order, of random factors that are larger than trained ones
        assert difference < 1e-5, what


def test_the_bias_of_a_head_is_untied_with_its_weight(tmp_path):
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = BertForMaskedLM(BertConfig(vocab_size=64, **shape)).eval()
    inject(model, r=4, target_modules=["decoder"])
    randomise(model)
    merge(model)
    model.save_pretrained(tmp_path)
    again, info = BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(again.eval()(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ATTENTION, "layers_to_transform": 0},
        {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["mlp"]},
    ],
    ids=str,
)
def test_targets_that_peft_leaves_out_need_no_factors(settings, tmp_path):
    for what, difference in differences(settings, {}, tmp_path).items():
        assert difference < 1e-5, what  # as above


@pytest.mark.parametrize(
    "settings",
    [
        {"rslora": True},
        {"dora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {"up_proj": 7}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"dora": True, "rslora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_what_we_train_peft_reads(settings, tmp_path):
    model = tiny_llama()
    inject(model, r=4, alpha=12, **settings)
    randomise(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=2e-6)


def test_ranks_and_alphas_by_pattern_are_those_of_peft():
    patterns = {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 3, "v_proj": 6},
        "alpha_pattern": {r"self_attn\.\w+": 5},
    }
    model = tiny_llama()
    inject(model, r=4, alpha=12, **patterns)
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **patterns)
    )
    peers = {
        name: layer
        for name, layer in theirs.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    ours = {
        name: (layer.r, layer.alpha, layer.scaling) for name, layer in lora_layers(model).items()
    }
    assert ours == {
        name: tuple(of["default"] for of in (p.r, p.lora_alpha, p.scaling))
        for name, p in peers.items()
    }


def test_the_gradients_of_dora_are_those_of_peft(tmp_path):
    """Its norm is a constant to the gradient."""
    model = tiny_llama()
    inject(model, r=4, alpha=12, dora=True)
    randomise(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    for one in (model, theirs):
        one(TOKENS).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".weight", ".default.weight").replace(
                "_vector", "_vector.default.weight"
            )
            other = theirs.base_model.model.get_parameter(name).grad
            # Sums in another order; what is left of large terms that cancel is off by more of its
            # own size.
            torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-8)


def test_biases_cannot_be_merged_where_the_base_has_none(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    model = tiny_llama()
    load_adapter(model, tmp_path)
    with pytest.raises(UserError, match="the base has no bias to fold"):
        merge(model)


@pytest.mark.parametrize(
    "targets", [["q_proj", "embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]]
)
def test_added_rows_under_factors_are_the_tied_heads_too(targets, tmp_path):
    """PEFT saves the base's own weight then, once; the head of its model shares it."""
    model = base({"tie_word_embeddings": True})
    model.resize_token_embeddings(2051)
    config = peft.LoraConfig(
        r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=targets
    )
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = base({"tie_word_embeddings": True})
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=0, atol=1e-5)
