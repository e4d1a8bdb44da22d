"""Fold an adapter into its base, and prove that the result is base + adapter."""

from argparse import Namespace
import copy
from dataclasses import dataclass, replace
import math
from pathlib import Path

import torch
from torch import Tensor, nn
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora.adapter import load_adapter
from lora.common.checkpoint_folders import adapter_folder, is_artifact, is_written_by_us
from lora.common.checksums import verify_checksums
from lora.common.errors import UserError
from lora.config.flags import apply_flags
from lora.config.schema import QUANTIZATION_KEYS, Config, get_lora_config
from lora.config.set_keys import saved_config
from lora.model.pretrained_heads import two_class_state
from lora.model.task import Task
from lora.model.weights import add_tokens, four_bits, load_weights
from lora.quantization import FourBitSettings, dense, is_4bit
from lora.training.base_integrity import file_sums, warn_other_base


@dataclass
class AdapterSource:
    """An adapter, and what it was trained on."""

    folder: Path  # the value of --adapter: a checkpoint, an artifact or an adapter
    adapter_path: Path | None  # None: only a score head was trained, on the frozen base
    base_model: str
    config: Config | None  # of the run that made it; None for an adapter alone

    @property
    def is_scorer(self) -> bool:
        return self.config is not None and self.config.model.task == "score"

    @property
    def is_4bit(self) -> bool:
        return self.config is not None and self.config.lora.load_in_4bit

    def verify(self) -> str:
        """Return a warning if the base is another than at training, else "".

        Raises UserError where a file of the adapter has changed.
        """
        if self.config is None:
            return ""
        verify_checksums(self.folder)
        model = replace(self.config.model, base_model=self.base_model)
        return warn_other_base(self.folder, self.base_model, file_sums(model))


def refuse_part(folder: Path) -> None:
    """Raise UserError for the adapter in a checkpoint of ours, whose other files belong to it."""
    if folder.name == "lora_adapter" and is_written_by_us(folder.parent):
        raise UserError(f"--adapter {folder}: a part of {folder.parent}; name that.")


def find_adapter(given: str, base_model: str | None) -> AdapterSource:
    """Return the adapter of a folder: an adapter, a checkpoint or a final artifact."""
    folder = Path(given)
    refuse_part(folder)
    adapter = adapter_folder(folder)
    is_ours = is_artifact(folder) or (folder / "training_config.toml").is_file()
    if adapter == folder and not is_ours:
        if not base_model:
            found = f"{given}: an adapter alone does not say which base it is for"
            raise UserError(f"--adapter {found}; add --base_model.")
        return AdapterSource(folder, folder, base_model, None)
    config = saved_config(folder)
    if config.method != "head" and not adapter:
        hint = "a fully fine-tuned model needs no merging"
        raise UserError(f"--adapter {given}: there is no adapter in it; {hint}.")
    if config.model.init_from == "scratch":
        found = "it was trained on random weights, which no folder holds"
        raise UserError(f"--adapter {given}: {found}; use it unmerged.")
    base_model = base_model or config.model.base_model
    return AdapterSource(folder, adapter, base_model, config)


def class_for(shape: PretrainedConfig) -> type:
    """Return the class of transformers that the base says it is."""
    names = shape.architectures or ["AutoModelForCausalLM"]
    architecture = names[0] if isinstance(names, list) else names
    if not hasattr(getattr(transformers, str(architecture), None), "from_pretrained"):
        found = f"transformers has no {architecture}, which the base says it is"
        raise UserError(f"{found}; a newer version may.")
    return getattr(transformers, architecture)


def load_base(
    model_class: type, base_model: str, settings: FourBitSettings | None
) -> PreTrainedModel:
    """Load the base in fp32: its own weights, or what is left of them in 4 bits."""
    model = load_weights(model_class, base_model, torch.float32, None, settings)
    if settings:
        dequantize(model)
    return model


def dequantize(model: nn.Module) -> None:
    """Replace every Linear4bit by a dense layer of its dequantised weights, in place."""
    for name, layer in list(model.named_modules()):
        if is_4bit(layer):
            model.set_submodule(name, dense(layer))


def four_bits_of(arguments: Namespace, config: Config | None) -> FourBitSettings:
    """Return how the 4-bit base was quantised: by the flags, the run, or else the defaults."""
    config = copy.deepcopy(config) if config else get_lora_config()
    apply_flags(config, arguments, QUANTIZATION_KEYS)
    config.lora.load_in_4bit = True
    return four_bits(config.lora, torch.device("cpu"))


def require_embeddings(
    source: AdapterSource, model: PreTrainedModel, num_tokens: int, num_base_tokens: int
) -> None:
    """Raise UserError where the adapter's tokenizer adds tokens that have no embedding."""
    rows = model.config.get_text_config().vocab_size
    if num_tokens > max(rows, num_base_tokens):
        found = f"its tokenizer has {num_tokens} tokens, the model embeddings of {rows}"
        mend = "save the adapter with its embeddings, or remove its tokenizer.json"
        raise UserError(f"--adapter {source.folder}: {found}; {mend}.")


