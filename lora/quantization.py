"""A base of 4 bits (QLoRA, Dettmers et al. 2023, section 3): bitsandbytes' Linear4bit, quantised
while the files are read.

transformers would do the same with accelerate; here its loader is given a quantizer of our own
through `register_quantizer`, and the bytes are the same. bitsandbytes takes seconds to import and
is loaded where it is used.
"""

import importlib
import logging
import sys

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora.common.errors import UserError
from lora.target_modules import layer_sizes, linear_names


def bitsandbytes(purpose, device):
    """The library, for `purpose` on `device`. Raises UserError where it is not there or cannot do
    that.
    """
    if device.type == "mps":
        raise UserError(
            f"{purpose}: not on mps, where bitsandbytes cannot train; leave it out, or add --device cpu."
        )
    # It warns of kernels that it would have downloaded
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Or it would download programs from the Hub, where that package is installed
    sys.modules.setdefault("kernels", None)
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{purpose}: bitsandbytes cannot be loaded ({str(error).splitlines()[0]}); leave it out."
        ) from None


@register_quantization_config("plainlora_4bit")
class FourBitSettings(QuantizationConfigMixin):
    """How the linear layers are quantised, and on which device.

    `damaged` lists what was wrong with the weights that were read: transformers would swallow an
    error there.
    """

    def __init__(self, quant_type, double_quant, compute_dtype, device):
        self.quant_method = "plainlora_4bit"
        self.device, self.damaged = device, []
        self.layer = {
            "quant_type": quant_type,
            "compress_statistics": double_quant,
            "compute_dtype": compute_dtype,
        }


@register_quantizer("plainlora_4bit")
class FourBitQuantizer(HfQuantizer):
    """What transformers' loader asks for: modules to put in place first, and what to do with a
    weight that it has read.
    """

    is_trainable = True

    def is_serializable(self):
        return False

    def _process_model_before_weight_loading(self, model, **others):
        bnb = importlib.import_module("bitsandbytes")
        for name in linear_names(model):
            old = model.get_submodule(name)
            new = bnb.nn.Linear4bit(
                *layer_sizes(old),
                old.bias is not None,
                **self.quantization_config.layer,
                device="meta",
            )
            new.was_conv1d = isinstance(old, Conv1D)
            # Else bitsandbytes 0.50.2 repacks the weight at the first evaluation, and gradients are
            # cut from then on.
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(name, new)

    def param_needs_quantization(self, model, param_name, **others):
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and is_4bit(model.get_submodule(name))

    def get_quantize_ops(self):
        return Quantise(self.quantization_config)


class Quantise(ConversionOps):
    """A dense weight as it was read -> Params4bit."""

    def __init__(self, settings):
        self.settings = settings

    def convert(self, input_dict, model, **others):
        bnb = importlib.import_module("bitsandbytes")
        quantised = {}
        for name, (weight,) in input_dict.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            device, how = self.settings.device, self.settings.layer
            weight = (weight.T if layer.was_conv1d else weight).to(device).contiguous()
            if not weight.isfinite().all():
                self.settings.damaged.append(f"{name} is not finite")
            if weight.shape != (layer.out_features, layer.in_features):
                self.settings.damaged.append(f"{name} is of another shape than config.json says")
            quantised[name] = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type=how["quant_type"], compress_statistics=how["compress_statistics"],
                module=layer,
            ).to(device)  # fmt: skip
            layer._is_hf_initialized = True  # transformers would draw it anew
        return quantised


def is_4bit(layer):
    return any(kind.__name__ == "Linear4bit" for kind in type(layer).__mro__)


def share_4bit(model):
    """What part of the model's weights is in 4 bits: experts that transformers keeps as one tensor
    are not.
    """
    layer_sizes = {
        name: m.in_features * m.out_features for name, m in model.named_modules() if is_4bit(m)
    }
    dense = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.removesuffix(".weight") not in layer_sizes
    )
    return sum(layer_sizes.values()) / (sum(layer_sizes.values()) + dense)


def dense_weight(layer):
    """[out, in], fp32: the weight of nn.Linear, Conv1D or Linear4bit."""
    if is_4bit(layer):
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).float()


def dense(layer):
    """The layer itself, or of a Linear4bit the nn.Linear or Conv1D it stands for, in the type it
    was quantised from.
    """
    if not is_4bit(layer):
        return layer
    weight = dense_weight(layer)
    with torch.device("meta"):
        if getattr(layer, "was_conv1d", False):
            new, weight = Conv1D(*weight.shape), weight.T.contiguous()
        else:
            new = nn.Linear(*reversed(weight.shape), bias=layer.bias is not None)
    weight = weight.to(layer.weight.quant_state.dtype)
    new.weight, new.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return new


def dequantize(model):
    """Every Linear4bit of `model` as the dense layer that it stands for, in place."""
    for name, layer in list(model.named_modules()):
        if is_4bit(layer):
            model.set_submodule(name, dense(layer))
