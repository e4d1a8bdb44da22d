"""Every family: packed = unpacked = transformers' own forward, gradients too (some are padded
instead); LoRA and merging.

`benchmarks/equalities.py` makes a table of the same differences.
"""

import pytest
import torch
from torch import nn
import torch.nn.functional as F
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from lora import inject, load_adapter, merge, save_adapter
from lora.common.errors import UserError
from lora.config.schema import get_lora_config
from lora.data.batches import Rows
from lora.data.tokenise import NO_SCORE, NO_TOKEN, Row
from lora.layer import lora_layers
from lora.model.compatibility import find_incompatibility
from lora.model.load import load_task
from tests.conftest import run
from tests.data.test_batches import gradients
from tests.lora.test_layer import randomise
from tests.model.test_model import save

SHAPE = dict(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)
GROUPED = SHAPE | dict(num_key_value_heads=2)
GPT = dict(
    vocab_size=2048, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
)
WINDOW = 6  # shorter than the documents
PACKED = {
    "Llama": GROUPED,
    "Llama untied": GROUPED | dict(tie_word_embeddings=False),
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | dict(head_dim=8),
    "Mistral": GROUPED | dict(sliding_window=WINDOW),
    "Olmo2": GROUPED,
    "Gemma": GROUPED | dict(head_dim=8),
    "Gemma2": GROUPED
    | dict(
        head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "Gemma3": GROUPED | dict(head_dim=8, sliding_window=WINDOW),
    "Phi3": GROUPED | dict(pad_token_id=0),
    "Phi": SHAPE,
    "GPT2": GPT,
    "GPTNeoX": SHAPE,
    "Granite": GROUPED | dict(logits_scaling=8.0),
    "Cohere": GROUPED | dict(logit_scale=0.25),
    "GptOss": GROUPED
    | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW),
    "Starcoder2": GROUPED,
}
# Forced to be padded, so that padding stays tested when transformers learns to pack one of them
PADDED = {
    "Bloom": dict(vocab_size=2048, hidden_size=32, n_layer=2, n_head=4),
    "CodeGen": GPT | dict(rotary_dim=4, n_inner=48),
    "GPTJ": GPT | dict(rotary_dim=4, n_inner=48),
    "Mpt": dict(vocab_size=2048, d_model=32, n_layers=2, n_heads=4),
    "FalconH1": GROUPED
    | dict(
        mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, lm_head_multiplier=0.3
    ),
    "Mamba": dict(vocab_size=2048, hidden_size=32, num_hidden_layers=2, state_size=4),
}
# Their attention modules are not given the window, which packed attention therefore cannot keep.
WINDOW_IN_MASK = {
    "Llama4": GROUPED
    | dict(head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=WINDOW),
    "Phimoe": GROUPED | dict(num_local_experts=4, sliding_window=WINDOW),
    "Qwen2Moe": GROUPED
    | dict(moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4)
    | dict(num_experts_per_tok=2, use_sliding_window=True, sliding_window=WINDOW),
}


NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ENCODERS = {
    "Bert": SHAPE | NO_DROPOUT,
    "Roberta": SHAPE | NO_DROPOUT | dict(max_position_embeddings=66),
}
# What a position sees is in their masks only.
PADDED_ENCODERS = {
    "ModernBert": SHAPE
    | dict(pad_token_id=0, local_attention=WINDOW, cls_token_id=1, sep_token_id=2)
    | dict(bos_token_id=1, eos_token_id=2),
    "DebertaV2": SHAPE
    | NO_DROPOUT
    | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "DebertaV2 with a convolution": SHAPE
    | NO_DROPOUT
    | dict(relative_attention=True, pos_att_type=["p2c"], conv_kernel_size=3, conv_act="gelu"),
    "Deberta": SHAPE | NO_DROPOUT | dict(type_vocab_size=2),
    "MPNet": SHAPE | NO_DROPOUT | dict(max_position_embeddings=66),
}


def base(family, shape, folder):
    name = family.split()[0]
    endings = ("Model",) if name in ENCODERS | PADDED_ENCODERS else ("ForCausalLM", "LMHeadModel")
    model_class = next(
        getattr(transformers, name + end) for end in endings if hasattr(transformers, name + end)
    )
    text = "Text" if name in ("Gemma3", "Llama4") else ""
    config = getattr(transformers, f"{name}{text}Config")
    return save(folder, model_class(config(**shape)))


def task_of(folder, kind, packed=None):
    config = get_lora_config()
    config.model.base_model, config.model.task, config.data.max_length = str(folder), kind, 64
    return load_task(config, torch.float32, packed)


