"""The two heads, and the task that joins a backbone with one of them.

A task is a module whose `forward(batch)` returns `(loss_sum, num_targets)`: the backbone reads the packed documents, the
hidden states at the target positions are picked out, and the head turns them into a sum of losses. Language
modelling and step scoring differ in nothing but the head.
"""

from contextlib import contextmanager
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
import torch
from torch import nn
import torch.nn.functional as F

from lora.adapter import load_adapter, save_adapter
from lora.distributed import fill, my_rows
from lora.errors import UserError
from lora.layer import LoRALinear, is_causal, is_tied, lora_layers, merge, sizes, train_all
from lora.shards import INDEX, Shards


class LMHead(nn.Module):
    """The model's own output layer, with cross entropy on the next token.

    The logits of all targets would be the largest thing in memory by far. They are made, used and dropped a chunk of
    targets at a time, and in training the gradient is taken there and then, so that nothing is computed twice.
    """

    def __init__(self, find_output_layer, shape):
        """find_output_layer() -> nn.Linear or LoRALinear: asked each time, as LoRA may be put over it."""
        super().__init__()
        self.find_output_layer = find_output_layer
        # Granite divides its logits, Cohere multiplies them, Gemma 2 caps them.
        self.scale = getattr(shape, "logit_scale", None) or 1 / (getattr(shape, "logits_scaling", None) or 1.0)
        self.cap = getattr(shape, "final_logit_softcapping", None)

    def logits(self, hidden):
        """hidden [n, width] -> [n, vocabulary], fp32."""
        return self.shaped(self.find_output_layer()(hidden).float())

    def shaped(self, logits):
        """What the family makes of its output layer's logits [n, vocabulary] (fp32), in place."""
        logits *= self.scale
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits

    def forward(self, hidden, targets):
        """hidden [n, width], targets [n] token ids -> sum of the losses."""
        layer = self.find_output_layer()
        if isinstance(layer, LoRALinear):
            return ChunkedLoss.apply(self, hidden, targets, layer.merged_weight(), layer.merged_bias())
        return ChunkedLoss.apply(self, hidden, targets, layer.weight, layer.bias)

    @torch.no_grad()
    def predict(self, hidden, targets):
        """[n, 2]: the loss at each target, and 1.0 where the target is the likeliest token."""
        said = []
        for part in self.chunks(hidden, sizes(self.find_output_layer())[1]):
            logits = self.logits(hidden[part])
            losses = F.cross_entropy(logits, targets[part], reduction="none")
            said.append(torch.stack([losses, (logits.argmax(-1) == targets[part]).float()], 1))
        return torch.cat(said)

    @staticmethod
    def chunks(hidden, vocabulary):
        """Slices of the targets, so many at a time that their logits are of a size the device is quick with."""
        logits = 2**28 if hidden.is_cuda else 2**23
        size = max(16, logits // vocabulary)
        return [slice(start, start + size) for start in range(0, len(hidden), size)]

    @staticmethod
    def metrics(said, targets):
        """loss (nats per target), perplexity, and the share of targets that were the likeliest token."""
        loss, accuracy = said.double().mean(0).tolist()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}


