"""What `import lora` offers does what the scripts do, with the same numbers."""

from datetime import date
import json
from pathlib import Path
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import lora
from lora.common.errors import ResourceExhausted, Stopped, UserError
from lora.common.paths import ROOT, SCRIPTS
from lora.common.printable_text import printable
from lora.common.toml_json import json_value
from lora.config.schema import EvaluationConfig
from lora.config.set_keys import saved_config
from lora.model.load import load_task
from lora.tools.from_python import import_script
from tests.conftest import run, script

TOKENS = torch.arange(30)[None]


def status(folder):
    return json.loads((folder / "status.json").read_text())["exit"]


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_train_and_evaluate_are_the_scripts(configure, tmp_path, adapter):
    config = configure(adapter, "from_python", dtype="float32", max_length="auto", max_steps=4)
    before = config.as_dict()
    results = lora.train(config)
    assert config.as_dict() == before
    folder = tmp_path / "from_python"
    assert results == json.loads((folder / "logs" / "final_results.json").read_text())
    assert status(folder) == 0
    by_script = run(configure(adapter, "by_script", dtype="float32", max_steps=4))
    expected = json.loads((by_script / "logs" / "final_results.json").read_text())
    assert results["best"] == expected["best"]
    numbers = lora.evaluate(folder / "final_artifact")
    assert numbers["mse"] == pytest.approx(results["best"]["mse"], abs=1e-6)
    others = lora.evaluate(folder / "final_artifact", eval_data=["arithmetic:test:9"])
    assert others["mse"] != numbers["mse"]
    config.training.max_steps = 6
    assert lora.train(config, resume_from="auto")["last"]["step"] == 6


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_an_evaluation_computes_with_the_dtypes_of_the_training(configure, adapter):
    folder = run(configure(adapter, task="lm", dtype="bfloat16", max_steps=3))
    results = json.loads((folder / "logs" / "final_results.json").read_text())
    numbers = lora.evaluate(folder / "checkpoints" / "checkpoint_step_3")
    assert results["best"]["step"] == 3
    assert numbers["loss"] == pytest.approx(results["best"]["loss"], rel=1e-6)


def test_what_is_wrong_is_a_user_error_without_the_name_of_a_file(configure, tmp_path):
    config = configure(True, learning_rate=-1.0)
    with pytest.raises(UserError, match="^training.learning_rate = -1.0: expected a number > 0"):
        lora.train(config)
    with pytest.raises(UserError, match="^neither a model nor training data is named"):
        lora.train(lora.Config())
    assert not (tmp_path / "run").exists()
    config = configure(True, max_steps=2, learning_rate=1e30)
    with pytest.raises(Stopped):
        lora.train(config)
    assert status(tmp_path / "run") == 3
    saved = json.loads((tmp_path / "run" / "status.json").read_text())
    assert saved["error"].startswith("step ") and saved["rows"]
    with pytest.raises(UserError, match="run exists; choose another"):
        lora.train(config)


def test_what_a_script_would_report_is_raised_so_and_the_next_run_begins_as_before(
    configure, monkeypatch
):
    def out_of_memory(*arguments, **options):
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(2)
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    threads = torch.get_num_threads()
    monkeypatch.setattr("lora.model.load.build_model", out_of_memory)
    with pytest.raises(ResourceExhausted, match="out of memory"):
        lora.train(configure(True, max_steps=1))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads


def test_the_callers_random_numbers_go_on_as_without_a_run(configure):
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    drawn = [torch.rand(1)]
    config = configure(True, task="lm", max_steps=1)
    lora.train(config)
    drawn.append(torch.rand(1))
    artifact = Path(config.output.output_dir) / "run" / "final_artifact"
    lora.evaluate(artifact)
    drawn.append(torch.rand(1))
    lora.generate(artifact, ["12+9?"], max_new_tokens=1, temperature=1.0)
    drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected)


def test_what_a_loop_gives_is_a_value_of_a_key(configure, tmp_path):
    """Numbers of numpy and objects of torch, which are none of JSON."""
    config = configure(True, max_steps=np.int64(1), learning_rate=np.float32(1e-3))
    config.lora.target_modules = np.array(["q_proj"])
    config.training.dtype, config.training.device = torch.float32, torch.device("cpu")
    lora.train(config)
    assert saved_config(tmp_path / "run" / "final_artifact").training.max_steps == 1


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("dtype", torch.int8, "training.dtype = 'torch.int8': expected one of auto, "),
        ("lora_r", np.array([1, 2]), r"lora.lora_r = \[1, 2\]: expected an integer"),
        ("max_grad_norm", float("inf"), "training.max_grad_norm = inf: expected a number"),
        ("max_grad_norm", None, "max_grad_norm is None: expected a number >= 0; 0 is no clipping"),
    ],
    ids=["dtype", "array", "inf", "None"],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_key(configure, key, value, message):
    with pytest.raises(UserError, match=f"^{message}"):
        lora.train(configure(True, **{key: value}))


def test_a_set_is_a_list_and_anything_else_its_text():
    assert json_value({"v_proj", "q_proj"}) == ["q_proj", "v_proj"]
    assert json_value(date(2026, 12, 1)) == "2026-12-01"


