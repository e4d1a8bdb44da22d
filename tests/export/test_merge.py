"""What merge.py writes for others: a portable adapter, a scorer in the names of vLLM's reward
models.
"""

import json
from pathlib import Path
import re
import shutil

import peft
import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
)

import eval as evaluation
from lora.common.checksums import CHECKSUMS_FILE, file_sha256, write_checksums
from lora.common.errors import UserError
from lora.evaluation.generate import step_scores
from lora.export.merging import require_same_outputs
from lora.model.weights import load_weights
import merge as merging
from tests.conftest import run, tiny_llama
from tests.lora.test_adapter_kinds import KINDS
from tests.lora.test_layer import TOKENS
from tests.model.test_families import GROUPED, PACKED, PADDED, base
from tests.model.test_model import save


def call(*flags):
    merging.main(merging.read_arguments([str(flag) for flag in flags]))


@pytest.fixture
def patterned(tmp_path):
    """(an adapter of several ranks and alphas with rsLoRA, PEFT's model with it)."""
    settings = dict(KINDS["rsLoRA with patterns"][0]) | {
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    }
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, task_type="CAUSAL_LM", init_lora_weights=False, **settings
    )
    model = peft.get_peft_model(tiny_llama(), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


def test_a_portable_adapter_has_one_rank_and_no_scale_and_does_the_same(
    patterned, tmp_path, capsys
):
    folder, model = patterned
    call("--adapter", folder, "--portable", "--output", tmp_path / "portable")
    # It may have rows of added tokens, and without the base nothing says so.
    left_out = f"note: {folder}: model.embed_tokens.base_layer.weight is left out, as a base has it"
    assert left_out in capsys.readouterr().out
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    tensors = load_file(tmp_path / "portable" / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if "_A" in name} == {6}
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "portable").eval()
    # Fp32, another order
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)
    # What llama.cpp computes: alpha / (rank of the tensor), for every layer.
    a, b = (
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB"
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(
        config["lora_alpha"] / len(a) * b @ a, layer.get_delta_weight("default"), rtol=0, atol=1e-6
    )


def test_a_portable_adapter_of_a_scorer_is_without_its_head(configure, tmp_path, capsys):
    folder = run(configure(True, max_steps=1)) / "final_artifact"
    call("--adapter", folder, "--portable", "--output", tmp_path / "portable")
    note = f"note: {folder}: the score head, mlp_head.safetensors, is left out\n"
    assert note in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "portable").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    "kind, message", [("DoRA", "no portable form"), ("modules_to_save", "read no whole weights")]
)
def test_what_has_no_portable_form_is_refused(kind, message, tmp_path):
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **KINDS[kind][0])
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=message):
        call("--adapter", tmp_path / "theirs", "--portable", "--output", tmp_path / "portable")
    assert not (tmp_path / "portable").exists()


def test_a_merged_scorer_is_a_model_of_two_classes_that_others_serve_and_we_read_back(
    configure, tmp_path, capsys
):
    folder, merged = run(configure(True, learning_rate=3e-2)), tmp_path / "merged"
    call("--adapter", folder / "final_artifact", "--output", merged)
    assert "token" not in capsys.readouterr().out.partition("merged against adapter")[2]
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForProcessRewardModel"]
    tensors = load_file(merged / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"model", "score"}
    assert tensors["score.2.weight"].shape == (2, 32) and not tensors["score.2.weight"][0].any()

    backbone = AutoModel.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    steps = ["From left to right: 3+4-2\n", "3+4=7\n", "7-2=6\n"]
    lines = [tokenizer(line, add_special_tokens=False).input_ids for line in steps]
    hidden = backbone(torch.tensor([sum(lines, [])])).last_hidden_state[0]
    hidden = torch.relu(hidden @ tensors["score.0.weight"].T + tensors["score.0.bias"])
    served = (hidden @ tensors["score.2.weight"].T + tensors["score.2.bias"]).softmax(-1)[:, 1]
    ends = torch.tensor([len(lines[0] + lines[1]) - 1, len(sum(lines, [])) - 1])

    ours = {}
    for checkpoint in (folder / "final_artifact", merged):
        arguments, config = evaluation.read_arguments(
            ["--checkpoint", str(checkpoint), "--prompt", "".join(steps).rstrip()]
        )
        device, dtype = torch.device("cpu"), torch.float32
        task = evaluation.load(arguments.checkpoint, config, device)
        examples = evaluation.read_request(arguments, config).examples
        (scores,) = step_scores(examples, task, config, dtype)
        ours[checkpoint] = torch.from_numpy(scores).float()
        torch.testing.assert_close(ours[checkpoint], served[ends], rtol=0, atol=1e-5)


