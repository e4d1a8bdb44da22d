"""Every base is tried on two short documents before it is trained: what would be silently wrong is refused."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lora.config import Config
from lora.errors import UserError
from lora.model import EMBEDDED, choose_device, load_task, locate

SHAPE = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def save(folder, model):
    """`model` with large random weights, as a base in `folder`."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return folder


def load(folder, task, max_length=64):
    config = Config()
    config.model.base_model, config.model.task, config.data.max_length = str(folder), task, max_length
    return load_task(config, torch.float32)


@pytest.mark.parametrize(
    "model", [BertForMaskedLM(BertConfig(**SHAPE)), RobertaForMaskedLM(RobertaConfig(**SHAPE, pad_token_id=1))]
)
def test_encoders_saved_with_another_head_load_for_scoring_and_not_for_language_modelling(model, tmp_path):
    folder = save(tmp_path, model)
    assert not load(folder, "score").causal
    with pytest.raises(UserError, match="an encoder sees what it would have to predict"):
        load(folder, "lm")


@pytest.mark.parametrize(
    "model, task, message",
    [
        (MPNetModel(MPNetConfig(**SHAPE)), "score", "see each other|attention modules say|ends in"),
    ],
    ids=["mpnet"],
)
def test_a_model_that_would_train_silently_wrong_is_refused(model, task, message, tmp_path):
    with pytest.raises(UserError, match=f"is not supported: .*({message})") as error:
        load(save(tmp_path, model), task)
    assert "\n" not in str(error.value)


def test_the_positions_of_roberta_begin_after_its_padding_index(tmp_path):
    folder = save(tmp_path, RobertaForMaskedLM(RobertaConfig(**SHAPE, pad_token_id=1, max_position_embeddings=66)))
    with pytest.raises(UserError, match="has 64 positions; add --max_length 64"):
        load(folder, "score", 66)
    load(folder, "score", 64)


def test_a_base_with_a_missing_tensor_or_a_damaged_file_is_refused(tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    tensors = load_file(tiny_base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no weights, or of another shape, for (model\.)?layers.1.mlp.up_proj.weight"):
        load(tmp_path, "lm")
    (tmp_path / "model.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match=f"base_model {tmp_path}: "):
        load(tmp_path, "score")


@pytest.mark.parametrize("name", ["/no/such", "./no", "~/no", "no/such/folder"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name):
    with pytest.raises(UserError, match="no such folder"):
        locate(name)


def test_the_device_is_what_was_asked_for_or_an_error():
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device cuda is not available here; there is .*cpu"):
            choose_device("cuda")
    assert Path(locate("embedded")[0]) == EMBEDDED
