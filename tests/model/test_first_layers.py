"""score_layer N: the scorer of a base's first N layers, which computes no more than these."""

import json

import pytest
from safetensors.torch import load_file
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoTokenizer,
    GPTNeoConfig,
    GPTNeoModel,
)

import lora
from lora.common.errors import UserError
from lora.config.command_line import read_command_line
from lora.config.earlier_stage import require_stage
from lora.config.schema import get_lora_config
from lora.data.batches import Rows
from lora.model.load import load_task
from lora.model.load_sharded import build_empty_task
from lora.target_modules import decoder_layers
import merge
from tests.conftest import run, script
from tests.model.test_families import ENCODERS, PACKED, PADDED, base, scored
from tests.model.test_model import save
from tests.training.test_resume import metrics

NAMED = ["--base_model=embedded", "--train_data=arithmetic:train:9", "--lora_r=4"]


def first_layer_of(folder, target):
    """A base in `target` that has only the first layer of the one in `folder`."""
    model = AutoModel.from_pretrained(folder, num_hidden_layers=1)
    if len(getattr(model.config, "layer_types", None) or []) > 1:
        model.config.layer_types = model.config.layer_types[:1]
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def hidden_states(folder, score_layer, **settings):
    config = get_lora_config()
    config.model.base_model, config.model.task = str(folder), "score"
    config.model.score_layer, config.data.max_length = score_layer, 64
    for name, value in settings.items():
        setattr(config, name, value)
    task = load_task(config, torch.float32).eval()
    with torch.no_grad():
        # Not scores: Mamba draws its layers before they are read, and the head after them.
        batch = Rows.from_rows(scored(), "score").batch(range(3), task.packed)
        return task.target_hidden_states(batch)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("Llama", {}),
        ("Llama", {"load_in_4bit": True, "device": "cpu"}),
        *((name, {}) for name in ("Gemma2", "GptOss", "GPT2", "Mamba", "Bert")),
    ],
    ids=str,
)
def test_the_head_reads_what_it_does_on_a_base_of_the_first_layers(family, settings, tmp_path):
    shape = (PACKED | PADDED | ENCODERS)[family]
    folder = base(family, shape, tmp_path / "base")
    one = first_layer_of(folder, tmp_path / "one")
    assert torch.equal(hidden_states(folder, 1, **settings), hidden_states(one, None, **settings))
    assert torch.equal(
        hidden_states(folder, 2, **settings), hidden_states(folder, None, **settings)
    )
    assert not torch.equal(
        hidden_states(folder, 1, **settings), hidden_states(folder, 2, **settings)
    )
    with pytest.raises(UserError, match="score_layer = 3: .* has 2 layers; expected .* 1 to 2"):
        hidden_states(folder, 3, **settings)


@pytest.mark.parametrize(
    "lora, settings", [(True, {}), (True, {"lora_r": 0}), (False, {})], ids=["lora", "head", "full"]
)
def test_a_run_is_that_of_a_base_of_the_first_layers_and_its_artifact_scores_alike(
    configure, tiny_base, monkeypatch, capsys, tmp_path, lora, settings
):
    one = first_layer_of(tiny_base, tmp_path / "one")
    settings = settings | dict(max_steps=6)
    cut = run(configure(lora, "cut", score_layer=1, **settings))
    said = capsys.readouterr().out
    assert metrics(cut) == metrics(run(configure(lora, "whole", base_model=str(one), **settings)))
    assert "merge.py" not in said

    # Of the layers above nothing was trained, hashed or written.
    artifact = cut / "final_artifact"
    for path in (artifact, tmp_path / "whole" / "final_artifact"):
        names = [name for file in path.glob("*.safetensors") for name in load_file(file)]
        assert "layers.1." not in "".join(names)
    sums = [json.loads((tmp_path / name / "baseline_checksums.json").read_text()) for name in
            ("cut", "whole")]  # fmt: skip
    assert sums[0]["frozen_sha256"] == sums[1]["frozen_sha256"]
    if not lora:
        assert json.loads((artifact / "config.json").read_text())["num_hidden_layers"] == 1

    best = json.loads((cut / "logs" / "final_results.json").read_text())["best"]
    for folder in (artifact, cut / "checkpoints" / f"checkpoint_step_{best['step']}"):
        output = tmp_path / "numbers.json"
        flags = ["--checkpoint", folder, "--output", output]
        status, _, errors = script(monkeypatch, capsys, "eval.py", *flags)
        assert status == 0, errors
        # Other micro-batches
        assert json.loads(output.read_text())["mse"] == pytest.approx(best["mse"], abs=1e-6)


