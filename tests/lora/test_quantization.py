"""A base in 4 bits: bitsandbytes' own bytes, gradients that an evaluation leaves as they are,
resumes to the bit.
"""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.integrations.finegrained_fp8 import FP8Linear

import eval as evaluation
from lora import inject, load_adapter, merge
from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.config.command_line import read_command_line
from lora.config.schema import get_lora_config
from lora.data.batches import Rows
from lora.data.tokenise import Row
from lora.export.merging import dequantize
from lora.model.load import load_task
from lora.model.weights import four_bits, load_weights
from lora.quantization import dense_weight, import_bitsandbytes, is_4bit, share_4bit
from lora.target_modules import linear_names
import merge as merging
from tests.conftest import run
from tests.lora.test_layer import randomise, tiny_gpt2
from tests.model.test_families import PADDED, base

CPU = torch.device("cpu")


def load(folder, **settings):
    config = get_lora_config()
    config.lora.load_in_4bit = True
    for name, value in settings.items():
        setattr(config.lora, name, value)
    return load_weights(
        AutoModelForCausalLM, str(folder), torch.float32, "sdpa", four_bits(config.lora, CPU)
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_the_bytes_are_those_of_transformers_own_loading(tiny_base, quant_type, double):
    ours = load(tiny_base, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=settings, dtype=torch.float32
    )
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys() and any(
        name.endswith(f"bitsandbytes__{quant_type}") for name in ours
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_4_bits_are_those_of_the_files_whatever_is_computed_in(tiny_base):
    fp32 = load(tiny_base)
    config = get_lora_config()
    config.lora.load_in_4bit = True
    four = four_bits(config.lora, CPU)
    bf16 = load_weights(AutoModelForCausalLM, str(tiny_base), torch.bfloat16, "sdpa", four)
    for ours, other in zip(fp32.modules(), bf16.modules()):
        if is_4bit(ours):
            assert torch.equal(ours.weight, other.weight)
            assert other.weight.quant_state.dtype == torch.bfloat16
    assert bf16.get_input_embeddings().weight.dtype == torch.bfloat16


def test_every_linear_layer_but_the_head_is_in_4_bits_and_frozen(tiny_base):
    model = load(tiny_base)
    assert {name for name, module in model.named_modules() if is_4bit(module)} == set(
        linear_names(model)
    )
    assert not any(module.weight.requires_grad for module in model.modules() if is_4bit(module))
    assert type(model.lm_head) is torch.nn.Linear
    assert not any(layer.support_avx512bf16_for_cpu for layer in model.modules() if is_4bit(layer))
    assert not hasattr(model.config, "quantization_config")  # what is saved of it is the base's own


@pytest.mark.parametrize("compute_dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_a_layer_computes_with_the_dequantised_weight(tiny_base, compute_dtype, tolerance):
    """To the rounding of the type it computes in: bfloat16 keeps 8 bits."""
    layer = load(tiny_base, bnb_4bit_compute_dtype=compute_dtype).model.layers[0].mlp.up_proj
    x = torch.randn(5, 32, requires_grad=True)
    y, exact = layer(x), x @ dense_weight(layer).T
    assert (y - exact).abs().max() <= tolerance * exact.abs().max()
    (ours,) = torch.autograd.grad(y.sum(), x)
    theirs = dense_weight(layer).sum(0).expand_as(x)
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_gpt2s_transposed_layers_become_4_bits_and_themselves_again(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    model = load(tmp_path)
    tokens = torch.arange(20)[None]
    quantised = model(tokens).logits
    dequantize(model)
    again = GPT2LMHeadModel(model.config).eval()
    again.load_state_dict(model.state_dict())
    # One computes in bfloat16
    torch.testing.assert_close(again(tokens).logits, quantised, rtol=0, atol=0.02)
    assert not torch.equal(
        model.transformer.h[0].attn.c_attn.weight, tiny_gpt2().transformer.h[0].attn.c_attn.weight
    )


@pytest.mark.parametrize("dora", [False, True])
def test_an_evaluation_leaves_the_gradients_and_the_base_as_they_are(configure, dora):
    """bitsandbytes 0.50.2 repacks the weights at the first evaluation on some CPUs, and cuts the
    gradients from then on.
    """
    task = load_task(configure(True, load_in_4bit=True), torch.float32)
    inject(task.model, r=4, dora=dora)
    randomise(task.model)
    batch = Rows.from_rows(
        [(Row([5, 6, 7, 8, 9], [float("nan"), 0.5, float("nan"), 1.0, 0.0]), 0)], "score"
    ).batch([0])

    def gradients():
        task.zero_grad()
        task(batch)[0].backward()
        return {name: p.grad.clone() for name, p in task.named_parameters() if p.requires_grad}

    task.train()
    weights = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    before = gradients()
    task.eval()
    with torch.no_grad():
        task.predict(batch)
    task.train()
    after = gradients()
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
    assert all(gradient.abs().sum() > 0 for gradient in before.values())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in task.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_resumed_qlora_run_equals_the_undisturbed_one_to_the_bit(configure, optimizer):
    settings = dict(
        load_in_4bit=True,
        optimizer=optimizer,
        lora_dropout=0.1,
        lr_scheduler_type="constant",
        warmup_steps=0,
        save_steps=3,
        modules_to_save=["embed_tokens"],  # large enough for 8 bits
    )
    first = run(configure(True, name="first", max_steps=3, **settings))
    run(
        configure(True, name="first", max_steps=6, **settings),
        resume_from=first / "checkpoints" / "checkpoint_step_3",
    )
    again = run(configure(True, name="again", max_steps=6, **settings))
    for name in (
        "lora_adapter/adapter_model.safetensors",
        "mlp_head.safetensors",
        "optimizer.safetensors",
    ):
        one = load_file(first / "checkpoints" / "checkpoint_step_6" / name)
        other = load_file(again / "checkpoints" / "checkpoint_step_6" / name)
        assert one.keys() == other.keys() and all(
            torch.equal(one[key], other[key]) for key in one
        ), name


def test_8_bits_are_used_for_what_is_large(configure):
    folder = run(configure(True, optimizer="adamw_8bit", max_steps=2))
    state = load_file(folder / "checkpoints" / "checkpoint_step_2" / "optimizer.safetensors")
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("/state1")} == {
        torch.float32
    }
    folder = run(configure(False, name="full", optimizer="adamw_8bit", max_steps=2))
    state = load_file(folder / "checkpoints" / "checkpoint_step_2" / "optimizer.safetensors")
    assert torch.uint8 in {
        tensor.dtype for name, tensor in state.items() if name.endswith("/state1")
    }


def test_what_was_trained_is_evaluated_and_merged(configure, tmp_path, capsys, monkeypatch):
    folder = run(configure(True, load_in_4bit=True, learning_rate=3e-2, max_steps=6))
    results = json.loads((folder / "logs" / "final_results.json").read_text())["best"]
    metadata = json.loads((folder / "final_artifact" / "metadata.json").read_text())
    dense = load_task(configure(True), torch.float32)
    adapter = metadata["trainable_parameters"] - sum(p.numel() for p in dense.head.parameters())
    assert metadata["parameters"] == sum(p.numel() for p in dense.parameters()) + adapter
    assert f" of {metadata['parameters']:,} (" in capsys.readouterr().out
    assert (
        "A LoRA adapter of rank 16, trained on 4-bit weights, of `"
        in (folder / "final_artifact" / "README.md").read_text()
    )
    numbers = {}
    merged = tmp_path / "merged"
    flags = [
        "--adapter",
        str(folder / "final_artifact"),
        "--output",
        str(merged),
        "--dtype=float32",
    ]
    merging.main(merging.read_arguments([*flags, "--merge_into=dequantized"]))
    for name, checkpoint in (("trained", folder / "final_artifact"), ("merged", merged)):
        out = tmp_path / f"{name}.json"
        arguments = evaluation.read_arguments(
            ["--checkpoint", str(checkpoint), "--output", str(out)]
        )
        evaluation.main(*arguments, evaluation.read_request(*arguments))
        numbers[name] = json.loads(out.read_text())["mse"]
    assert numbers["trained"] == pytest.approx(results["mse"], abs=1e-6)
    # 4-bit layers compute in bfloat16
    assert numbers["merged"] == pytest.approx(results["mse"], abs=2e-3)
    capsys.readouterr()
    flags[3] = str(tmp_path / "into_16")
    merging.main(merging.read_arguments(flags))
    assert "against the 4-bit base it was trained on: " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    flags[3] = str(tmp_path / "without_it")
    merging.main(merging.read_arguments(flags))
    assert "note: not compared with the 4-bit base of the training: " in capsys.readouterr().out
    assert (tmp_path / "without_it" / "model.safetensors").is_file()


def test_merged_into_the_dequantised_base_equals_the_dequantised_base_with_the_adapter(
    configure, tiny_base, tmp_path
):
    folder = run(
        configure(
            True,
            load_in_4bit=True,
            task="lm",
            train_data=["arithmetic:train:60"],
            learning_rate=3e-2,
            max_steps=6,
        )
    )
    flags = [
        "--adapter",
        str(folder / "final_artifact"),
        "--output",
        str(tmp_path / "merged"),
        "--dtype=float32",
    ]
    merging.main(merging.read_arguments([*flags, "--merge_into=dequantized"]))
    unmerged = load(tiny_base)
    dequantize(unmerged)
    load_adapter(unmerged, folder / "final_artifact")
    tokens = torch.arange(40).view(2, 20)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(tokens).logits, unmerged(tokens).logits, rtol=0, atol=1e-5)


def test_where_4_bits_cannot_be_had_one_line_says_so(monkeypatch):
    with pytest.raises(
        UserError, match="load_in_4bit: not on mps, where bitsandbytes cannot train; .*--device cpu"
    ):
        import_bitsandbytes("load_in_4bit", torch.device("mps"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="optimizer adamw_8bit: bitsandbytes cannot be loaded"):
        import_bitsandbytes("optimizer adamw_8bit", CPU)


def test_a_weight_that_is_not_finite_is_refused(tiny_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is not finite"):
        load(tmp_path)


@pytest.mark.parametrize("bits", [True, False])
def test_a_weight_of_another_shape_is_one_line(tiny_base, tmp_path, bits):
    shutil.copytree(tiny_base, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(16, 32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"of another shape.* model.layers.0.self_attn.q_proj.weight|q_proj.* another shape",
    ):
        load(tmp_path) if bits else load_weights(
            AutoModelForCausalLM, str(tmp_path), torch.float32, "sdpa"
        )


def test_a_base_whose_files_are_quantised_is_one_line(configure, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((tiny_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for bits in (True, False):
        with pytest.raises(UserError, match="its files are quantised; name the dense base"):
            load_task(
                configure(True, base_model=str(tmp_path / "base"), load_in_4bit=bits), torch.float32
            )


def test_what_is_in_4_bits_is_not_trained_whole(tiny_base):
    with pytest.raises(UserError, match="q_proj is in 4 bits, which cannot be trained whole"):
        inject(load(tiny_base), r=4, target_modules=["v_proj"], modules_to_save=["q_proj"])


def test_how_much_is_in_4_bits_is_measured(tiny_base, tmp_path):
    """transformers keeps the experts of a layer as one tensor, which is no linear layer."""
    model = load(tiny_base)
    sizes = {
        name: parameter.numel()
        for name, parameter in AutoModelForCausalLM.from_pretrained(tiny_base).named_parameters()
    }
    assert share_4bit(model) == sum(sizes[f"{name}.weight"] for name in linear_names(model)) / sum(
        sizes.values()
    )
    shape = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_local_experts=4,
    )
    experts = MixtralForCausalLM(MixtralConfig(vocab_size=64, **shape, num_key_value_heads=2))
    experts.save_pretrained(tmp_path)
    assert 0 < share_4bit(load(tmp_path)) < 0.2


@pytest.mark.parametrize("kind", ["Linear8bitLt", "FP8Linear"])
def test_a_layer_of_8_bits_is_refused(kind):
    """Its bytes would be taken for weights when the update is folded in."""
    if kind == "FP8Linear":
        layer = FP8Linear(32, 32)
    else:
        layer = import_bitsandbytes("", CPU).nn.Linear8bitLt(32, 32, has_fp16_weights=False)
    with pytest.raises(UserError, match=f"target_modules: a {kind}; expected dense layers"):
        inject(torch.nn.Sequential(layer).to("cpu"))


def test_4_bits_are_merged_to_the_type_they_were_quantised_from(tiny_base):
    config = get_lora_config()
    config.lora.load_in_4bit = True
    model = load_weights(
        AutoModelForCausalLM, str(tiny_base), torch.bfloat16, "sdpa", four_bits(config.lora, CPU)
    )
    inject(model, r=4)
    randomise(model)
    tokens = torch.arange(20)[None]
    unmerged = model(tokens).logits
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # Weights and sums have 8 bits, through two layers and the head.
    torch.testing.assert_close(
        model(tokens).logits, unmerged, rtol=0, atol=0.1 * unmerged.abs().max().item()
    )


@pytest.mark.parametrize(
    "variable, flags, expected",
    [("true", [], True), ("true", ["--load_in_4bit=false"], False), ("", ["--load_in_4bit"], True)],
)
def test_the_environment_asks_for_4_bits_and_flags_beat_it(
    monkeypatch, variable, flags, expected, tmp_path
):
    monkeypatch.setenv("USE_BNB_QUANT", variable)
    default = ROOT / "configs" / "tiny_lora.toml"
    command = read_command_line(
        [*flags, "--output_dir", str(tmp_path)], get_lora_config(), default, ""
    )
    assert command.config.lora.load_in_4bit is expected


def test_bitsandbytes_paged_memory_is_not_asked_for_on_a_cpu(configure, capsys):
    run(configure(True, optimizer="paged_adamw_8bit", max_steps=1))
    assert "on the CPU there is nothing to page to" in capsys.readouterr().out


@pytest.mark.slow
def test_a_qlora_step_needs_neither_accelerate_nor_peft(tmp_path):
    hidden = "import runpy, sys; sys.modules |= dict.fromkeys(['accelerate', 'peft', 'trl']); "
    hidden += "sys.argv = sys.argv[1:]; "
    flags = [
        "--config",
        "configs/steps_qlora.toml",
        "--base_model=embedded",
        "--train_data",
        "arithmetic:train:40",
    ]
    flags += [
        "--bnb_4bit_compute_dtype=float32",  # bfloat16 is emulated on many CPUs
        "--max_steps=1",
        "--max_length=256",
        "--output_dir",
        str(tmp_path),
        "--experiment_name=run",
    ]
    command = [
        sys.executable,
        "-c",
        hidden + "runpy.run_path(sys.argv[0], run_name='__main__')",
        "train_lora.py",
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "% of it in 4 bits (nf4)" in done.stdout
        and (tmp_path / "run" / "final_artifact" / "adapter_config.json").is_file()
    )


def test_a_base_that_must_be_padded_is_loaded_in_4_bits(tmp_path):
    config = get_lora_config()
    config.model.base_model = str(base("Bloom", PADDED["Bloom"], tmp_path / "base"))
    config.model.task, config.data.max_length = "lm", 64
    config.lora.load_in_4bit = True
    assert not load_task(config, torch.float32).packed