def test_a_merged_model_loads_in_plain_transformers_and_generates(configure, tmp_path):
    folder = run(
        configure(
            True, task="lm", train_data=["arithmetic:train:60"], use_dora=True, learning_rate=3e-2
        )
    )
    call("--adapter", folder / "final_artifact", "--output", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("3+4=", return_tensors="pt")
    assert (
        model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1]
        > tokens.input_ids.shape[1]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_says_how_often_the_most_likely_token_is_the_same(configure, tmp_path, capsys, dtype):
    config = configure(True, task="lm", train_data=["arithmetic:train:60"], learning_rate=3e-2)
    adapter, merged = run(config) / "final_artifact", tmp_path / "merged"
    capsys.readouterr()
    call("--adapter", adapter, "--output", merged, "--dtype", dtype)
    printed = capsys.readouterr().out

    base = AutoModelForCausalLM.from_pretrained(config.model.base_model, dtype=torch.float32)
    with_adapter = peft.PeftModel.from_pretrained(base, adapter).eval()
    rounded = AutoModelForCausalLM.from_pretrained(merged, dtype=getattr(torch, dtype)).eval()
    torch.manual_seed(0)
    tokens = torch.randint(base.config.vocab_size, (4, 32))
    likeliest = [model(tokens).logits.argmax(-1) for model in (rounded, with_adapter)]
    same = int((likeliest[0] == likeliest[1]).sum())
    assert f"\nthe most likely token is the same at {same} of 128 positions\n" in printed
    if dtype == "float32":
        assert same == 128 and "--dtype" not in printed
    else:
        assert 0 < same < 128  # or the count would prove little
        error = re.search(r"adapter, fp32: +(\S+)\n", printed)[1]
        in_fp32 = f"{error}, and the token the same at 128 of 128 positions"
        assert f"\nwith --dtype float32 the difference would be {in_fp32}\n" in printed


def test_an_artifact_is_verified_and_another_base_is_said(configure, tmp_path, capsys):
    folder = run(configure(True, learning_rate=3e-2)) / "final_artifact"
    other = tmp_path / "other"
    shutil.copytree(configure(True).model.base_model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    call("--adapter", folder, "--output", tmp_path / "same")
    printed = capsys.readouterr().out
    assert "warning" not in printed and printed.count("\nfine: ") == 2
    call("--adapter", folder, "--output", tmp_path / "merged", "--base_model", other)
    assert "does not hold the weights that" in capsys.readouterr().out
    head = bytearray((folder / "mlp_head.safetensors").read_bytes())
    head[-1] ^= 1
    (folder / "mlp_head.safetensors").write_bytes(head)
    with pytest.raises(UserError, match="mlp_head.safetensors': changed"):
        call("--adapter", folder, "--output", tmp_path / "damaged")
    assert not list(tmp_path.glob("*damaged"))


def test_what_would_change_nothing_or_another_base_than_the_adapters_is_refused(
    configure, tmp_path
):
    folder = run(configure(True, max_steps=1)) / "checkpoints" / "checkpoint_step_1"
    with pytest.raises(UserError, match="dequantized: .* was not trained in 4 bits"):
        call("--adapter", folder, "--output", tmp_path / "merged", "--merge_into", "dequantized")
    path = folder / "lora_adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)
    write_checksums(folder)
    with pytest.raises(UserError, match="it changes nothing"):
        call("--adapter", folder, "--output", tmp_path / "merged")


@pytest.mark.parametrize("portable", [[], ["--portable"]])
def test_a_folder_that_cannot_be_written_is_one_line_and_nothing_is_left(
    patterned, tmp_path, tiny_base, portable
):
    (tmp_path / "file").write_text("")
    base = [] if portable else ["--base_model", tiny_base]
    with pytest.raises(UserError, match=".*file/merged: Not a directory"):
        call("--adapter", patterned[0], "--output", tmp_path / "file" / "merged", *portable, *base)


@pytest.mark.parametrize("architectures", [5, ["NoSuchModel"], [5], {"a": 1}, ["pipeline"]])
def test_a_base_that_names_no_model_is_one_line(configure, tmp_path, architectures):
    folder = run(configure(True, task="lm", max_steps=1)) / "final_artifact"
    base = tmp_path / "odd"
    shutil.copytree(configure(True).model.base_model, base)
    shape = json.loads((base / "config.json").read_text()) | {"architectures": architectures}
    (base / "config.json").write_text(json.dumps(shape))
    # Some versions of transformers check the type themselves, and name the key.
    with pytest.raises(UserError, match="which the base says it is|architectures"):
        call("--adapter", folder, "--base_model", base, "--output", tmp_path / "merged")


def test_the_chat_template_of_a_run_is_merged_from_its_checkpoint_and_from_beside_an_adapter(
    configure, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(configure(True).model.base_model, base)
    (base / "chat_template.jinja").unlink()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    files = [str(tmp_path / "chats.jsonl")]
    data = dict(base_model=str(base), task="lm", train_data=files, eval_data=files)
    # A rate at which rounding to the base's bfloat16 changes less than the adapter does.
    folder = run(configure(True, max_steps=2, learning_rate=1.0, **data))
    template = AutoTokenizer.from_pretrained(folder / "final_artifact").chat_template
    assert template and not AutoTokenizer.from_pretrained(base).chat_template
    call("--adapter", folder / "checkpoints" / "checkpoint_step_2", "--output", tmp_path / "one")
    assert AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == template

    theirs = tmp_path / "theirs"  # as TRL saves an adapter: with its tokenizer
    theirs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "final_artifact" / name, theirs)
    AutoTokenizer.from_pretrained(folder / "final_artifact").save_pretrained(theirs)
    call("--adapter", theirs, "--base_model", base, "--output", tmp_path / "two")
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == template


@pytest.mark.parametrize(
    "settings, written",
    [
        # Some published chat models have such a generation_config.json.
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False}),
        ({"temperature": 0.0}, {}),
        ({"length_penalty": 0.8, "output_scores": True, "pad_token_id": -1}, {}),
        ({"length_penalty": 0.8, "top_k": 5}, {"top_k": 5, "do_sample": True}),
    ],
    ids=str,
)
def test_generation_settings_that_are_not_used_do_not_keep_a_model_from_being_saved(
    tiny_base, tmp_path, settings, written
):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(settings))
    model = load_weights(AutoModelForCausalLM, str(base), torch.float32, None)
    model.generation_config.eos_token_id = 0  # transformers saves unchanged settings as they are
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    del saved["transformers_version"]
    assert saved == written | {"eos_token_id": 0}