def test_what_cannot_be_done_with_such_a_scorer_is_refused(configure, tiny_base, tmp_path):
    folder = run(configure(True, score_layer=1, max_steps=2, dtype="float32"))
    artifact = folder / "final_artifact"
    merged = tmp_path / "merged"
    arguments = merge.read_arguments(["--adapter", str(artifact), "--output", str(merged)])
    with pytest.raises(UserError, match="reads layer 1, and only whole models .*; use it unmerged"):
        merge.main(arguments)
    assert not merged.exists()
    # An adapter for one layer on a model of one layer, from Python too
    assert len(decoder_layers(lora.load_and_verify_adapter(tiny_base, artifact))) == 1

    settings = configure(True, "next", init_from=str(artifact), dtype="float32", max_steps=1)
    with pytest.raises(UserError, match="it was trained with --score_layer 1; add that"):
        require_stage(settings)
    settings.score_layer = 1
    require_stage(settings)
    begun = metrics(run(settings))[0]["val/loss"]
    assert begun == pytest.approx(metrics(folder)[-1]["val/loss"], abs=1e-6)  # other shapes

    checkpoint = folder / "checkpoints" / "checkpoint_step_2"
    with pytest.raises(UserError, match=r"score_layer \(1 -> 2\); --allow_change"):
        flags = [f"--resume_from={checkpoint}", "--score_layer=2"]
        read_command_line(flags, get_lora_config(), "", "")


def test_a_language_model_and_a_base_with_shared_layers_have_no_such_layer(tmp_path):
    with pytest.raises(UserError, match="score_layer: a language model is read at its last layer"):
        read_command_line([*NAMED, "--score_layer=1"], get_lora_config(), "", "")
    for number in ("0", "-1"):
        with pytest.raises(UserError, match="score_layer = .*: expected an integer >= 1"):
            flags = [*NAMED, "--task=score", f"--score_layer={number}"]
            read_command_line(flags, get_lora_config(), "", "")
    shape = AlbertConfig(
        vocab_size=2048, embedding_size=16, hidden_size=32, num_attention_heads=4,
        intermediate_size=48, num_hidden_layers=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="albert does not keep its layers in one list; leave"):
        hidden_states(save(tmp_path, AlbertModel(shape)), 1)


def test_a_family_whose_configuration_lists_its_layers_otherwise_is_refused(tmp_path):
    shape = GPTNeoConfig(
        vocab_size=2048, hidden_size=32, num_heads=4, num_layers=2, intermediate_size=48,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    with pytest.raises(UserError, match="a gpt_neo of fewer layers needs another conf.*; leave"):
        hidden_states(save(tmp_path, GPTNeoModel(shape)), 1)


def test_the_head_of_a_scorer_is_not_put_on_another_of_its_layers(configure, tmp_path):
    scorer = str(run(configure(False, max_steps=1)) / "final_artifact")

    def first_weights(**settings):
        config = configure(True, base_model=scorer, **settings)
        return load_task(config, torch.float32).head.layers[0].weight

    assert torch.equal(first_weights(), first_weights(score_layer=2))  # its last layer
    assert not torch.equal(first_weights(), first_weights(score_layer=1))


def test_processes_that_read_no_file_have_the_same_layers(configure):
    config = configure(False, score_layer=1)
    with torch.device("meta"):
        empty = build_empty_task(config, True)
    task = load_task(config, torch.float32)
    assert empty.state_dict().keys() == task.state_dict().keys()
    assert empty.model.config.num_hidden_layers == 1