def outputs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return logits [b, t, vocabulary], or a backbone's hidden states [b, t, width]; fp32."""
    with torch.no_grad():
        out = model.eval()(input_ids=tokens)
    values = out.get("logits", out.get("last_hidden_state"))
    if values is None:
        found = f"{type(model).__name__} gives neither logits nor hidden states"
        raise UserError(f"{found}, so its outputs cannot be compared.")
    return values.float()


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def outputs_in_4bit(
    source: AdapterSource,
    model_class: type,
    quantization: FourBitSettings,
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs of the adapter on the 4-bit base that it was trained on."""
    model = load_base(model_class, source.base_model, quantization)
    add_tokens(model, tokenizer, source.config.model.add_special_tokens)
    if source.adapter_path:
        load_adapter(model, source.adapter_path)
    return outputs(model, tokens)


def same_tokens(a: Tensor, b: Tensor) -> str:
    """Return at how many positions two models' logits [b, t, vocabulary] have the same argmax."""
    is_same = a.argmax(-1) == b.argmax(-1)
    return f"the same at {is_same.sum()} of {is_same.numel()} positions"


def require_same_outputs(
    source: AdapterSource, base_outputs: Tensor, adapter_outputs: Tensor, merged_outputs: Tensor
) -> float:
    """Return how much the adapter changes the outputs. Raises UserError if merging changes them."""
    size = adapter_outputs.abs().max().item()
    num_outputs = base_outputs.shape[-1]  # an adapter may add tokens
    effect = difference(adapter_outputs[..., :num_outputs], base_outputs)
    error = difference(merged_outputs, adapter_outputs)
    print(f"on 4 x 32 random tokens, largest output {size:.3g}")
    print(f"adapter against base:           {effect:.3g}")
    print(f"merged against adapter, fp32:   {error:.3g}")
    # The sums are the same but for their order. fp32 rounds each to 6e-8, which layers multiply.
    if not error <= 1e-4 * size:  # NaN is not
        found = f"the merged model differs from base + adapter by {error:.3g}, more than rounding"
        raise UserError(f"--adapter {source.folder}: {found}; use it unmerged.")
    if effect == 0 and source.adapter_path:
        raise UserError(f"--adapter {source.folder}: it changes nothing; use the base as it is.")
    if error > effect:
        found = f"merging rounds by {error:.3g}, more than the adapter changes"
        raise UserError(f"--adapter {source.folder}: {found}; use it unmerged, or train it longer.")
    print("fine: merged, the model computes what base + adapter compute; the rest is rounding")
    return effect


def read_back(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the model that was written to `folder`, whose weights must be those of `model`."""
    written = load_weights(type(model), str(folder), model.dtype, None)
    merged = model.state_dict()
    for name, tensor in written.state_dict().items():
        if not torch.equal(tensor, merged[name]):
            found = "the written weights are not the merged ones, and are not kept"
            raise UserError(f"{folder}: {found}; try another disk.")
    return written


def compare_written(
    written: PreTrainedModel, tokens: Tensor, adapter_outputs: Tensor, merged_outputs: Tensor
) -> float:
    """Print and return how far the written model's outputs are from those of the adapter.

    Raises UserError where they are not finite.
    """
    written_outputs = outputs(written, tokens)
    rounding = difference(written_outputs, adapter_outputs)
    dtype_name = str(written.dtype).removeprefix("torch.")
    print(f"merged against adapter, {dtype_name}: {rounding:.3g}")
    if written.get_output_embeddings() is not None:  # a language model
        print(f"the most likely token is {same_tokens(written_outputs, adapter_outputs)}")
        if written.dtype != torch.float32:
            in_fp32 = f"{difference(merged_outputs, adapter_outputs):.3g}, and the token"
            in_fp32 += f" {same_tokens(merged_outputs, adapter_outputs)}"
            print(f"with --dtype float32 the difference would be {in_fp32}")
    if not math.isfinite(rounding):
        raise UserError(f"the outputs in {dtype_name} are not finite; add --dtype float32.")
    return rounding


def require_small_rounding(rounding: float, effect: float, dtype: torch.dtype) -> None:
    """Print how rounding to `dtype` compares with the effect of the adapter.

    Raises UserError where it changes the outputs more than the adapter does.
    """
    if rounding > effect:
        found = f"changes more ({rounding:.3g}) than the adapter does"
        dtype_name = str(dtype).removeprefix("torch.")
        raise UserError(f"rounding to {dtype_name} {found}; add --dtype float32.")
    share = rounding / effect
    verdict = "fine" if share <= 0.1 else "coarse (--dtype float32 keeps more)"
    print(f"{verdict}: rounding changes {share:.2g} times what the adapter changes")


def save_scorer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, output: Path
) -> None:
    """Write the backbone and the MLP head in `folder` as one model of two classes.

    The names `model.*`, `score.0` and `score.2` are those of Qwen2ForProcessRewardModel, which vLLM
    serves. transformers' AutoModel reads the backbone of it, and eval.py --checkpoint all of it.
    """
    task = Task(model, tokenizer)
    task.load_head(folder)
    prefix = model.base_model_prefix
    state = {f"{prefix}.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, tensor in two_class_state(task.head).items():
        state[name] = tensor.detach()  # fp32, as it was trained
    model.save_pretrained(output, state_dict=state)
    family = type(model).__name__.removesuffix("Model")
    model.config.architectures = [f"{family}ForProcessRewardModel"]
    model.config.save_pretrained(output)  # in place of the model's own, which names the backbone
