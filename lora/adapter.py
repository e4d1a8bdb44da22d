"""PEFT's adapter format, read and written strictly: every tensor finds its place, or the error lists those that did not.

A folder with `adapter_config.json` and `adapter_model.safetensors`; tensors are called
`base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], where <module> is the name in the model
*with* its head. PEFT itself only warns about tensors without a place, and an adapter of another prefix then does nothing.
"""

import json
from pathlib import Path
import re

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora.errors import UserError
from lora.layer import LoRALinear, is_causal, lora_layers, prefix_of, wrap

# Keys of adapter_config.json that change what the tensors mean, with the value that this reader can honour.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False, None),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "eva"),
}


def save_adapter(model, folder):
    """Write the adapter of `model` in PEFT's format. Tensors are fp32, as they were trained."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers, prefix = lora_layers(model), prefix_of(model)
    one = next(iter(layers.values()))
    endings = {name.rpartition(".")[2] for name in layers}
    # Endings alone say which layers are meant, unless a layer with such an ending is not wrapped.
    ambiguous = any(n.rpartition(".")[2] in endings and hasattr(m, "weight") for n, m in model.named_modules())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "base_model_prefix") and is_causal(model) else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
        "r": one.r,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout.p,
        "target_modules": sorted(prefix + name for name in layers) if ambiguous else sorted(endings),
        "bias": "none",
        "fan_in_fan_out": isinstance(one.base_layer, Conv1D),
        "inference_mode": True,
    }
    tensors = {}
    whole = dict(trained_whole(model))
    if whole:
        config["modules_to_save"] = sorted({(prefix + name).rpartition(".")[0] for name in whole})
    for name, weight in whole.items():
        tensors[f"base_model.model.{prefix}{name}"] = weight.detach().cpu().clone()  # tied ones share no memory on disk
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            weight = getattr(layer, factor).weight
            tensors[f"base_model.model.{prefix}{name}.{factor}.weight"] = weight.detach().cpu().contiguous()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def read_config(folder):
    """adapter_config.json, refused where it asks for something that this reader would have to ignore."""
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    for key, allowed in PLAIN.items():
        if key in config and config[key] not in allowed:
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported; only {allowed[0]!r} is.")
    if type(config.get("r")) is not int or not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(f"{path}: r and lora_alpha must be there, as numbers.")
    return config


def trained_whole(model):
    """(name, parameter) of what is trained beside the LoRA factors; tied weights under each of their names."""
    every = model.named_parameters(remove_duplicate=False)
    return [(name, p) for name, p in every if p.requires_grad and not re.search(r"\.lora_[AB]\.weight$", name)]


def read_tensors(folder, modules_to_save):
    """({module name: {"lora_A": [r, in], "lora_B": [out, r]}}, {parameter name: tensor of a module to save}), in fp32."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such file; only safetensors adapters are read.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}).") from None
    modules, whole, strange = {}, {}, []
    for key, tensor in tensors.items():
        parameter = key.removeprefix("base_model.model.")
        name, _, factor = parameter.removesuffix(".weight").rpartition(".")
        if any(f".{parameter.rpartition('.')[0]}".endswith(f".{module}") for module in modules_to_save):
            whole[parameter] = tensor.float()
        elif not key.endswith(".weight") or factor not in ("lora_A", "lora_B") or tensor.ndim != 2:
            strange.append(key)
        else:
            modules.setdefault(name, {})[factor] = tensor.float()
    strange += [name for name, factors in modules.items() if len(factors) != 2]
    if strange or not modules:
        raise UserError(f"{path}: not a pair of LoRA factors: {', '.join(strange) or 'the file is empty'}.")
    return modules, whole


@torch.no_grad()
def load_adapter(model, folder):
    """Put the adapter in `folder` (ours or PEFT's) onto `model`; on layers already injected, replace their factors.

    Raises UserError if a tensor finds no place, has another shape than its place, or if an injected layer gets none.
    """
    config = read_config(folder)
    tensors, whole = read_tensors(folder, config.get("modules_to_save") or [])
    prefix = prefix_of(model)
    # An adapter may have been made on the model with its head or without: the names then differ in this prefix.
    inner = f"{getattr(model, 'base_model_prefix', '')}."
    present = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D, LoRALinear))}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def place(name, among):
        spellings = (name.removeprefix(prefix), name, inner + name, name.removeprefix(inner))
        return next((spelling for spelling in spellings if spelling in among), None)

    places = {name: place(name, present) for name in tensors}
    whole_places = {name: place(name, parameters) for name in whole}
    lost = [name for name, where in (places | whole_places).items() if where is None]
    if lost:
        raise UserError(f"{folder}: no such linear layer (or module to save) in the model: {', '.join(lost)}.")
    fit_embeddings(model, {where: whole[name] for name, where in whole_places.items()})
    injected = bool(lora_layers(model))
    if not injected:
        wrap(model, places.values(), config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    layers = lora_layers(model)
    expected = {name for name, _ in trained_whole(model)} | layers.keys()
    found = {*places.values(), *whole_places.values()}
    if expected - found:
        raise UserError(f"{folder}: the adapter has no tensors for {', '.join(sorted(expected - found))}.")
    if injected and found - expected:
        strange = ", ".join(sorted(found - expected))
        raise UserError(f"{folder}: not among what is trained (see target_modules, modules_to_save): {strange}.")
    weights = {(n, factor): getattr(layers[places[n]], factor).weight for n in tensors for factor in tensors[n]}
    misfits = [
        f"{name}.{factor} is {list(tensors[name][factor].shape)}, its place is {list(weight.shape)}"
        for (name, factor), weight in weights.items()
        if tensors[name][factor].shape != weight.shape
    ] + [
        f"{name} is {list(whole[name].shape)}, its place is {list(model.get_parameter(where).shape)}"
        for name, where in whole_places.items()
        if whole[name].shape != model.get_parameter(where).shape
    ]
    if misfits:
        raise UserError(f"{folder}: {'; '.join(misfits)}.")
    for (name, factor), weight in weights.items():
        weight.copy_(tensors[name][factor])
    for where in places.values():
        layers[where].alpha = config["lora_alpha"]
    for name, where in whole_places.items():
        model.get_parameter(where).copy_(whole[name]).requires_grad_(True)


def fit_embeddings(model, whole):
    """Make room for embeddings that came with an adapter (parameter name -> tensor): rows for added tokens, and a head
    of its own where the base ties it and the adapter does not.

    PEFT trains a copy of each module it saves: of tied weights, a lone one or two that differ are tied no more.
    """
    if not hasattr(model, "get_input_embeddings"):
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    theirs = {name: tensor for name, tensor in whole.items() if model.get_parameter(name) is embeddings.weight}
    if head is not None and head.weight is embeddings.weight and theirs:
        first, *others = theirs.values()
        if not (others and torch.equal(first, others[0])):
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
    rows = max((len(tensor) for tensor in theirs.values()), default=0)
    if rows > embeddings.num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