def test_generation_settings_that_no_model_could_use_are_one_line(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "generation_config.json").write_text('{"max_new_tokens": 0}')
    with pytest.raises(UserError, match="base: `max_new_tokens` must be greater than 0"):
        load_weights(AutoModelForCausalLM, str(base), torch.float32, None)


@pytest.mark.parametrize("family", ["GptOss", "Bloom"])
def test_families_without_sdpa_are_merged(configure, tmp_path, family):
    model = base(family, (PACKED | PADDED)[family], tmp_path / "base")
    settings = {"target_modules": ["all-linear"], "learning_rate": 3e-2, "max_length": 64}
    run_dir = run(configure(True, task="lm", base_model=str(model), max_steps=2, **settings))
    call("--adapter", run_dir / "final_artifact", "--output", tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_router_of_experts_stays_in_float32_as_transformers_writes_it(configure, tmp_path):
    shape = GROUPED | dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2)
    shape |= dict(first_k_dense_replace=1, head_dim=8, eos_token_id=2)
    folder = save(tmp_path / "base", Glm4MoeForCausalLM(Glm4MoeConfig(**shape)).bfloat16())
    reference = AutoModelForCausalLM.from_pretrained(folder)
    reference.save_pretrained(tmp_path / "reference")
    expected = dtypes_in(tmp_path / "reference")
    kept = {name for name, dtype in expected.items() if dtype == torch.float32}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in kept

    settings = dict(base_model=str(folder), task="lm", max_steps=1, learning_rate=1.0)
    adapter = run(configure(True, "lora", **settings)) / "final_artifact"
    call("--adapter", adapter, "--output", tmp_path / "merged")
    assert dtypes_in(tmp_path / "merged") == expected
    trained = run(configure(False, "full", **settings | {"learning_rate": 1e-3}))
    assert dtypes_in(trained / "final_artifact") == expected