def documents():
    """Three documents of 11, 3 and 14 tokens, with targets at two thirds of the places."""
    generator = torch.Generator().manual_seed(0)
    for length in (11, 3, 14):
        tokens = torch.randint(2048, (length,), generator=generator).tolist()
        yield (
            Row(
                tokens,
                [token if i % 3 else NO_TOKEN for i, token in enumerate(tokens[1:])] + [NO_TOKEN],
            ),
            0,
        )


def packed_differences(family, folder, packed=None):
    """Of the gradients of full fine-tuning, relative to the whole gradient's norm: (documents
    together - apart, ours - transformers' own forward). An encoder's own forward has no loss to
    compare with. Rows are laid out as `load_task` chooses unless `packed` is given.
    """
    kind = "score" if family in ENCODERS else "lm"
    folder = base(family, (PACKED | PADDED | ENCODERS)[family], folder)
    task = task_of(folder, kind, packed)
    assert task.packed or family in PADDED
    rows = Rows.from_rows(documents() if kind == "lm" else scored(), kind)
    together = rows.batch(range(3), task.packed)
    apart = [rows.batch([i], task.packed) for i in range(3)]
    assert together.input_ids.numel() == (28 if task.packed else 42)
    ours = gradients(task, [together])
    between = largest_difference(ours, gradients(task, apart))
    if kind == "score":
        return between, "-"

    plain = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).train()
    loss = torch.zeros(())
    for row, _ in documents():
        logits = plain(torch.tensor([row.tokens]), use_cache=False).logits[0]
        loss = loss + F.cross_entropy(
            logits, torch.tensor(row.targets), ignore_index=NO_TOKEN, reduction="sum"
        )
    (loss / together.num_targets).backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return between, largest_difference(
        {name.removeprefix("model."): gradient for name, gradient in ours.items()}, theirs
    )


def scored():
    return [
        (Row(row.tokens, [0.5 if i % 3 else NO_SCORE for i in range(len(row.tokens))]), 0)
        for row, _ in documents()
    ]


def largest_difference(one, other):
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in one.values()))
    assert one.keys() == other.keys() and norm > 1e-3
    return max(((one[name] - other[name]).norm() / norm).item() for name in one)


@pytest.mark.parametrize(
    "family, packed",
    [(f, None) for f in (*PACKED, *PADDED, *ENCODERS)] + [(f, False) for f in PADDED],
)
def test_together_equals_apart_equals_transformers_own_forward(family, packed, tmp_path):
    between, to_theirs = packed_differences(family, tmp_path, packed)
    # Fp32 sums in another order
    assert between <= 1e-6 and (family in ENCODERS or to_theirs <= 1e-6)


@pytest.mark.parametrize("family", PADDED_ENCODERS)
def test_an_encoder_that_cannot_be_packed_sees_no_padding(family, tmp_path):
    folder = base(family, PADDED_ENCODERS[family], tmp_path)
    task = task_of(folder, "score")
    assert not task.packed and not task.causal
    rows = Rows.from_rows(scored(), "score")
    together = rows.batch(range(3), task.packed)
    apart = [rows.batch([i], task.packed) for i in range(3)]
    assert together.input_ids.numel() == 42
    assert largest_difference(gradients(task, [together]), gradients(task, apart)) <= 1e-6
    hidden = task.eval().hidden_states(together).view(3, 14, -1)[1, :3]
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = plain(together.input_ids[1:2, :3]).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", WINDOW_IN_MASK)
def test_a_window_that_only_the_mask_has_is_kept_as_rows_are_padded(family, tmp_path):
    folder = base(family, WINDOW_IN_MASK[family], tmp_path)
    task = task_of(folder, "score").eval()
    assert not task.packed
    row = Row(list(range(5, 19)), [0.5] * 14)
    hidden = task.hidden_states(Rows.from_rows([(row, 0)], "score").batch([0], task.packed))
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = plain(torch.tensor([row.tokens])).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Qwen3", "Gemma2", "Mamba"])
def test_a_bare_backbone_scores_steps(family, tmp_path):
    packed = family in PACKED
    task = task_of(base(family, (PACKED | PADDED)[family], tmp_path), "score", packed)
    rows = Rows.from_rows([(Row([5, 6, 7, 8], [float("nan"), 0.5, float("nan"), 1.0]), 0)], "score")
    loss, count = task(rows.batch([0], task.packed))
    assert count == 2 and loss.isfinite() and task.packed == packed


