"""The two heads, and the task that joins a backbone with one of them.

A task is a module whose `forward(batch)` returns `(loss_sum, num_targets)`: the backbone reads the packed documents, the
hidden states at the target positions are picked out, and the head turns them into a sum of losses. Language
modelling and step scoring differ in nothing but the head.
"""

from contextlib import contextmanager
import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
import torch
from torch import nn
import torch.nn.functional as F

from lora.adapter import load_adapter, save_adapter
from lora.errors import UserError
from lora.layer import is_causal, lora_layers


class LMHead(nn.Module):
    """The model's own output layer, with cross entropy on the next token."""

    def __init__(self, output_layer):
        super().__init__()
        self.output_layer = output_layer

    def forward(self, hidden, targets):
        """hidden [n, width], targets [n] token ids -> (sum of the losses, per-target loss [n])."""
        losses = F.cross_entropy(self.output_layer(hidden).float(), targets, reduction="none")
        return losses.sum(), losses

    @staticmethod
    def metrics(losses, targets):
        loss = losses.double().mean().item()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class MLPHead(nn.Module):
    """Linear(h, h) - ReLU - Dropout - Linear(h, 1) - sigmoid, with the squared error to a label in 0..1."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))

    def forward(self, hidden, targets):
        """hidden [n, width], targets [n] in 0..1 -> (sum of the squared errors, scores [n])."""
        scores = torch.sigmoid(self.layers(hidden.float()).float()).squeeze(-1)
        return (scores - targets).square().sum(), scores

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
        output_layer = model.get_output_embeddings()
        self.model, self.tokenizer = model, tokenizer
        if output_layer is not None:
            self.head = LMHead(output_layer)
        else:
            self.head = MLPHead(model.config.hidden_size, head_dropout)
        self.causal = is_causal(model)
        # RoBERTa counts positions from its padding index on; the others from 0.
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        self.first_position = 0 if padding is None else padding + 1
        self.has_segments = not self.causal and getattr(model.config, "type_vocab_size", 0) > 1

    def hidden_states(self, batch):
        """What the backbone makes of a micro-batch: [T, width]."""
        segments = {"token_type_ids": batch.segments} if self.has_segments else {}
        out = self.model.base_model(
            input_ids=batch.tokens,
            position_ids=batch.positions + self.first_position,
            lengths=batch.lengths,
            use_cache=False,
            **segments,
        )
        return out.last_hidden_state[0]

    def predict(self, batch):
        """(sum of the losses, what the head says at each target)."""
        return self.head(self.hidden_states(batch).index_select(0, batch.target_positions), batch.targets)

    def forward(self, batch):
        return self.predict(batch)[0], batch.num_targets

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
        folder = Path(folder)
        if (folder / "lora_adapter").is_dir():
            load_adapter(self.model, folder / "lora_adapter")
        elif not (folder / "backbone").is_dir():
            raise UserError(f"{folder}: neither lora_adapter/ nor backbone/ is there.")
        elif lora_layers(self.model):
            raise UserError(f"{folder}: holds a whole model, not an adapter; name its backbone/ as the base_model.")
        else:
            with one_line(folder / "backbone"):
                saved = type(self.model).from_pretrained(folder / "backbone", dtype=torch.float32, local_files_only=True)
                self.model.load_state_dict(saved.state_dict())
        self.load_head(folder)

    def load_head(self, folder):
        """The MLP head in `folder`, where the task has one."""
        if isinstance(self.head, MLPHead):
            path = Path(folder) / "mlp_head.safetensors"
            with one_line(path):
                self.head.load_state_dict(load_file(path))


@contextmanager
def one_line(path):
    """What safetensors, transformers or torch say of weights that are absent, damaged or of another shape."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}") from None