class ChunkedLoss(torch.autograd.Function):
    """The sum of an LMHead's losses, with the gradients of the hidden states and of its weights, if these are trained.

    Of z = cap tanh(scale h W / cap), or scale h W, the gradient is (softmax(z) - one-hot) (1 - z^2 / cap^2) scale.
    """

    @staticmethod
    def forward(ctx, head, hidden, targets, weight, bias):
        """head LMHead, hidden [n, width], targets [n], weight [vocabulary, width], bias [vocabulary] or None -> scalar."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        cast, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight) if weight.requires_grad else None
        of_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        with torch.autocast(device, enabled=False):
            for part in head.chunks(hidden, len(weight)):
                states, wanted = hidden[part].to(dtype), targets[part, None]
                logits = head.shaped(F.linear(states, cast, cast_bias).float())
                slope = 1 - (logits / head.cap).square_() if head.cap else 1.0
                largest, said = logits.amax(1, keepdim=True), logits.gather(1, wanted)
                share = logits.sub_(largest).exp_()  # of the probability, in place of the logits from here on
                sums = share.sum(1, keepdim=True)
                total += (largest - said + sums.log()).sum()  # in this order: large logits would swallow the logarithm
                share.div_(sums).scatter_add_(1, wanted, share.new_full(wanted.shape, -1.0))
                gradient = share.mul_(slope).mul_(head.scale).to(dtype)
                of_hidden[part] = gradient @ cast
                if of_weight is not None:
                    of_weight += gradient.T @ states
                if of_bias is not None:
                    of_bias += gradient.sum(0)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx, of_loss):
        gradients = [None if gradient is None else gradient.mul_(of_loss) for gradient in ctx.saved_tensors]
        return None, gradients[0], None, *gradients[1:]


class MLPHead(nn.Module):
    """Linear(h, h) - ReLU - Dropout - Linear(h, 1) - sigmoid, with the squared error to a label in 0..1."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))

    def two_rows(self):
        """The head as others serve it, Linear - ReLU - Linear to two classes: softmax([0, z])[1] = sigmoid(z)."""
        first, last = self.layers[0], self.layers[3]
        rows = {name: torch.cat([torch.zeros_like(p), p]) for name, p in last.named_parameters()}
        return {f"score.0.{name}": p for name, p in first.named_parameters()} | {f"score.2.{n}": p for n, p in rows.items()}

    def load_two_rows(self, tensors):
        """Take over what `two_rows` gave, or the head of another such model: only the rows' difference counts."""
        last = {name: tensors[f"score.2.{name}"] for name in ("weight", "bias")}
        state = {f"0.{name}": tensors[f"score.0.{name}"] for name in ("weight", "bias")}
        self.layers.load_state_dict(state | {f"3.{name}": rows[1:] - rows[:1] for name, rows in last.items()})

    def predict(self, hidden, targets):
        """hidden [n, width] -> scores [n]."""
        return torch.sigmoid(self.layers(hidden.float()).float()).squeeze(-1)

    def forward(self, hidden, targets):
        """hidden [n, width], targets [n] in 0..1 -> sum of the squared errors."""
        return (self.predict(hidden, targets) - targets).square().sum()

    @staticmethod
    def metrics(scores, targets):
        """mse, mae and r2 = 1 - mse / variance (0: no better than always saying the mean; NaN without variance)."""
        error = (scores - targets).double()
        mse, variance = error.square().mean().item(), targets.double().var(correction=0).item()
        r2 = 1 - mse / variance if variance else math.nan
        return {"loss": mse, "mse": mse, "mae": error.abs().mean().item(), "r2": r2}


