"""final_artifact/ is what PEFT and transformers take it for, and nothing beside the weights gets
lost on the way to the evaluation, the merged model and the next stage. Version 1 is still read.
"""

import json
import shutil

import peft
import pytest
from safetensors.torch import load_file
import torch
from transformers import AutoModelForCausalLM

import eval as evaluation
from lora import verify_artifact
from lora.common.checksums import write_checksums
from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.config.command_line import read_command_line
from lora.config.schema import get_lora_config
from lora.tools.finished_run import FinishedRun
from lora.tools.report import page
import merge as merging
from tests.conftest import run, script
from tests.training.test_resume import metrics

TOKENS = torch.arange(30)[None]
LM = dict(task="lm", dtype="float32")
ADDED = dict(add_special_tokens=["<step>"], modules_to_save=["embed_tokens"])


def loaded(artifact):
    """The model as eval.py loads it."""
    arguments, config = evaluation.read_arguments(["--checkpoint", str(artifact)])
    return evaluation.load(arguments.checkpoint, config, torch.device("cpu")).model.eval()


def losses(folder):
    return [line["val/loss"] for line in metrics(folder) if "val/loss" in line]


def best_loss(folder):
    return json.loads((folder / "logs" / "final_results.json").read_text())["best"]["loss"]


def eval_loss(capsys, monkeypatch, tmp_path, artifact):
    flags = ["--checkpoint", artifact, "--output", tmp_path / "numbers.json"]
    status, _, error = script(monkeypatch, capsys, ROOT / "eval.py", *flags)
    assert status == 0, error
    return json.loads((tmp_path / "numbers.json").read_text())["loss"]


def as_version_1(artifact):
    """Change an artifact of version 2 into the layout that plainlora 0.2 wrote."""
    metadata = json.loads((artifact / "metadata.json").read_text())
    del metadata["format_version"]
    metadata["artifact_version"] = 1
    (artifact / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    names = ["config.json", "generation_config.json", "model.safetensors"]
    inside = artifact / "backbone"
    if (artifact / "adapter_config.json").is_file():
        names, inside = (
            ["adapter_config.json", "adapter_model.safetensors"],
            artifact / "lora_adapter",
        )
    inside.mkdir()
    for name in names:
        if (artifact / name).is_file():
            (artifact / name).rename(inside / name)
    if inside.name == "backbone":
        for path in artifact.glob("tokenizer*"):
            shutil.copy(path, inside)
    (artifact / "checksums.json").unlink()
    write_checksums(artifact)


# --------------------------------------------------------------- what other tools make of it


def test_peft_takes_the_folder_of_an_adapter(configure, tiny_base):
    artifact = run(configure(True, **LM)) / "final_artifact"
    config = peft.PeftConfig.from_pretrained(artifact)
    assert (config.r, config.base_model_name_or_path) == (16, str(tiny_base))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), artifact
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    ours = loaded(artifact)(TOKENS).logits
    # fp32, sums in another order
    torch.testing.assert_close(theirs.eval()(TOKENS).logits, ours, rtol=0, atol=1e-5)
    assert (base(TOKENS).logits - ours).abs().max() > 0.1
    assert not [path for path in artifact.iterdir() if path.is_dir()]


