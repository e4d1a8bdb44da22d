"""The files of a base model: config.json, weights, tokenizer."""

from collections.abc import Iterable
from pathlib import Path
import re
import sys
from typing import Any

from safetensors import safe_open
import torch
from torch import Tensor
from tqdm import tqdm
import transformers
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from lora.common.base_model_files import check_shape, check_weight_files, locate_base
from lora.common.errors import UserError, library_errors, raise_if_any
from lora.common.toml_json import read_file
from lora.config.schema import LoraConfig, ModelConfig
from lora.model.tokenizer_file import base_file, follows_its_file
from lora.quantization import FourBitSettings, import_bitsandbytes
from lora.target_modules import decoder_layers, is_pooler

# Types of quantised weights, which mean nothing without the scales that belong to them.
QUANTISED_TYPES = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F8_E4M3", "F8_E5M2")


class StoredTensor:
    """A tensor of a safetensors file, which transformers' loader reads by indexing it.

    It is mapped into memory by itself, so what was cast or copied to a GPU is held no longer. With
    names of files, transformers would map them whole until all of their tensors are read.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)[index]


def from_pretrained(loader: Any, base_model: str) -> Any:
    """Call from_pretrained of one of transformers' classes. Its errors become UserErrors."""
    source, local = locate_base(base_model)
    if local:
        check_shape(source)
    with library_errors(f"base_model {base_model}"):
        return loader.from_pretrained(source, trust_remote_code=False, local_files_only=local)


def read_shape(base_model: str) -> PreTrainedConfig:
    """Read config.json. Every program begins with it, so transformers is quiet from here on."""
    # What it warns of while it loads a model is checked here, and is an error or intended.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    shape = from_pretrained(transformers.AutoConfig, base_model)
    if getattr(shape, "quantization_config", None):
        expected = "name the dense base (load_in_4bit quantises it)"
        raise UserError(f"base_model {base_model}: its files are quantised; {expected}.")
    return shape


def load_shape(base_model: str) -> tuple[PreTrainedConfig, torch.dtype, PreTrainedTokenizerBase]:
    """Return what config.json says, the type of the weights on disk, and the tokenizer."""
    shape = read_shape(base_model)
    return shape, shape.dtype or torch.float32, load_tokenizer(base_model)


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    tokenizer = from_pretrained(transformers.AutoTokenizer, base_model)
    if not isinstance(tokenizer.model_max_length, (int, float)):
        found = f"model_max_length = {tokenizer.model_max_length!r:.60} in tokenizer_config.json"
        raise UserError(f"base_model {base_model}: {found}; expected a number.")
    if not tokenizer.is_fast:
        problem = "its tokenizer has no fast version (no tokenizer.json), which is needed"
        raise UserError(f"base_model {base_model}: {problem}.")
    if not follows_its_file(tokenizer):
        why = f"transformers' {type(tokenizer).__name__} splits text otherwise"
        print(f"note: base_model {base_model}: its tokenizer.json is used as it is; {why}")
        tokenizer = from_pretrained(transformers.PreTrainedTokenizerFast, base_model)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # several, by name
        if "default" not in templates:
            found = f"chat templates {', '.join(templates)}"
            raise UserError(f"base_model {base_model}: {found}; expected one called default.")
        tokenizer.chat_template = templates["default"]
        names = ", ".join(templates)
        print(f"note: base_model {base_model}: of its chat templates ({names}), default is used")
    return tokenizer


def model_files(base_model: str) -> list[Path]:
    """Return the files with the model's weights, downloaded where they are not on this disk."""
    source, _ = locate_base(base_model)
    with library_errors(f"base_model {base_model}"):
        names = [SAFE_WEIGHTS_NAME]
        is_one_file = base_file(source, SAFE_WEIGHTS_NAME) is not None
        index = None if is_one_file else base_file(source, SAFE_WEIGHTS_INDEX_NAME)
        if index:
            names = sorted(set(read_file(index)["weight_map"].values()))
        return [Path(cached_file(source, name)) for name in names]