def test_a_module_of_the_users_called_train_is_named_in_one_line(monkeypatch, configure, tmp_path):
    monkeypatch.setitem(sys.modules, "train", ModuleType("train"))
    with pytest.raises(UserError, match="a module train of your own is imported already .None."):
        lora.train(configure(True))
    # One that lies in the current folder and is not imported is no matter.
    monkeypatch.delitem(sys.modules, "train")
    (tmp_path / "train.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    path = list(sys.path)
    assert Path(import_script("train").__file__) == SCRIPTS / "train.py"
    assert sys.path == path


def test_generate_is_eval_with_its_prompt(configure, monkeypatch, capsys):
    artifact = (
        run(configure(True, task="lm", dtype="float32", seed=3, max_steps=6)) / "final_artifact"
    )
    questions = ["When is it open?", "12+9?"]
    flags = ["--checkpoint", artifact, "--max_new_tokens=9", "--prompt", questions[1]]
    for sampling in ({}, dict(temperature=1.5, top_p=0.5)):
        more = [f"--{name}={value}" for name, value in sampling.items()]
        _, of_eval, _ = script(monkeypatch, capsys, ROOT / "eval.py", *flags, *more)
        (answer,) = lora.generate(artifact, questions[1:], max_new_tokens=9, **sampling)
        assert of_eval == printable(answer) + "\n"
    assert len(lora.generate(artifact, questions, max_new_tokens=2)) == 2
    with pytest.raises(UserError, match="top_p = 0.5 is for sampling"):
        lora.generate(artifact, questions, top_p=0.5)
    with pytest.raises(UserError, match="questions is .*expected a list of texts"):
        lora.generate(artifact, questions[0])


def test_settings_of_an_evaluation_are_checked(configure, tmp_path):
    artifact = run(configure(True, task="lm", max_steps=1)) / "final_artifact"
    test_set = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    test_set.write_text(json.dumps({"messages": turns}) + "\n")
    settings = EvaluationConfig(max_new_tokens=4, refusal_pattern="^no")
    numbers = lora.evaluate(artifact, test_set=str(test_set), settings=settings)
    assert numbers["refusal_rate"] in (0, 1)
    with pytest.raises(UserError, match="settings.temperature = -1.0: expected a number >= 0"):
        lora.evaluate(artifact, settings=EvaluationConfig(temperature=-1))
    with pytest.raises(UserError, match="top_p = 0.9 is for sampling"):
        lora.evaluate(artifact, settings=EvaluationConfig(top_p=0.9))


def test_only_the_adapter_is_trainable_or_what_else_is_is_named(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with pytest.raises(Stopped, match="no LoRA layers"):
        lora.verify_only_adapter_trainable(model)
    lora.inject(model, r=4, modules_to_save=["embed_tokens"])
    with pytest.raises(Stopped, match="trained beside the adapter: model.embed_tokens.weight"):
        lora.verify_only_adapter_trainable(model)
    line = lora.verify_only_adapter_trainable(model, ["embed_tokens"])
    assert line.endswith(
        "only adapter parameters are trainable: 28 LoRA tensors, 1 of modules_to_save"
    )
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(Stopped, match="trained beside the adapter: model.norm.weight"):
        lora.verify_only_adapter_trainable(model, ["embed_tokens"])


@pytest.mark.parametrize("place", ["final_artifact", "checkpoints/checkpoint_step_4"])
def test_an_adapter_is_loaded_and_verified(configure, tiny_base, tmp_path, place):
    values = dict(task="lm", add_special_tokens=["<step>"], modules_to_save=["embed_tokens"])
    folder = run(configure(True, **values, dtype="float32", max_steps=4)) / place
    model = lora.load_and_verify_adapter(tiny_base, folder)
    lora.verify_only_adapter_trainable(model, ["embed_tokens"])
    task = load_task(saved_config(folder), torch.float32)
    task.load(folder)
    ours = task.model.eval()(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, ours, rtol=0, atol=1e-5)  # other kernels
    # PEFT's own folder, alone
    alone = tmp_path / "alone"
    lora.save_adapter(model, alone)
    again = lora.load_and_verify_adapter(tiny_base, alone)
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)
    # Another base, a damaged file, no adapter
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    for path in tiny_base.glob("*token*"):
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="other does not hold the weights .* name that base"):
        lora.load_and_verify_adapter(other, folder)
    (folder / "checksums.json").write_text("{}")
    with pytest.raises(UserError, match="not as it was written"):
        lora.load_and_verify_adapter(tiny_base, folder)


def test_a_folder_without_an_adapter_is_refused(configure, tiny_base):
    full = run(configure(False, "full", max_steps=1)) / "final_artifact"
    with pytest.raises(UserError, match="there is no adapter in it"):
        lora.load_and_verify_adapter(tiny_base, full)
    head = run(configure(True, "head", lora_r=0, max_steps=1)) / "final_artifact"
    with pytest.raises(UserError, match="only a score head, without an adapter"):
        lora.load_and_verify_adapter(tiny_base, head)