def test_transformers_takes_the_folder_of_a_whole_model(configure):
    artifact = run(configure(False, **LM)) / "final_artifact"
    theirs, info = AutoModelForCausalLM.from_pretrained(artifact, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = loaded(artifact)(TOKENS).logits
    torch.testing.assert_close(theirs.eval()(TOKENS).logits, ours, rtol=0, atol=1e-5)
    assert not [path for path in artifact.iterdir() if path.is_dir()]
    # The only weights, as vLLM reads all of a folder
    assert [path.name for path in artifact.glob("*.safetensors")] == ["model.safetensors"]


# ------------------------------------------------------------------------ what does not get lost


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_scorers_head_goes_along(configure, monkeypatch, capsys, tmp_path, lora):
    values = dict(add_special_tokens=["<step>"], dtype="float32")
    one = run(configure(lora, "one", max_steps=3, **values | (ADDED if lora else {})))
    artifact = one / "final_artifact"
    assert (artifact / "mlp_head.safetensors").is_file()
    of_eval = eval_loss(capsys, monkeypatch, tmp_path, artifact)
    assert of_eval == pytest.approx(best_loss(one), abs=1e-6)
    stage = dict(max_steps=1, init_from=str(artifact), **values | (ADDED if lora else {}))
    assert losses(run(configure(lora, "two", **stage)))[0] == pytest.approx(of_eval, abs=1e-6)
    if lora:
        merged = tmp_path / "merged"
        flags = ["--adapter", str(artifact), "--output", str(merged)]
        merging.main(merging.read_arguments(flags))
        of_merged = eval_loss(capsys, monkeypatch, tmp_path, merged)
        assert of_merged == pytest.approx(of_eval, abs=1e-6)
    else:  # a whole model may be the base of another run
        begun = run(configure(True, "three", base_model=str(artifact), max_steps=1))
        assert losses(begun)[0] == pytest.approx(of_eval, abs=1e-6)


def test_an_artifact_is_never_taken_for_an_adapter_or_a_model_alone(configure, tiny_base, tmp_path):
    artifact = run(configure(True, "one", max_steps=1)) / "final_artifact"
    flags = ["--adapter", str(artifact), "--output", str(tmp_path / "m")]
    for name in ("metadata.json", "training_config.toml"):
        copy = shutil.copytree(artifact, tmp_path / f"without {name}")
        (copy / name).unlink()
        flags[1] = str(copy)
        with pytest.raises(UserError, match=f"'{name}': missing|no training_config.toml"):
            merging.main(merging.read_arguments([*flags, "--base_model", str(tiny_base)]))
    metadata = json.loads((artifact / "metadata.json").read_text())
    assert metadata["format_version"] == 2 and metadata["artifact_version"] is None
    (artifact / "metadata.json").write_text(json.dumps(metadata | {"format_version": 3}))
    (artifact / "checksums.json").unlink()
    flags[1] = str(artifact)
    with pytest.raises(UserError, match="format_version 3; expected 2 at most; a newer plainlora"):
        merging.main(merging.read_arguments(flags))


def test_an_adapter_is_no_base(configure, monkeypatch, capsys):
    artifact = run(configure(True, "one", max_steps=1)) / "final_artifact"
    flags = ["--base_model", artifact, "--task=score", "--train_data=arithmetic:train:9"]
    status, _, error = script(monkeypatch, capsys, ROOT / "train_lora.py", *flags)
    assert status == 2 and "an adapter, no whole model; merge it (merge.py), or begin" in error


def test_others_adapters_may_have_metadata_and_checksums_of_their_own(
    configure, tiny_base, tmp_path
):
    """As an older system wrote them, with all files at the top."""
    made = run(configure(True, "one", **LM, max_steps=1)) / "final_artifact"
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(made / name, theirs)
    (theirs / "metadata.json").write_text('{"artifact_version": "v1.1.0", "base_model_id": "x"}')
    (theirs / "checksums.json").write_text('{"adapter_model.safetensors": "0a1b"}')
    stage = configure(True, "two", **LM, max_steps=1, init_from=str(theirs))
    stage.save(tmp_path / "run.toml")
    read_command_line(["--config", str(tmp_path / "run.toml")], get_lora_config(), "", "")
    assert losses(run(stage))[0] == pytest.approx(losses(made.parent)[-1], abs=1e-6)
    flags = ["--adapter", str(theirs), "--output", str(tmp_path / "m")]
    with pytest.raises(UserError, match="does not say which base it is for"):
        merging.main(merging.read_arguments(flags))
    merging.main(merging.read_arguments([*flags, "--base_model", str(tiny_base)]))


# --------------------------------------------------------------------------------- version 1


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_version_1_is_read_everywhere(configure, monkeypatch, capsys, tmp_path, lora):
    values = dict(dtype="float32", **(ADDED if lora else {}))
    one = run(configure(lora, "one", max_steps=3, **values))
    artifact = one / "final_artifact"
    as_version_1(artifact)
    assert verify_artifact(artifact)["artifact_version"] == 1
    assert eval_loss(capsys, monkeypatch, tmp_path, artifact) == pytest.approx(
        best_loss(one), abs=1e-6
    )
    stage = configure(lora, "two", **values, max_steps=1, init_from=str(artifact))
    assert losses(run(stage))[0] == pytest.approx(best_loss(one), abs=1e-6)
    of_report, commit = page(FinishedRun.of(str(one))), verify_artifact(artifact)["git_commit"]
    assert "trainable_parameters" in of_report and (commit is None or commit in of_report)
    flags = ["--adapter", str(artifact), "--output", str(tmp_path / "merged")]
    if not lora:
        with pytest.raises(UserError, match="there is no adapter in it"):
            merging.main(merging.read_arguments(flags))
        return
    merging.main(merging.read_arguments(flags))
    assert "score.0.weight" in load_file(tmp_path / "merged" / "model.safetensors")
