"""The two heads: each turns the hidden states at the targets into the sum of their losses."""

from collections.abc import Callable
import math

import torch
from torch import Tensor, nn
import torch.nn.functional as F
from transformers import PreTrainedConfig

from lora.layer import LoRALinear
from lora.target_modules import layer_sizes

MAX_LOSS = 88.0  # its exponential is still finite in float32


class LMHead(nn.Module):
    """The model's own output layer, with cross entropy on the next token.

    The logits of all targets would be by far the largest tensor in memory. So they are computed,
    used and dropped chunk by chunk; in training, the gradient is computed right after the logits.
    """

    def __init__(self, get_output_layer: Callable[[], nn.Module], config: PreTrainedConfig) -> None:
        """`get_output_layer` is called every time, because LoRA may replace the layer."""
        super().__init__()
        self.get_output_layer = get_output_layer
        # Cohere and Falcon-H1 multiply their logits, Granite divides them, Gemma 2 and
        # RecurrentGemma cap them.
        factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
        self.scale = factor or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        if self.softcap is None:
            self.softcap = getattr(config, "logits_soft_cap", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, vocabulary] of the hidden states [n, width], in fp32."""
        return self.scale_and_cap(self.get_output_layer()(hidden).float())

    def scale_and_cap(self, logits: Tensor) -> Tensor:
        """Scale and cap the output layer's logits (fp32) in place, as the model's family does."""
        if self.scale != 1:
            logits *= self.scale
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def forward(self, hidden: Tensor, targets: Tensor, loss_weights: Tensor) -> Tensor:
        """Return the weighted sum of the losses: hidden [n, width], targets (token ids) [n]."""
        return ChunkedLoss.apply(self, hidden, targets, loss_weights, *self.weight_and_bias())

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the output layer's weight [vocabulary, width] and bias, with LoRA's update."""
        layer = self.get_output_layer()
        if isinstance(layer, LoRALinear):
            return layer.merged_weight(), layer.merged_bias()
        return layer.weight, layer.bias

    @torch.no_grad()
    def predict(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return [n, 2]: the loss of each target, and 1.0 where it is the most likely token."""
        vocabulary = layer_sizes(self.get_output_layer())[1]
        predictions = []
        for chunk in self.chunks(hidden, vocabulary):
            logits = self.logits(hidden[chunk])
            losses = F.cross_entropy(logits, targets[chunk], reduction="none")
            correct = logits.argmax(-1) == targets[chunk]
            predictions.append(torch.stack([losses, correct.float()], 1))
        return torch.cat(predictions)

    @staticmethod
    def losses(predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each target, [n], from what `predict` returned."""
        return predictions[:, 0]

    @staticmethod
    def chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
        """Divide the targets into chunks whose logits have a size that the device is fast with."""
        num_logits = 2**28 if hidden.is_cuda else 2**23
        size = max(16, num_logits // vocabulary)
        return [slice(start, start + size) for start in range(0, len(hidden), size)]

    @staticmethod
    def metrics(predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the loss (nats per target), the perplexity, and the accuracy of the tokens."""
        loss, accuracy = predictions.double().mean(0).tolist()
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, MAX_LOSS)),
            "token_accuracy": accuracy,
        }


class ChunkedLoss(torch.autograd.Function):
    """The sum of an LMHead's losses; its forward pass computes the gradients as well."""

    @staticmethod
    def forward(ctx, head, hidden, targets, loss_weights, weight, bias):
        """Return the loss as LMHead.forward does; weight and bias are the output layer's."""
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        cast_weight = weight.to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)

        loss_sum = torch.zeros((), device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = bias_grad = None
        if weight.requires_grad:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        if bias is not None and bias.requires_grad:
            bias_grad = torch.zeros_like(bias, dtype=torch.float32)

        with torch.autocast(device, enabled=False):
            for chunk in head.chunks(hidden, len(weight)):
                states = hidden[chunk].to(dtype)
                logits = F.linear(states, cast_weight, cast_bias).float()
                loss, logits_grad = loss_and_gradient(
                    head, logits, targets[chunk, None], loss_weights[chunk, None]
                )
                loss_sum += loss
                logits_grad = logits_grad.to(dtype)
                hidden_grad[chunk] = logits_grad @ cast_weight
                if weight_grad is not None:
                    weight_grad += logits_grad.T @ states
                if bias_grad is not None:
                    bias_grad += logits_grad.sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        return loss_sum

    @staticmethod
    def backward(ctx, loss_grad):
        gradients = [None if grad is None else grad.mul_(loss_grad) for grad in ctx.saved_tensors]
        hidden_grad, weight_grad, bias_grad = gradients
        return None, hidden_grad, None, None, weight_grad, bias_grad


def loss_and_gradient(
    head: LMHead, logits: Tensor, targets: Tensor, loss_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of a chunk, and its gradient at the output layer's logits.

    With x the output layer's logits, z = cap tanh(scale x / cap), or z = scale x without a cap. The
    gradient of a loss is (softmax(z) - one-hot) (1 - z^2 / cap^2) scale. It takes the memory of
    `logits` [n, vocabulary], in fp32. `targets` (token ids) and `loss_weights` are [n, 1].
    """
    logits = head.scale_and_cap(logits)
    slope = 1 - (logits / head.softcap).square_() if head.softcap else None
    largest = logits.amax(1, keepdim=True)
    target_logits = logits.gather(1, targets)
    exponentials = logits.sub_(largest).exp_()
    sums = exponentials.sum(1, keepdim=True)
    # The logarithm is added last: added to a large logit, it would lose its digits.
    losses = largest - target_logits + sums.log()
    gradient = exponentials.mul_(loss_weights * head.scale / sums)
    gradient.scatter_add_(1, targets, -loss_weights * head.scale)
    if slope is not None:
        gradient.mul_(slope)
    return (losses * loss_weights).sum(), gradient


class MLPHead(nn.Module):
    """Linear(h, h) - ReLU - Dropout - Linear(h, 1) - sigmoid, with a loss against labels in 0..1.

    `loss` is "mse" or "bce", binary cross entropy. Both are smallest where score and label agree.
    """

    def __init__(self, width: int, dropout: float = 0.0, loss: str = "mse") -> None:
        super().__init__()
        self.loss = loss
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n] of the hidden states [n, width]; a score is the sigmoid of one."""
        first, relu, dropout, last = self.layers
        # In fp32, also under autocast, and where FSDP has gathered the weights in 16 bits.
        with torch.autocast(hidden.device.type, enabled=False):
            inner = F.linear(hidden.float(), first.weight.float(), first.bias.float())
            inner = dropout(relu(inner))
            return F.linear(inner, last.weight.float(), last.bias.float()).squeeze(-1)

    def predict(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the scores [n] of the hidden states [n, width]."""
        return torch.sigmoid(self.logits(hidden))

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each score, [n]."""
        if self.loss == "bce":
            scores = scores.clamp(max=1 - 2**-24)  # float32 rounds higher ones to 1
            return F.binary_cross_entropy(scores, targets, reduction="none")
        return (scores - targets).square()

    def forward(self, hidden: Tensor, targets: Tensor, loss_weights: Tensor) -> Tensor:
        """Return the sum of the losses, a scalar; as in LMHead, with labels in 0..1 as targets."""
        logits = self.logits(hidden)
        if self.loss == "bce":  # of the logits, because the sigmoid rounds large ones to 1
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        else:
            losses = self.losses(torch.sigmoid(logits), targets)
        return (losses * loss_weights).sum()

    def metrics(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """Return loss, mse, mae, and r2 = 1 - mse / variance of the targets (NaN without one)."""
        predictions, targets = predictions.double(), targets.double()
        errors = predictions - targets
        mse = errors.square().mean().item()
        variance = targets.var(correction=0).item()
        r2 = 1 - mse / variance if variance else math.nan
        loss = self.losses(predictions, targets).mean().item()
        return {"loss": loss, "mse": mse, "mae": errors.abs().mean().item(), "r2": r2}
