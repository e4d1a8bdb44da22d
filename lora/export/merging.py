"""Fold an adapter into its base, and prove that the result is base + adapter."""

import json

import torch
import transformers

from lora.common.errors import UserError
from lora.config.flags import apply_flags
from lora.config.schema import QUANTIZATION_KEYS, get_lora_config
from lora.config.tables import saved_config
from lora.model.pretrained_heads import two_class_state
from lora.model.task import Task
from lora.model.weights import four_bits, load_weights
from lora.quantization import dequantize


def outputs(model, tokens):
    """What the model says: logits [b, t, vocabulary], or a backbone's hidden states [b, t, width];
    fp32.
    """
    with torch.no_grad():
        out = model.eval()(input_ids=tokens)
    said = out.get("logits", out.get("last_hidden_state"))
    if said is None:
        raise UserError(
            f"{type(model).__name__} gives neither logits nor hidden states, so nothing can be proved of it."
        )
    return said.float()


def find_adapter(folder, base_model):
    """(the folder with the adapter's files, the base's name, the configuration of our run or None).
    Raises UserError.

    Of a head that was trained on the frozen base there is no such folder.
    """
    if (folder / "adapter_config.json").is_file():
        if not base_model:
            raise UserError(
                f"--adapter {folder}: an adapter alone does not say which base it is for; add --base_model."
            )
        return folder, base_model, None
    config = saved_config(folder)
    if not (config.method == "head" or (folder / "lora_adapter").is_dir()):
        raise UserError(
            f"--adapter {folder}: there is no lora_adapter/; a fully fine-tuned model needs no merging."
        )
    if config.model.init_from == "scratch":
        raise UserError(
            f"--adapter {folder}: it was trained on random weights, which no folder holds; use it unmerged."
        )
    return folder / "lora_adapter", base_model or config.model.base_model, config


def class_for(shape):
    """The class of transformers that the base says it is. Raises UserError."""
    architecture = (shape.architectures or ["AutoModelForCausalLM"])[0]
    if not hasattr(transformers, architecture):
        raise UserError(
            f"transformers has no {architecture}, which the base says it is; a newer version may."
        )
    return getattr(transformers, architecture)


def load_base(model_class, base_model, quantization=None):
    """The base in fp32: its own weights, or what is left of them in 4 bits."""
    model = load_weights(model_class, base_model, torch.float32, "sdpa", quantization)
    if quantization:
        dequantize(model)
    return model


def four_bits_of(arguments, config):
    """How the 4-bit base was quantised: as our run says, else as QLoRA is usually done, and the
    flags above either.
    """
    config = config or get_lora_config()
    apply_flags(config, arguments, QUANTIZATION_KEYS)
    config.lora.load_in_4bit = True
    return four_bits(config.lora, torch.device("cpu"))


def difference(one, other):
    return (one - other).abs().max().item()


def read_back(model, model_class, folder):
    """The model that was written to `folder`. Raises UserError where a weight of it is not that of
    `model`.
    """
    written = load_weights(model_class, str(folder), model.dtype, "sdpa")
    merged = model.state_dict()
    if any(not torch.equal(tensor, merged[name]) for name, tensor in written.state_dict().items()):
        raise UserError(
            f"{folder}: the written weights are not the merged ones, and are not kept; try another disk."
        )
    return written


def save_scorer(model, tokenizer, folder, output):
    """The backbone and the MLP head in `folder` as one model of two classes, in the names of vLLM's
    reward models.

    `model.*` and `score.0`, `score.2` are what Qwen2ForProcessRewardModel is made of; transformers'
    AutoModel reads the backbone of it, and eval.py --checkpoint all of it.
    """
    task = Task(model, tokenizer)
    task.load_head(folder)
    state = {
        f"{model.base_model_prefix}.{name}": tensor for name, tensor in model.state_dict().items()
    }
    # Fp32, as it was trained
    state |= {name: tensor.detach() for name, tensor in two_class_state(task.head).items()}
    family = type(model).__name__.removesuffix("Model")
    model.save_pretrained(output, state_dict=state)
    shape = json.loads((output / "config.json").read_text())
    shape["architectures"] = [f"{family}ForProcessRewardModel"]
    (output / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
