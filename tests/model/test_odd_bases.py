"""Folders of bases that hold something odd: one line each, and no wait."""

import json
import os
import shutil

import pytest

from lora.common.errors import UserError
from lora.config.cross_checks import require_model_and_data
from tests.conftest import run

SHAPES = [  # keys of config.json
    {"num_attention_heads": 3},
    {"num_attention_heads": 0},
    {"hidden_size": "abc"},
    {"hidden_size": None},
    {"hidden_size": -1},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 1.5},
    {"num_labels": 10**9},
    {"text_config": {"num_hidden_layers": 10**9}},
    {"vocab_size": {}},
    {"rope_parameters": "abc"},
    {"hidden_act": "abc"},
    {"model_type": ["llama"]},
    {"model_type": "abc"},
    {"rms_norm_eps": "abc"},
]


def as_fifo(path):
    path.unlink()
    os.mkfifo(path)


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_text(text):
    return lambda path: path.write_text(text)


FILES = {
    "a list for a tokenizer": ("tokenizer.json", as_text("[]")),
    "a table for a tokenizer": ("tokenizer.json", as_text("{}")),
    "a tokenizer that is no JSON": ("tokenizer.json", as_text("x")),
    "a tokenizer without a length": ("tokenizer_config.json", as_text('{"model_max_length": "a"}')),
    "a stop token that is a text": ("generation_config.json", as_text('{"eos_token_id": "a"}')),
    "a stop token of 1.5": ("generation_config.json", as_text('{"eos_token_id": [1, 1.5]}')),
    "stop tokens that are no JSON": ("generation_config.json", as_text("x")),
    "a list for a configuration": ("config.json", as_text("[]")),
    "a configuration of NaN": ("config.json", as_text("NaN")),
    "a folder for a configuration": ("config.json", as_folder),
    "a pipe for a configuration": ("config.json", as_fifo),
    "a folder for weights": ("model.safetensors", as_folder),
    "a pipe for weights": ("model.safetensors", as_fifo),
    "a link for weights": (
        "model.safetensors",
        lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    ),
}


@pytest.fixture
def train(configure, tiny_base, tmp_path):
    """`train(init_from="")` begins a run on the base in tmp_path / "odd", as the scripts do."""
    shutil.copytree(tiny_base, tmp_path / "odd")

    def train(init_from=""):
        base = str(tmp_path / "odd")
        config = configure(True, task="lm", max_steps=1, base_model=base, init_from=init_from)
        require_model_and_data(config)
        run(config)

    return train


@pytest.mark.parametrize("init_from", ["", "scratch"])
@pytest.mark.parametrize("values", SHAPES, ids=str)
def test_an_odd_shape_is_one_line(train, tmp_path, values, init_from):
    path = tmp_path / "odd" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if init_from and values == {"num_attention_heads": 3}:
        pytest.skip("of random weights this is a model")
    with pytest.raises(UserError, match="base_model .*odd") as error:
        train(init_from)
    assert len(str(error.value)) < 600 and not str(error.value).endswith(":")


@pytest.mark.parametrize("name", FILES)
def test_an_odd_file_is_one_line(train, tmp_path, name):
    file, make = FILES[name]
    make(tmp_path / "odd" / file)
    with pytest.raises(UserError, match="/odd"):
        train()