def weight_files(model: ModelConfig) -> list[Path]:
    """Return all weight files beside the base's; none where the weights are random."""
    if model.init_from == "scratch":
        return []
    source, local = locate_base(model.base_model)
    folder = Path(source)
    if not local:
        folder = model_files(model.base_model)[0].parent
        base_file(source, "mlp_head.safetensors")  # of a scorer, if the repository has one
    heads = folder.parent.glob("mlp_head.safetensors") if folder.name == "backbone" else ()
    return sorted([*folder.glob("*.safetensors"), *heads])


def four_bits(lora: LoraConfig | None, device: torch.device) -> FourBitSettings | None:
    """Return how the base is to be quantised; None without load_in_4bit."""
    if not (lora and lora.load_in_4bit):
        return None
    import_bitsandbytes("load_in_4bit", device)
    compute_dtype = getattr(torch, lora.bnb_4bit_compute_dtype)
    double_quant = lora.bnb_4bit_use_double_quant
    return FourBitSettings(lora.bnb_4bit_quant_type, double_quant, compute_dtype, device)


def stored_tensors(base_model: str) -> dict[str, StoredTensor]:
    """Return the tensors of a base, not yet read. Raises UserError where they are quantised."""
    tensors = {}
    quantised = []
    for path in model_files(base_model):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensors[name] = StoredTensor(path, name)
                if name.endswith("weight") and file.get_slice(name).get_dtype() in QUANTISED_TYPES:
                    quantised.append(name)
    expected = "its files are quantised, and config.json does not say how; name the dense base"
    raise_if_any(quantised, f"base_model {base_model}: {expected}")
    return tensors


def load_weights(
    model_class: Any,
    base_model: str,
    dtype: torch.dtype,
    attention: str | None,
    quantization: FourBitSettings | None = None,
) -> PreTrainedModel:
    """Return a model with all weights of a base, in `dtype` or quantised. Raises UserError."""
    where = f"base_model {base_model}"
    source, local = locate_base(base_model)
    if local:
        check_weight_files(source)
    tensors = stored_tensors(base_model)
    shape = read_shape(base_model)
    # What is quantised is read in the base's own dtype, whatever it is computed in, so that it is
    # the same in training, evaluation and merging.
    read_dtype = (shape.dtype or torch.float32) if quantization else dtype
    with library_errors(where, KeyError):  # of an attention it does not know
        if not issubclass(model_class, PreTrainedModel):  # one of transformers' Auto classes
            with torch.device("meta"):  # allocates no memory
                empty = model_class.from_config(shape)
            model_class, shape = type(empty), empty.config
        model, info = model_class.from_pretrained(
            None,
            config=shape,
            state_dict=tensors,
            dtype=read_dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            ignore_mismatched_sizes=True,  # they are reported below
            output_loading_info=True,
        )
        model.config.name_or_path = source
        if model.can_generate():
            read_generation_config(model, source)
    require_all_weights(model, info, where)
    if quantization:
        raise_if_any(model.hf_quantizer.quantization_config.damaged, where)
        finish_quantised(model, quantization.device, read_dtype, dtype)
    return model


def require_all_weights(model: PreTrainedModel, info: dict[str, Any], where: str) -> None:
    """Raise UserError for weights that are missing, of another shape or layer, or not finite.

    `info` is what `from_pretrained` says of the loading.
    """
    beyond = more_layers(model, info["unexpected_keys"])
    fewer = "its files have more layers than config.json says; correct num_hidden_layers"
    raise_if_any(beyond, f"{where}: {fewer}")
    mismatched = [name for name, _, _ in info["mismatched_keys"]]
    absent = [name for name in [*info["missing_keys"], *mismatched] if not is_pooler(name)]
    raise_if_any(absent, f"{where}: no weights, or of another shape, for")
    not_finite = []
    quiet = None if sys.stdout.isatty() else True  # no bar in the processes that print nothing
    for name, parameter in tqdm(list(model.named_parameters()), "reading weights", disable=quiet):
        if parameter.is_floating_point() and not is_finite(parameter):
            not_finite.append(name)
    mend = "copy it again, or take another base"
    raise_if_any(not_finite, f"{where}: not finite ({mend})")