class Task(nn.Module):
    """A model of transformers and a head, saved and loaded as one: `save(folder)`, `load(folder)`.

    `model` is a causal LM (its own output layer is then the head), or a bare backbone under an MLPHead.
    """

    def __init__(self, model, tokenizer, base_dtype=torch.float32, head_dropout=0.0):
        super().__init__()
        self.base_dtype = base_dtype  # of the base's files, and of the final artifact
        self.model, self.tokenizer = model, tokenizer
        if model.get_output_embeddings() is not None:
            self.head = LMHead(model.get_output_embeddings, model.config.get_text_config())
        else:
            self.head = MLPHead(model.config.hidden_size, head_dropout)
        self.causal = is_causal(model)
        self.packed = True  # False for a model whose attention cannot be told where documents end: its rows are padded
        # RoBERTa counts positions from its padding index on; the others from 0.
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        self.first_position = 0 if padding is None else padding + 1
        self.has_segments = not self.causal and getattr(model.config, "type_vocab_size", 0) > 1

    def hidden_states(self, batch):
        """What the backbone makes of a micro-batch: [number of its positions, width]."""
        packed = {}
        if self.packed:
            packed = {"position_ids": batch.positions + self.first_position, "lengths": batch.lengths}
            if self.has_segments:
                packed["token_type_ids"] = batch.segments
        # Padding on the right of a causal model is seen by nobody, so no mask is needed there.
        out = self.model.base_model(input_ids=batch.tokens, use_cache=False, **packed)
        return out.last_hidden_state.flatten(0, 1)

    def at_targets(self, batch):
        return self.hidden_states(batch).index_select(0, batch.target_positions)

    def predict(self, batch):
        """What the head says at each target."""
        return self.head.predict(self.at_targets(batch), batch.targets)

    def forward(self, batch):
        return self.head(self.at_targets(batch), batch.targets), batch.num_targets

    def save(self, folder):
        """Write what was trained: `lora_adapter/`, or `backbone/` as a plain Hugging Face folder; and the MLP head."""
        folder = Path(folder)
        if lora_layers(self.model):
            save_adapter(self.model, folder / "lora_adapter")
        else:
            self.model.save_pretrained(folder / "backbone")
            self.tokenizer.save_pretrained(folder / "backbone")
        if isinstance(self.head, MLPHead):
            save_file(self.head.state_dict(), folder / "mlp_head.safetensors", {"format": "pt"})

    def save_artifact(self, folder):
        """`save`, with the backbone in the base's own type from now on (adapters stay fp32), and the tokenizer."""
        if not lora_layers(self.model):
            self.model.to(self.base_dtype)
        Path(folder).mkdir(exist_ok=True)
        self.save(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder):
        """The weights that `save` wrote, into this task. Raises UserError where they do not fit."""
        self.load_model(Path(folder))
        if not (Path(folder) / INDEX).is_file():
            self.load_head(folder)

    def load_model(self, folder):
        """`load` without the MLP head."""
        if (folder / "lora_adapter").is_dir():
            load_adapter(self.model, folder / "lora_adapter")
        elif (folder / INDEX).is_file():
            with one_line(folder):
                saved = Shards(folder)
                for name, parameter in self.named_parameters():
                    if name in saved.index:
                        fill(parameter, saved.get(name, *my_rows(parameter)))
        elif not (folder / "backbone").is_dir():
            raise UserError(f"{folder}: neither lora_adapter/ nor backbone/ is there.")
        elif lora_layers(self.model):
            raise UserError(f"{folder}: holds a whole model, not an adapter; name its backbone/ as the base_model.")
        else:
            with one_line(folder / "backbone"):
                saved, info = type(self.model).from_pretrained(
                    folder / "backbone", dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
                if info["missing_keys"]:  # a scorer's backbone has no output layer
                    raise ValueError(f"no weights for {', '.join(sorted(info['missing_keys']))}")
                state = saved.state_dict()
                for name, tensor in self.model.state_dict().items():
                    fill(tensor, state[name][slice(*my_rows(tensor))] if tensor.ndim else state[name])

    def start_from(self, folder):
        """Begin with the weights of an earlier stage: an adapter, a checkpoint or a final artifact. Raises UserError.

        LoRA goes on with the adapter; full fine-tuning folds it into the weights. A scorer's head comes along.
        """
        folder, trains_lora = Path(folder), bool(lora_layers(self.model))
        adapter = folder if (folder / "adapter_config.json").is_file() else folder / "lora_adapter"
        if adapter.is_dir():
            was_tied, tokens = is_tied(self.model), self.model.get_input_embeddings().num_embeddings
            load_adapter(self.model, adapter)
            if not trains_lora:
                merge(self.model)
                train_all(self.model)
            found = self.model.get_input_embeddings().num_embeddings
            if found != tokens:
                raise UserError(f"{adapter}: has embeddings of {found} tokens, not {tokens}; add its --add_special_tokens.")
            if was_tied and not is_tied(self.model):  # a resumed run would begin with the base's tied ones
                raise UserError(f"{adapter}: gives the model a head of its own; merge it (merge.py), and train the result.")
        else:
            self.load_model(folder)
        if (folder / "mlp_head.safetensors").is_file():
            self.load_head(folder)

    def load_head(self, folder):
        """The MLP head in `folder`, where the task has one: a file of its own, or among the weights of a merged scorer."""
        if not isinstance(self.head, MLPHead):
            return
        path = Path(folder) / "mlp_head.safetensors"
        with one_line(path):
            if path.is_file():
                for name, tensor in load_file(path).items():
                    parameter = self.head.get_parameter(name)
                    fill(parameter, tensor[slice(*my_rows(parameter))])
                return
            score = {}
            for path in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    score |= {name: file.get_tensor(name).float() for name in file.keys() if name.startswith("score.")}
            if len(score) != 4 or len(score["score.2.weight"]) != 2:
                raise UserError(
                    f"{folder}: no mlp_head.safetensors, and no score.0 and score.2 (of two rows) in its weights."
                )
            self.head.load_two_rows(score)


@contextmanager
def one_line(path):
    """What safetensors, transformers or torch say of weights that are absent, damaged or of another shape."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}") from None
