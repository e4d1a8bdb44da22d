"""Every family of decoders: packed = unpacked = transformers' own forward, gradients too; some are padded instead."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from lora.config import Config
from lora.data import Rows
from lora.model import load_task
from lora.render import NO_TOKEN, Row
from tests.test_data import assert_equal_gradients, gradients
from tests.test_model import save

SHAPE = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GROUPED = SHAPE | dict(num_key_value_heads=2)
GPT = dict(vocab_size=2048, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
WINDOW = 6  # shorter than the documents
PACKED = {
    "Llama": GROUPED,
    "Llama untied": GROUPED | dict(tie_word_embeddings=False),
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | dict(head_dim=8),
    "Mistral": GROUPED | dict(sliding_window=WINDOW),
    "Olmo2": GROUPED,
    "Gemma": GROUPED | dict(head_dim=8),
    "Gemma2": GROUPED | dict(head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "Gemma3": GROUPED | dict(head_dim=8, sliding_window=WINDOW),
    "Phi3": GROUPED | dict(pad_token_id=0),
    "Phi": SHAPE,
    "GPT2": GPT,
    "GPTNeoX": SHAPE,
    "Granite": GROUPED | dict(logits_scaling=8.0),
    "Cohere": GROUPED | dict(logit_scale=0.25),
    "GptOss": GROUPED | dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW),
    "Starcoder2": GROUPED,
}
PADDED = {
    "Bloom": dict(vocab_size=2048, hidden_size=32, n_layer=2, n_head=4),
    "CodeGen": GPT | dict(rotary_dim=4, n_inner=48),
    "GPTJ": GPT | dict(rotary_dim=4, n_inner=48),
    "Mpt": dict(vocab_size=2048, d_model=32, n_layers=2, n_heads=4),
    "Mamba": dict(vocab_size=2048, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def base(family, shape, folder):
    name = family.split()[0]
    model_class = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    return save(folder, model_class(config(**shape)))


def task_of(folder, kind):
    config = Config()
    config.model.base_model, config.model.task, config.data.max_length = str(folder), kind, 64
    return load_task(config, torch.float32)


def documents():
    """Three documents of 11, 3 and 14 tokens, with targets at two thirds of the places."""
    generator = torch.Generator().manual_seed(0)
    for length in (11, 3, 14):
        tokens = torch.randint(2048, (length,), generator=generator).tolist()
        yield Row(tokens, [token if i % 3 else NO_TOKEN for i, token in enumerate(tokens[1:])] + [NO_TOKEN]), 0


@pytest.mark.parametrize("family", [*PACKED, *PADDED])
def test_together_equals_apart_equals_transformers_own_forward(family, tmp_path):
    folder = base(family, (PACKED | PADDED)[family], tmp_path)
    task = task_of(folder, "lm")
    assert task.packed == (family in PACKED)
    rows = Rows.of(documents(), "lm")
    together = rows.batch(range(3), task.packed)
    apart = [rows.batch([i], task.packed) for i in range(3)]
    assert together.tokens.numel() == (28 if task.packed else 42)
    assert_equal_gradients(gradients(task, [together]), gradients(task, apart))

    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).train()
    loss = 0
    for row, _ in documents():
        logits = plain(torch.tensor([row.tokens]), use_cache=False).logits[0]
        loss = loss + F.cross_entropy(logits, torch.tensor(row.targets), ignore_index=NO_TOKEN, reduction="sum")
    (loss / together.num_targets).backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = {name.removeprefix("model."): g for name, g in gradients(task, [together]).items() if name.startswith("model.")}
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Qwen3", "Gemma2", "Mamba"])
def test_a_bare_backbone_scores_steps(family, tmp_path):
    task = task_of(base(family, (PACKED | PADDED)[family], tmp_path), "score")
    rows = Rows.of([(Row([5, 6, 7, 8], [float("nan"), 0.5, float("nan"), 1.0]), 0)], "score")
    loss, count = task(rows.batch([0], task.packed))
    assert count == 2 and loss.isfinite() and (family in PACKED) == task.packed
