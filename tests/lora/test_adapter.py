"""PEFT = ours, in both directions; an adapter that would have no effect cannot be loaded."""

import json

import peft
import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForSequenceClassification

from lora import inject, load_adapter, merge, save_adapter
from lora.common.errors import UserError
from tests.conftest import tiny_llama
from tests.lora.test_layer import TOKENS, randomise, tiny_gpt2


@pytest.fixture
def ours(tmp_path):
    """(model with a random adapter, the folder it is saved in)."""
    model = tiny_llama()
    inject(model, r=4, alpha=12)
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    return model, tmp_path / "ours"


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("targets", ["all-linear", [r".*\.1\..*(mlp).*"]])
def test_peft_loads_ours_with_equal_logits(make, targets, tmp_path):
    model = make()
    inject(model, r=4, alpha=12, target_modules=targets)
    randomise(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-6)


def test_peft_loads_the_adapter_of_a_scorer_onto_the_causal_model(tmp_path):
    scorer = tiny_llama().model
    inject(scorer, r=4)
    randomise(scorer)
    save_adapter(scorer, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).base_model.model.model.eval()
    hidden = scorer(TOKENS).last_hidden_state
    torch.testing.assert_close(theirs(TOKENS).last_hidden_state, hidden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_we_load_pefts_with_equal_logits(make, task_type, tmp_path):
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules="all-linear",
        task_type=task_type,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(make(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = make()
    load_adapter(model, tmp_path)
    # The scale of 3 is multiplied in before B, not after it as PEFT does, and rounds otherwise.
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=0, atol=3e-6)


def test_an_adapter_made_on_the_bare_backbone_finds_its_place_in_the_causal_model(tmp_path):
    """PEFT would warn and change nothing."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="FEATURE_EXTRACTION", init_lora_weights=False
    )
    theirs = peft.get_peft_model(tiny_llama().model, config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(
        model.model(TOKENS).last_hidden_state, theirs(TOKENS).last_hidden_state, rtol=0, atol=1e-6
    )  # fmt: skip


def test_an_encoders_adapter_goes_both_ways(tmp_path):
    def make():
        torch.manual_seed(1)
        return BertModel(
            BertConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        ).eval()

    model = make()
    inject(model, r=4)
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    hidden = model(TOKENS).last_hidden_state
    torch.testing.assert_close(theirs(TOKENS).last_hidden_state, hidden, rtol=0, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = make()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(TOKENS).last_hidden_state, hidden, rtol=0, atol=1e-6)


def test_a_model_of_the_users_own_goes_both_ways(tmp_path):
    def make():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))

    model, x = make(), torch.randn(3, 6)
    assert inject(model, r=2) == ["0", "2"]
    randomise(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(make(), tmp_path)(x), model(x), rtol=0, atol=1e-6
    )
    again = make()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_peft_reads_ours_onto_a_classifier(tmp_path):
    shape = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )

    def make():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**shape, pad_token_id=0)).eval()

    model, x = make(), torch.arange(1, 12)[None]
    with pytest.raises(UserError, match="head of LlamaForSequenceClassification .*; add: score"):
        inject(model, r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    inject(model, r=4, modules_to_save=["score"])
    randomise(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(theirs(x).logits, model(x).logits, rtol=0, atol=1e-6)


def test_saving_what_was_loaded_gives_the_same_bytes(ours, tmp_path):
    model = tiny_llama()
    load_adapter(model, ours[1])
    save_adapter(model, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (ours[1] / name).read_bytes()


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop(f"{Q}.lora_B.weight"),
            "not a pair of LoRA factors: model.layers.0.self_attn.q_proj",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}),
            "use_dora = False .* does not match .*q_proj",
        ),
        (
            lambda t: [t.update({k.replace("q_proj", "z_proj"): t.pop(k)}) for k in list(t)],
            "no such layer .* in the model: .*z_proj",
        ),
        (lambda t: t.clear(), "there are none in the file"),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(5, 4)}),
            r"q_proj.lora_B.weight is \[5, 4\], its place is \[32, 4\]",
        ),
        (
            lambda t: [t.pop(f"{Q}.lora_{x}.weight") for x in "AB"],
            "no tensors for what its target_modules name: .*q_proj",
        ),
        (
            lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")),
            "not finite numbers: .*q_proj.lora_A.weight",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}),
            "not finite numbers: .*q_proj",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.tensor(1.0)}),
            "not a pair of LoRA factors: .*q_proj",
        ),
        (
            lambda t: t.update(
                {
                    f"{Q}.lora_{x}.weight": torch.ones(shape)
                    for x, shape in (("A", (5, 32)), ("B", (32, 5)))
                }
            ),
            "the rank differs from r and rank_pattern for: .*q_proj",
        ),
        (
            lambda t: t.update(
                {k.replace("model.model.model.", "model.model."): v + 1 for k, v in t.items()}
            ),
            "two spellings of one layer",
        ),
        (
            lambda t: t.update({k.replace("base_model.model.", ""): v + 1 for k, v in t.items()}),
            "two tensors of one name",
        ),
        (
            lambda t: t.update(
                {
                    k.replace("layers.0.self_attn.q_proj", "embed_tokens"): v + 1
                    for k, v in t.items()
                    if Q in k
                }
            ),
            "do not belong on a Embedding",
        ),
    ],
)
def test_a_tensor_without_a_place_or_of_another_shape_is_an_error(ours, change, message):
    change_tensors(ours[1], change)
    with pytest.raises(UserError, match=message):
        load_adapter(tiny_llama(), ours[1])


def test_an_injected_layer_without_tensors_is_an_error(ours):
    change_tensors(ours[1], lambda t: [t.pop(f"{Q}.lora_{x}.weight") for x in "AB"])
    model = tiny_llama()
    inject(model, r=4)
    with pytest.raises(UserError, match="no tensors for .*: model.layers.0.self_attn.q_proj"):
        load_adapter(model, ours[1])


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_qalora", True),
        ("target_parameters", ["experts.down_proj"]),
        ("peft_type", "IA3"),
        ("layer_replication", [[0, 2]]),
    ],
)
def test_what_we_would_have_to_ignore_is_refused(ours, key, value):
    path = ours[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{key} = .* is not supported"):
        load_adapter(tiny_llama(), ours[1])


@pytest.mark.parametrize(
    "key, value", [("use_dora", True), ("lora_bias", True), ("init_lora_weights", "pissa_niter_4")]
)
def test_a_config_that_its_tensors_belie_or_that_needs_another_base_is_refused(ours, key, value):
    path = ours[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(
        UserError, match=f"{key} = {value}|{key} = '{value}': .* wrong on any other"
    ):
        load_adapter(tiny_llama(), ours[1])


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": 0},
        {"lora_alpha": float("nan")},
        {"r": 0},
        {"lora_dropout": "0.1"},
        {"use_rslora": "false"},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": "3"}},
        {"alpha_pattern": {"(([a-z_.0-9])+)+X": 2}},  # these two would take for ever
        {"rank_pattern": {".*.*.*.*.*x": 2}},
        {"alpha_pattern": {"(": 2}},
    ],
    ids=str,
)
def test_a_config_that_no_lora_can_have_is_one_line(ours, values):
    path = ours[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(
        UserError, match=f"invalid values: {next(iter(values))}|no regular expression"
    ):
        load_adapter(tiny_llama(), ours[1])
    path.write_text("[]")
    with pytest.raises(UserError, match="expected a table of keys, found a list"):
        load_adapter(tiny_llama(), ours[1])


def test_modules_to_save_that_peft_writes_three_times_are_read(tmp_path):
    """PEFT does so for embeddings that were given rows, and for biases if all are trained."""
    settings = {
        "target_modules": ["c_attn"],
        "modules_to_save": ["lm_head", "ln_f"],
        "bias": "all",
        "fan_in_fan_out": True,
    }
    model = tiny_gpt2()
    model.resize_token_embeddings(model.config.vocab_size + 3)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    )
    with torch.no_grad():
        for parameter in theirs.eval().parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(
        "original_module" in name for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    again = tiny_gpt2()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, theirs(TOKENS).logits, rtol=0, atol=1e-5)


def test_dora_over_embeddings_is_refused(tmp_path):
    settings = {
        "target_modules": ["q_proj", "embed_tokens"],
        "use_dora": True,
        "task_type": "CAUSAL_LM",
    }
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, **settings)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a pair of LoRA factors: model.embed_tokens"):
        load_adapter(tiny_llama(), tmp_path)


def test_a_truncated_file_is_an_error(ours):
    path = ours[1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="adapter_model.safetensors: damaged"):
        load_adapter(tiny_llama(), ours[1])


def test_a_model_without_an_adapter_is_not_saved(tmp_path):
    model = tiny_llama()
    inject(model, r=2)
    merge(model)
    with pytest.raises(UserError, match="no LoRA layers"):
        save_adapter(model, tmp_path)
