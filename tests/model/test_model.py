"""Every base is tried on two short documents before it is trained: what would be silently wrong is
refused.
"""

import json
import os
from pathlib import Path
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch
from torch.autograd.graph import save_on_cpu
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ConvBertConfig,
    ConvBertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lora import inject
from lora.common.base_model_files import EMBEDDED_BASE, locate_base
from lora.common.errors import UserError
from lora.config.schema import Config
from lora.data.batches import Rows
from lora.data.tokenise import NO_TOKEN, Row
from lora.layer import lora_layers
from lora.model import compatibility
from lora.model.device import BFLOAT16_WIDTH, choose_device, choose_dtype, set_determinism
from lora.model.load import load_task
from lora.model.placement import prepare_layers
from tests.conftest import tiny_llama

SHAPE = dict(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def save(folder, model):
    """`model` with large random weights, as a base in `folder`."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder)
    return folder


def load(folder, task, max_length=64):
    config = Config()
    config.model.base_model, config.model.task, config.data.max_length = (
        str(folder),
        task,
        max_length,
    )
    return load_task(config, torch.float32)


@pytest.mark.parametrize(
    "model",
    [
        BertForMaskedLM(BertConfig(**SHAPE)),
        RobertaForMaskedLM(RobertaConfig(**SHAPE, pad_token_id=1)),
    ],
)
def test_encoders_saved_with_another_head_load_for_scoring_and_not_for_language_modelling(
    model, tmp_path
):
    folder = save(tmp_path, model)
    assert not load(folder, "score").causal
    with pytest.raises(UserError, match="an encoder sees what it would have to predict"):
        load(folder, "lm")


@pytest.mark.parametrize("task", ["lm", "score"])
def test_a_multimodal_base_is_refused_as_one(tmp_path, task):
    text = SHAPE | dict(num_key_value_heads=2, head_dim=8)
    vision = SHAPE | dict(image_size=28, patch_size=14)
    del vision["vocab_size"]
    shape = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    folder = save(tmp_path, Gemma3ForConditionalGeneration(shape))
    with pytest.raises(UserError, match=r"a multimodal model \(gemma3\); expected one of text"):
        load(folder, task)


def test_a_model_that_would_train_silently_wrong_is_refused(tmp_path):
    folder = save(tmp_path, ConvBertModel(ConvBertConfig(**SHAPE)))
    with pytest.raises(
        UserError, match="is not supported: .*(padding changes|attention modules say|ends in)"
    ) as error:
        load(folder, "score")
    assert "\n" not in str(error.value)


def test_memory_that_runs_out_is_not_called_an_unsupported_model(tiny_base, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(compatibility, "hidden_states", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        load(str(tiny_base), "lm")


def test_the_positions_of_roberta_begin_after_its_padding_index(tmp_path):
    folder = save(
        tmp_path,
        RobertaForMaskedLM(RobertaConfig(**SHAPE, pad_token_id=1, max_position_embeddings=66)),
    )
    with pytest.raises(UserError, match="has 64 positions; add --max_length 64"):
        load(folder, "score", 66)
    load(folder, "score", 64)


def test_the_longest_example_is_what_the_base_can_read_and_2048_at_most(configure, tmp_path):
    for positions, longest in ((66, 64), (9000, 2048)):
        shape = RobertaConfig(**SHAPE, pad_token_id=1, max_position_embeddings=positions)
        folder = save(tmp_path / str(positions), RobertaForMaskedLM(shape))
        config = configure(True, base_model=str(folder), max_length="auto")
        load_task(config, torch.float32)
        assert config.data.max_length == longest


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_a_base_in_the_dtype_of_its_files_is_mapped_and_not_copied(tiny_base):
    """So the processes of one machine share the memory, until each moves it to its GPU."""
    task = load(str(tiny_base), "lm")
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f"{tiny_base}/model.safetensors"):
            begin, end = line.split()[0].split("-")
            ranges.append(range(int(begin, 16), int(end, 16)))
    for name, parameter in task.model.named_parameters():
        assert any(parameter.data_ptr() in mapped for mapped in ranges), name


def test_a_base_with_a_missing_tensor_is_refused(tiny_base, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    tensors = load_file(tiny_base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"no weights, or of another shape, for: (model\.)?layers.1.mlp.up_proj.weight",
    ):
        load(tmp_path, "lm")


@pytest.mark.parametrize("task", ["lm", "score"])
def test_a_base_with_more_layers_than_its_config_says_is_refused(tiny_base, tmp_path, task):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"more layers than config.json .*: model.layers.1.input_l"):
        load(folder, task)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_of_an_unknown_quantisation_are_refused(tiny_base, tmp_path, dtype):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 32).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="files are quantised, and .* not say how; .*1.mlp.up_proj"):
        load(folder, "lm")


@pytest.mark.parametrize("name", ["/no/such", "./no", "~/no", "no/such/folder"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name):
    with pytest.raises(UserError, match="no such folder"):
        locate_base(name)


def test_the_device_is_what_was_asked_for_or_an_error():
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device cuda is not available here; there is .*cpu"):
            choose_device("cuda")
    assert Path(locate_base("embedded")[0]) == EMBEDDED_BASE


def test_the_environment_prefers_a_device_and_a_flag_beats_it(monkeypatch):
    monkeypatch.setenv("DEVICE_PREFERENCE", "cpu")
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    monkeypatch.setenv("DEVICE_PREFERENCE", "gpu")
    with pytest.raises(
        UserError, match="DEVICE_PREFERENCE gpu is not available here; there is cpu"
    ):
        choose_device("auto")


@pytest.mark.parametrize("able", [{"avx512_bf16": True}, {"amx_bf16": True}, {}], ids=str)
@pytest.mark.parametrize("width", [BFLOAT16_WIDTH, 32])
def test_a_cpu_computes_in_bfloat16_where_it_is_quick_at_it_and_the_base_is_wide(
    configure, tmp_path, monkeypatch, able, width
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    folder = save(tmp_path, tiny_llama(hidden_size=width))
    config = configure(True, base_model=str(folder))
    expected = torch.bfloat16 if able and width == BFLOAT16_WIDTH else torch.float32
    assert choose_dtype(config, torch.device("cpu")) == expected
    config.training.dtype = "float16"
    assert choose_dtype(config, torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("device, asked", [("cpu", True), ("cuda", True), ("cuda", False)])
def test_algorithms_are_deterministic_where_a_run_on_a_gpu_asks_for_it(monkeypatch, device, asked):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        set_determinism(asked, torch.device(device))
        assert torch.are_deterministic_algorithms_enabled() == (asked and device == "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    # cuBLAS has it from its start: a later run, or a line of --check, may need it.
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (device == "cuda")


def task_with_lora(config):
    """A task in training whose adapters have an effect."""
    task = load_task(config, torch.float32).train()
    torch.manual_seed(0)
    inject(task.model, r=4)
    for layer in lora_layers(task.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return task


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_checkpointing_and_offloading_give_the_same_gradients_to_the_bit_and_keep_less(
    configure, lora
):
    gradients, kept = [], []
    for asked in (
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "offload_activations": True},
    ):
        config = configure(lora, task="lm", **asked)
        task = load_task(config, torch.float32).train()
        prepare_layers(task.model, config.training, config.training.gradient_checkpointing is True)
        if lora:
            torch.manual_seed(0)
            inject(task.model, r=4, dropout=0.2)
            for layer in lora_layers(task.model).values():
                torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
        row = Row(list(range(5, 205)), [*range(6, 205), NO_TOKEN])
        batch, sizes = Rows.from_rows([(row, 0)], "lm").batch([0]), []
        torch.manual_seed(7)  # the dropout is drawn again as it was
        keep = lambda tensor, sizes=sizes: (sizes.append(tensor.nbytes), tensor)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = task(batch)
        loss.backward()
        gradients.append({name: p.grad for name, p in task.named_parameters() if p.requires_grad})
        kept.append(sum(sizes))
    for other in gradients[1:]:
        assert gradients[0].keys() == other.keys()
        assert all(torch.equal(gradient, other[name]) for name, gradient in gradients[0].items())
    assert kept[1] < kept[0] / 3 and kept[2] < kept[1]


def test_offloading_moves_the_inputs_of_the_layers_and_no_weight(configure, monkeypatch):
    moved = []

    class Recorded(save_on_cpu):
        def __init__(self, **options):
            super().__init__(**options)
            self.move = self.pack_hook  # type: ignore[has-type]
            self.pack_hook = self.record

        def record(self, tensor):
            moved.append(tensor)
            return self.move(tensor)

    monkeypatch.setattr("lora.model.placement.save_on_cpu", Recorded)
    config = configure(True, task="lm", offload_activations=True)
    task = task_with_lora(config)
    prepare_layers(task.model, config.training, checkpointing=True)
    row = Row(list(range(5, 25)), [*range(6, 25), NO_TOKEN])
    loss, _ = task(Rows.from_rows([(row, 0)], "lm").batch([0]))
    loss.backward()
    inputs = [tensor for tensor in moved if tensor.numel() > 0]
    assert [tensor.shape for tensor in inputs] == 2 * [(1, 20, 32)]
    weights = {parameter.data_ptr() for parameter in task.parameters()}
    assert not weights & {tensor.data_ptr() for tensor in inputs}