def test_a_token_without_an_embedding_is_refused(patterned, tmp_path, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens([f"<{i}>" for i in range(2048)])
    tokenizer.save_pretrained(patterned[0])
    found = f"its tokenizer has {len(tokenizer)} tokens, the model embeddings of 2048"
    with pytest.raises(UserError, match=f"theirs: {found}; save"):
        call("--adapter", patterned[0], "--base_model", tiny_base, "--output", tmp_path / "merged")


def dtypes_in(folder):
    return {name: t.dtype for name, t in load_file(folder / "model.safetensors").items()}


def test_a_sum_that_is_expected_is_that_of_every_file(configure, tmp_path):
    folder = run(configure(True, max_steps=1)) / "final_artifact"
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    expected = ("--expect_sha256", file_sha256(folder / CHECKSUMS_FILE))
    for name in ("metadata.json", "training_config.toml"):
        (folder / name).unlink()
        with pytest.raises(UserError, match="changed|missing"):
            call("--adapter", folder, "--portable", "--output", tmp_path / "p", *expected)


def test_settings_of_4_bits_that_nothing_would_read_are_refused(patterned, tmp_path):
    flags = ("--adapter", patterned[0], "--output", tmp_path / "m")
    with pytest.raises(UserError, match="--bnb_4bit_quant_type goes with --merge_into dequantized"):
        call(*flags, "--bnb_4bit_quant_type", "fp4")


def test_an_adapter_that_changes_less_than_rounding_is_told_so():
    small = torch.full((1, 1, 2), 1e-7)
    source = merging.AdapterSource(Path("folder"), Path("folder"), "base", None)
    base_outputs = torch.ones(1, 1, 2)
    with pytest.raises(UserError, match="more than the adapter changes"):
        require_same_outputs(source, base_outputs, base_outputs + small, base_outputs - small)


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = merging.read_arguments(["--adapter=~", "--output=~/merged"])
    assert arguments.output == str(tmp_path / "merged")


def test_a_part_of_a_checkpoint_is_not_merged(configure, tmp_path):
    part = run(configure(True, max_steps=1)) / "checkpoints" / "checkpoint_step_1" / "lora_adapter"
    for flags in (["--base_model", "embedded"], ["--portable"]):
        with pytest.raises(UserError, match="lora_adapter: a part of .*checkpoint_step_1; name"):
            call("--adapter", part, "--output", tmp_path / "merged", *flags)
