"""The tokenizer splits text as the base's tokenizer.json does, and exports hold that very file."""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.evaluation.stop_tokens import stop_tokens
from lora.model.tokenizer_file import PROBE, save_tokenizer
from lora.model.weights import load_tokenizer
from tests.conftest import run, script


@pytest.fixture
def base_of_own_splits(tiny_base, tmp_path):
    """A base whose tokenizer.json splits text at vowels too, which transformers forgets."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    facts = json.loads((folder / "tokenizer.json").read_text())
    vowels = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated"}
    steps = [vowels | {"invert": False}, facts["pre_tokenizer"]]
    facts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_tokens_are_those_of_tokenizer_json(base_of_own_splits, capsys):
    """If transformers reads such a file itself one day, the note is all that goes."""
    expected = Tokenizer.from_file(str(base_of_own_splits / "tokenizer.json")).encode(PROBE)
    tokenizer = load_tokenizer(str(base_of_own_splits))
    assert tokenizer(PROBE, add_special_tokens=False).input_ids == expected.ids
    assert tokenizer.eos_token == AutoTokenizer.from_pretrained(base_of_own_splits).eos_token
    assert tokenizer.decode(expected.ids) == PROBE
    theirs = AutoTokenizer.from_pretrained(base_of_own_splits)(PROBE).input_ids
    assert ("tokenizer.json is used" in capsys.readouterr().out) == (theirs != expected.ids)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_exports_hold_the_bases_tokenizer_and_end_where_a_turn_does(
    base_of_own_splits, configure, monkeypatch, capsys, tmp_path, lora
):
    """The base has no chat template, so it is trained with ChatML; its own end is </s> alone."""
    (base_of_own_splits / "chat_template.jinja").unlink(missing_ok=True)
    added = {"modules_to_save": ["embed_tokens"]} if lora else {}
    config = configure(
        lora,
        task="lm",
        dtype="float32",
        base_model=str(base_of_own_splits),
        add_special_tokens=["<|im_start|>", "<|im_end|>"],
        **added,
    )
    artifact = run(config) / "final_artifact"
    if lora:
        flags = ["--adapter", artifact, "--output", tmp_path / "merged"]
        status, _, error = script(monkeypatch, capsys, ROOT / "merge.py", *flags)
        assert status == 0, error
        artifact = tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(artifact)
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == stop_tokens(model, tokenizer)
    # The model wants to say nothing but the end of a turn.
    bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    bias.data[end] = 1e4
    model.lm_head.bias = bias
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False)
    assert tokens[0].tolist() == [5, 6, 7, end]


def test_a_merged_folder_has_the_bases_own_file(base_of_own_splits, configure, monkeypatch, capsys):
    before = (base_of_own_splits / "tokenizer.json").read_bytes()
    config = configure(True, task="lm", dtype="float32", base_model=str(base_of_own_splits))
    folder = run(config)
    flags = ["--adapter", folder / "final_artifact", "--output", folder / "merged"]
    status, _, error = script(monkeypatch, capsys, ROOT / "merge.py", *flags)
    assert status == 0, error
    assert (folder / "final_artifact" / "tokenizer.json").read_bytes() == before
    assert (folder / "merged" / "tokenizer.json").read_bytes() == before


def test_an_added_token_that_the_vocabulary_had_already_is_saved(tiny_base, tmp_path):
    tokenizer = load_tokenizer(str(tiny_base))
    before = tokenizer("a banana").input_ids
    tokenizer.add_tokens(AddedToken("a", normalized=False))
    after = tokenizer("a banana").input_ids
    save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a banana").input_ids == after != before


@pytest.mark.parametrize("names", [["default", "tool_use"], ["rag", "tool_use"]])
def test_of_several_chat_templates_the_default_is_used(tiny_base, tmp_path, capsys, names):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": f"{name}!"} for name in names]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if "default" in names:
        assert load_tokenizer(str(folder)).chat_template == "default!"
        assert "(default, tool_use), default is used" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="rag, tool_use; expected one called default"):
            load_tokenizer(str(folder))
