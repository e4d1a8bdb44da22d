"""A base in 4 bits (QLoRA; Dettmers et al. 2023, section 3): bitsandbytes' Linear4bit.

Weights are quantised while their files are read, by a quantizer that transformers' loader is given,
to the same bytes as transformers' own (which needs accelerate). bitsandbytes takes seconds to
import, so each function that uses it imports it.
"""

import logging
import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora.common.errors import UserError
from lora.target_modules import layer_sizes, linear_names


def import_bitsandbytes(purpose: str, device: torch.device) -> ModuleType:
    """Import bitsandbytes for `purpose`. Raises UserError if it is missing or `device` is mps."""
    if device.type == "mps":
        why = "not on mps, where bitsandbytes cannot train"
        raise UserError(f"{purpose}: {why}; leave it out, or add --device cpu.")
    # bitsandbytes warns of kernels that it would have downloaded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Where the package `kernels` is installed, bitsandbytes would download programs from the Hub.
    sys.modules.setdefault("kernels", None)
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        why = f"bitsandbytes cannot be loaded ({str(error).splitlines()[0]})"
        raise UserError(f"{purpose}: {why}; leave it out.") from None
    return bitsandbytes


@register_quantization_config("plainlora_4bit")
class FourBitSettings(QuantizationConfigMixin):
    """How the linear layers are quantised, and on which device."""

    def __init__(
        self, quant_type: str, double_quant: bool, compute_dtype: torch.dtype, device: torch.device
    ) -> None:
        self.quant_method = "plainlora_4bit"
        self.device = device
        # What was wrong with the weights; transformers swallows errors raised while it reads them.
        self.damaged: list[str] = []
        self.weight_options = {"quant_type": quant_type, "compress_statistics": double_quant}
        self.layer_options = {**self.weight_options, "compute_dtype": compute_dtype}


@register_quantizer("plainlora_4bit")
class FourBitQuantizer(HfQuantizer):
    """Tells transformers' loader which layers to replace, and which weights to quantise."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **_) -> None:
        import bitsandbytes as bnb

        options = self.quantization_config.layer_options
        for name in linear_names(model):
            old = model.get_submodule(name)
            has_bias = old.bias is not None
            new = bnb.nn.Linear4bit(*layer_sizes(old), has_bias, **options, device="meta")
            new.was_conv1d = isinstance(old, Conv1D)
            # Otherwise bitsandbytes 0.50.2 repacks the weight at the first evaluation on some CPUs,
            # and gradients are cut from then on.
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(name, new)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **unused) -> bool:
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and is_4bit(model.get_submodule(name))

    def get_quantize_ops(self) -> ConversionOps:
        return Quantise(self.quantization_config)


class Quantise(ConversionOps):
    """Quantises a dense weight that was read: it becomes bitsandbytes' Params4bit."""

    def __init__(self, settings: FourBitSettings) -> None:
        self.settings = settings

    def convert(self, input_dict: dict, model: nn.Module, **_) -> dict[str, nn.Parameter]:
        import bitsandbytes as bnb

        quantised = {}
        for name, (weight,) in input_dict.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            if layer.was_conv1d:
                weight = weight.T
            weight = weight.to(self.settings.device).contiguous()
            if not weight.isfinite().all():
                self.settings.damaged.append(f"{name} is not finite")
            if weight.shape != (layer.out_features, layer.in_features):
                self.settings.damaged.append(f"{name} is of another shape than config.json says")
            weight = bnb.nn.Params4bit(weight, False, module=layer, **self.settings.weight_options)
            quantised[name] = weight.to(self.settings.device)  # this quantises it
            layer._is_hf_initialized = True  # otherwise transformers initialises it again
        return quantised


def is_4bit(layer: nn.Module) -> bool:
    """Return whether a layer is bitsandbytes' Linear4bit, without importing bitsandbytes."""
    return any(parent.__name__ == "Linear4bit" for parent in type(layer).__mro__)


def share_4bit(model: nn.Module) -> float:
    """Return the share of the weights that is in 4 bits; experts kept as one tensor are not."""
    return 2 * bytes_in_4bit(model) / count_parameters(model)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights; a byte of a 4-bit layer's weight holds two of them."""
    return sum(p.numel() for p in model.parameters()) + bytes_in_4bit(model)


def bytes_in_4bit(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if is_4bit(module))


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight of nn.Linear, Conv1D or Linear4bit as [out, in] in fp32."""
    if is_4bit(layer):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).float()


def dense(layer: nn.Module) -> nn.Module:
    """Return the layer, or the dense one that a Linear4bit was made from, with its dtype."""
    if not is_4bit(layer):
        return layer
    weight = dense_weight(layer).to(layer.weight.quant_state.dtype)
    with torch.device("meta"):  # allocates no memory, as the weight is set below
        if getattr(layer, "was_conv1d", False):
            new = Conv1D(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
        else:
            new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = layer.bias
    return new