def lora_differences(family, folder, target_modules="all-linear"):
    """Of LoRA on a random base: (injected - base, merged - adapter, saved and loaded - adapter),
    largest of the hidden states or logits at the targets; and whether exactly the factors (and a
    scorer's head) got a gradient.
    """
    kind = "score" if family in ENCODERS else "lm"
    folder = base(family, (PACKED | PADDED | ENCODERS)[family], folder)
    task, other = task_of(folder, kind), task_of(folder, kind)
    batch = Rows.from_rows(scored(), "score").batch(range(3), task.packed)

    def said(task):
        hidden = task.target_hidden_states(batch)
        return (task.head.logits(hidden) if kind == "lm" else hidden).detach()

    task.eval(), other.eval()
    before = said(task)
    inject(task.model, 2, 6, target_modules=target_modules)
    injected = said(task)
    randomise(task.model)
    adapted = said(task)
    assert (adapted - before).abs().max() > 1e-3
    if kind == "lm":
        loss = task.head(
            task.target_hidden_states(batch),
            torch.zeros(len(batch.targets), dtype=torch.int64),
            torch.ones(len(batch.targets)),
        )
    else:
        loss = task(batch)[0]
    loss.backward()
    with_gradient = {
        name for name, p in task.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    wanted = {
        name
        for name, p in task.named_parameters()
        if ".lora_" in name or kind == "score" and name.startswith("head")
    }
    save_adapter(task.model, folder / "adapter")
    load_adapter(other.model, folder / "adapter")
    loaded = said(other)
    merge(task.model)
    assert not lora_layers(task.model)
    largest = [
        (one - two).abs().max().item()
        for one, two in ((injected, before), (said(task), adapted), (loaded, adapted))
    ]
    return *largest, with_gradient == wanted


@pytest.mark.parametrize(
    "family", [family for family in (*PACKED, *PADDED, *ENCODERS) if family != "Mamba"]
)
def test_lora_starts_at_the_base_trains_its_factors_alone_and_merges(family, tmp_path):
    injected, merged, loaded, factors_alone = lora_differences(family, tmp_path)
    assert injected == loaded == 0.0 and factors_alone
    assert merged < 1e-4  # fp32 sums in another order, of random factors larger than trained ones


@pytest.mark.parametrize("family", ["Llama4", "Phimoe"])
def test_routers_of_experts_that_return_more_than_products_are_left_out(family, tmp_path):
    model = task_of(base(family, WINDOW_IN_MASK[family], tmp_path), "score").model.eval()
    tokens = torch.arange(10)[None]
    expected = model(tokens).last_hidden_state
    assert not [name for name in inject(model, 2, 6) if "router" in name]
    assert torch.equal(model(tokens).last_hidden_state, expected)


def test_layers_of_which_only_the_weight_is_read_are_not_adapted(configure, tmp_path):
    """Mamba gives a kernel the weights of dt_proj and out_proj: LoRA there would do nothing."""
    folder = base("Mamba", PADDED["Mamba"], tmp_path / "mamba")
    settings = dict(
        base_model=str(folder), task="lm", train_data=["arithmetic:train:60"], lora_r=2, max_steps=2
    )
    with pytest.raises(UserError, match="'out_proj' matches no layer that LoRA adapts"):
        run(configure(True, target_modules=["out_proj"], **settings))
    run(configure(True, **settings))


def test_of_jamba_dt_proj_alone_is_not_adapted(tmp_path):
    shape = GROUPED | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4)
    model = task_of(base("Jamba", shape, tmp_path), "score").model
    adapted = {name.rpartition(".")[2] for name in inject(model, 2, 6)}
    assert {"in_proj", "x_proj", "out_proj", "q_proj"} <= adapted and "dt_proj" not in adapted


def test_falcon_mamba_trains_the_layer_that_it_calls(tmp_path):
    shape = dict(vocab_size=2048, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = task_of(base("FalconMamba", shape, tmp_path), "score").model
    assert {name.rpartition(".")[2] for name in inject(model, 2, 6)} == {"in_proj"}
    assert model.train()(torch.arange(10)[None]).last_hidden_state.isfinite().all()


def test_training_does_what_the_output_layer_does_or_the_model_is_refused(configure, tmp_path):
    folder = base("Llama", PACKED["Llama"], tmp_path)

    class Scaled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    task = load_task(configure(False, base_model=str(folder), task="lm"), torch.float32)
    assert find_incompatibility(task) is None
    task.model.lm_head.__class__ = Scaled
    assert "are not its hidden states times the weight" in find_incompatibility(task)
