"""The two heads: sums of losses from the hidden states at target positions. Language modelling and
step scoring differ in nothing but the head.
"""

import math

import torch
from torch import nn
import torch.nn.functional as F

from lora.layer import LoRALinear
from lora.target_modules import layer_sizes


class LMHead(nn.Module):
    """The model's own output layer, with cross entropy on the next token.

    The logits of all targets would be the largest thing in memory by far. They are made, used and
    dropped a chunk of targets at a time, and in training the gradient is taken there and then, so
    that nothing is computed twice.
    """

    def __init__(self, find_output_layer, shape):
        """find_output_layer() -> nn.Linear or LoRALinear: asked each time, as LoRA may be put over
        it.
        """
        super().__init__()
        self.find_output_layer = find_output_layer
        # Granite divides its logits, Cohere multiplies them, Gemma 2 caps them.
        self.scale = getattr(shape, "logit_scale", None) or 1 / (
            getattr(shape, "logits_scaling", None) or 1.0
        )
        self.cap = getattr(shape, "final_logit_softcapping", None)

    def logits(self, hidden):
        """hidden [n, width] -> [n, vocabulary], fp32."""
        return self.shaped(self.find_output_layer()(hidden).float())

    def shaped(self, logits):
        """What the family makes of its output layer's logits [n, vocabulary] (fp32), in place."""
        if self.scale != 1:
            logits *= self.scale
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits

    def forward(self, hidden, targets, weights=None):
        """hidden [n, width], targets [n] token ids, weights [n] of their losses (None: 1 each) ->
        sum of the losses.
        """
        layer = self.find_output_layer()
        weights = torch.ones(len(targets), device=hidden.device) if weights is None else weights
        if isinstance(layer, LoRALinear):
            return ChunkedLoss.apply(
                self, hidden, targets, weights, layer.merged_weight(), layer.merged_bias()
            )
        return ChunkedLoss.apply(self, hidden, targets, weights, layer.weight, layer.bias)

    @torch.no_grad()
    def predict(self, hidden, targets):
        """[n, 2]: the loss at each target, and 1.0 where the target is the likeliest token."""
        said = []
        for part in self.chunks(hidden, layer_sizes(self.find_output_layer())[1]):
            logits = self.logits(hidden[part])
            losses = F.cross_entropy(logits, targets[part], reduction="none")
            said.append(torch.stack([losses, (logits.argmax(-1) == targets[part]).float()], 1))
        return torch.cat(said)

    @staticmethod
    def chunks(hidden, vocabulary):
        """Slices of the targets, so many at a time that their logits are of a size the device is
        quick with.
        """
        logits = 2**28 if hidden.is_cuda else 2**23
        size = max(16, logits // vocabulary)
        return [slice(start, start + size) for start in range(0, len(hidden), size)]

    @staticmethod
    def metrics(said, targets):
        """loss (nats per target), perplexity, and the share of targets that were the likeliest
        token.
        """
        loss, accuracy = said.double().mean(0).tolist()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}


class ChunkedLoss(torch.autograd.Function):
    """The sum of an LMHead's losses. Its forward makes the gradients as well: of the hidden states,
    and of the output layer's weights if these are trained.

    Of z = cap tanh(scale h W / cap), or scale h W, the gradient is (softmax(z) - one-hot) (1 - z^2
    / cap^2) scale.
    """

    @staticmethod
    def forward(ctx, head, hidden, targets, loss_weights, weight, bias):
        """hidden [n, width]; targets, loss_weights [n]; the layer's weight [vocabulary, width] and
        bias -> scalar.
        """
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
        layer_weight, layer_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        of_bias = (
            torch.zeros_like(bias, dtype=torch.float32)
            if bias is not None and bias.requires_grad
            else None
        )
        with torch.autocast(device, enabled=False):
            for part in head.chunks(hidden, len(weight)):
                states, wanted, counts = (
                    hidden[part].to(dtype),
                    targets[part, None],
                    loss_weights[part, None],
                )
                logits = head.shaped(F.linear(states, layer_weight, layer_bias).float())
                slope = 1 - (logits / head.cap).square_() if head.cap else None
                largest, of_wanted = logits.amax(1, keepdim=True), logits.gather(1, wanted)
                # Of the probability, in place of the logits from here on
                share = logits.sub_(largest).exp_()
                sums = share.sum(1, keepdim=True)
                # In this order: large logits would swallow the logarithm.
                total += ((largest - of_wanted + sums.log()) * counts).sum()
                share.mul_(counts * head.scale / sums).scatter_add_(1, wanted, -counts * head.scale)
                gradient = (share if slope is None else share.mul_(slope)).to(dtype)
                of_hidden[part] = gradient @ layer_weight
                if of_weight is not None:
                    of_weight += gradient.T @ states
                if of_bias is not None:
                    of_bias += gradient.sum(0)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx, of_loss):
        gradients = [
            None if gradient is None else gradient.mul_(of_loss) for gradient in ctx.saved_tensors
        ]
        return None, gradients[0], None, None, *gradients[1:]


class MLPHead(nn.Module):
    """Linear(h, h) - ReLU - Dropout - Linear(h, 1) - sigmoid, and a loss against a label in 0..1.

    `loss` is "mse", the squared error, or "bce", the binary cross entropy. Both are least where the
    score is the label.
    """

    def __init__(self, width, dropout=0.0, loss="mse"):
        super().__init__()
        self.loss = loss
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )

    def logits(self, hidden):
        """hidden [n, width] -> [n]; the score is their sigmoid."""
        return self.layers(hidden.float()).float().squeeze(-1)

    def predict(self, hidden, targets):
        """hidden [n, width] -> scores [n]."""
        return torch.sigmoid(self.logits(hidden))

    def losses(self, scores, targets):
        """[n]: the loss of each score."""
        if self.loss == "bce":
            return F.binary_cross_entropy(scores, targets, reduction="none")
        return (scores - targets).square()

    def forward(self, hidden, targets, weights=None):
        """hidden [n, width], targets [n] in 0..1, weights [n] of their losses (None: 1 each) -> sum
        of the losses.
        """
        logits = self.logits(hidden)
        if self.loss == "bce":  # of the logits: the sigmoid rounds large ones to 1
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        else:
            losses = self.losses(torch.sigmoid(logits), targets)
        return (losses if weights is None else losses * weights).sum()

    def metrics(self, scores, targets):
        """mse, mae and r2 = 1 - mse / variance (0: no better than always saying the mean; NaN
        without variance).
        """
        error = (scores - targets).double()
        mse, variance = error.square().mean().item(), targets.double().var(correction=0).item()
        r2 = 1 - mse / variance if variance else math.nan
        loss = (
            self.losses(scores.double(), targets.double()).mean().item()
            if self.loss == "bce"
            else mse
        )
        return {"loss": loss, "mse": mse, "mae": error.abs().mean().item(), "r2": r2}