def finish_quantised(
    model: PreTrainedModel, device: torch.device, read_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Let a quantised model, whose other weights were read in `read_dtype`, compute in `dtype`."""
    # Whatever is saved of the model has the base's own config.
    model.hf_quantizer.remove_quantization_config(model)
    for parameter in model.parameters():
        if parameter.dtype == read_dtype:  # routers of experts stay in fp32
            parameter.data = parameter.data.to(dtype)
        elif hasattr(parameter, "quant_state"):
            parameter.quant_state.dtype = dtype  # that it is dequantised to
    model.to(device)  # where its 4-bit weights are already


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model in place, except what transformers keeps in fp32, such as experts' routers."""
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        stays_fp32 = any(re.search(pattern, name) for pattern in patterns)
        if tensor.is_floating_point() and not stays_fp32:
            tensor.data = tensor.data.to(dtype)


def read_generation_config(model: PreTrainedModel, source: str) -> None:
    """Read generation_config.json if the base has it; else transformers has used config.json."""
    quiet = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    if cached_file(source, "generation_config.json", **dict.fromkeys(quiet, False)):
        model.generation_config = GenerationConfig.from_pretrained(source)
    drop_unused_settings(model.generation_config)
    stops = model.generation_config.eos_token_id
    tokens = stops if isinstance(stops, list) else [stops]
    if not {type(token) for token in tokens} <= {int, type(None)}:
        found = f"base_model {source}: eos_token_id is {stops!r:.60}"
        raise UserError(f"{found}; expected numbers of tokens.")


def drop_unused_settings(settings: GenerationConfig) -> None:
    """Drop settings that this way of generating ignores: transformers refuses to save them.

    Some published models have sampling values and no do_sample, and mean to be sampled from. Raises
    ValueError for what no model could generate with.
    """
    try:
        settings.validate(strict=True)
        return
    except ValueError as error:
        problem = str(error)
    temperature = 1.0 if settings.temperature is None else settings.temperature
    has_sampling_values = "`do_sample` is not set" in problem
    if has_sampling_values and settings.do_sample is None and temperature > 0:
        settings.do_sample = True
        drop_unused_settings(settings)
        return
    for name in re.findall(r"^- `(\w+)`:", problem, re.MULTILINE):
        setattr(settings, name, None)
    settings.validate(strict=True)


def more_layers(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Return the unexpected tensors of the layer that would follow the model's last one."""
    layers = decoder_layers(model)
    for name, module in model.named_modules():
        if module is layers:
            next_layer = f".{name.rpartition('.')[2]}.{len(layers)}."
            return [key for key in unexpected if next_layer in f".{key}"]
    return []


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, without a copy of the tensor."""
    return tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.detach().aminmax())


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]
) -> None:
    """Add tokens to the tokenizer, and rows to the embeddings, drawn around the mean of the others.

    The tokens that the chat template writes are special, so contents of a chat read them as text.
    """
    if not tokens:
        return
    # A tokenizer without a template will be given ChatML's, by use_chatml.
    template = str(tokenizer.chat_template or "<|im_start|> <|im_end|>")
    for token in tokens:
        # Letters inside of a word or of <|user|> are no token of the template.
        pattern = re.escape(token)
        if re.fullmatch(r"\w+", token):
            pattern = rf"(?<![\w|]){token}(?![\w|])"
        special = re.search(pattern, template) is not None
        tokenizer.add_tokens(transformers.AddedToken(token, special=special, normalized=False))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # On `meta` there is nothing to take the mean of.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=model.device.type != "meta")
