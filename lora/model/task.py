"""The task: a backbone and a head as one module, whose `forward(batch)` returns `(loss_sum,
num_targets)`.

The backbone reads the packed documents, the hidden states at the target positions are picked out,
and the head turns them into a sum of losses.
"""

from pathlib import Path

from safetensors.torch import load_file, save_file
import torch
from torch import nn

from lora.adapter import load_adapter, save_adapter
from lora.common.errors import UserError, library_errors
from lora.distributed.sharded_checkpoint import INDEX_FILE, Shards
from lora.distributed.sharding import copy_into
from lora.layer import lora_layers, merge
from lora.model.attention import Documents
from lora.model.heads import LMHead, MLPHead
from lora.model.pretrained_heads import load_two_rows
from lora.target_modules import is_causal, is_tied, require_all_grads


class Task(nn.Module):
    """A model of transformers and a head, saved and loaded as one: `save(folder)`, `load(folder)`.

    `model` is a causal LM (its own output layer is then the head), or a bare backbone under an
    MLPHead.
    """

    def __init__(
        self, model, tokenizer, base_dtype=torch.float32, head_dropout=0.0, score_loss="mse"
    ):
        super().__init__()
        self.base_dtype = base_dtype  # of the base's files, and of the final artifact
        self.model, self.tokenizer = model, tokenizer
        if model.get_output_embeddings() is not None:
            self.head = LMHead(model.get_output_embeddings, model.config.get_text_config())
        else:
            self.head = MLPHead(model.config.hidden_size, head_dropout, score_loss)
        self.causal = is_causal(model)
        # False for a model whose attention cannot be told where documents end: its rows are padded
        self.packed = True
        # RoBERTa counts positions from its padding index on; the others from 0.
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        self.first_position = 0 if padding is None else padding + 1
        self.uses_token_type_ids = (
            not self.causal and getattr(model.config, "type_vocab_size", 0) > 1
        )

    def hidden_states(self, batch):
        """What the backbone makes of a micro-batch: [number of its positions, width]."""
        packed = {}
        if self.packed:
            packed = {
                "position_ids": batch.position_ids + self.first_position,
                "documents": Documents(batch.seq_lens),
            }
            if self.uses_token_type_ids:
                packed["token_type_ids"] = batch.token_type_ids
        # Padding on the right of a causal model is seen by nobody, so no mask is needed there.
        out = self.model.base_model(input_ids=batch.input_ids, use_cache=False, **packed)
        return out.last_hidden_state.flatten(0, 1)

    @property
    def frozen(self):
        """Whether nothing of the model is trained, and the head alone is."""
        return not any(p.requires_grad for p in self.model.parameters())

    def target_hidden_states(self, batch):
        """The hidden states at the targets [n, width]: those that the batch brings along, else the
        backbone's.
        """
        if batch.features is not None:
            return batch.features
        return self.hidden_states(batch).index_select(0, batch.target_positions)

    def predict(self, batch):
        """What the head says at each target."""
        return self.head.predict(self.target_hidden_states(batch), batch.targets)

    def forward(self, batch):
        return self.head(
            self.target_hidden_states(batch), batch.targets, batch.loss_weights
        ), batch.num_targets

    def save(self, folder):
        """Write what was trained: `lora_adapter/`, or `backbone/` as a plain Hugging Face folder;
        and the MLP head.

        Of a head on a frozen base that is `mlp_head.safetensors` alone.
        """
        folder = Path(folder)
        if lora_layers(self.model):
            save_adapter(self.model, folder / "lora_adapter")
        elif not self.frozen:
            self.model.save_pretrained(folder / "backbone")
            self.tokenizer.save_pretrained(folder / "backbone")
        if isinstance(self.head, MLPHead):
            save_file(self.head.state_dict(), folder / "mlp_head.safetensors", {"format": "pt"})

    def save_artifact(self, folder):
        """`save`, with the backbone in the base's own type from now on (adapters stay fp32), and
        the tokenizer.
        """
        if not (lora_layers(self.model) or self.frozen):
            self.model.to(self.base_dtype)
        Path(folder).mkdir(exist_ok=True)
        self.save(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder):
        """The weights that `save` wrote, into this task. Raises UserError where they do not fit."""
        self.load_model(Path(folder))
        if not (Path(folder) / INDEX_FILE).is_file():
            self.load_head(folder)

    def load_model(self, folder):
        """`load` without the MLP head."""
        adapter, whole = (
            (folder / "lora_adapter").is_dir(),
            (folder / INDEX_FILE).is_file() or (folder / "backbone").is_dir(),
        )
        if self.frozen and (adapter or whole):
            raise UserError(
                f"{folder}: holds more than a head, and lora_r 0 trains no more; name the merged base_model."
            )
        if adapter:
            load_adapter(self.model, folder / "lora_adapter")
        elif (
            not whole
            and isinstance(self.head, MLPHead)
            and (folder / "mlp_head.safetensors").is_file()
        ):
            pass  # the head of a frozen base
        elif not whole:
            raise UserError(
                f"{folder}: no lora_adapter/ or backbone/; expected a checkpoint or an artifact."
            )
        elif lora_layers(self.model):
            raise UserError(
                f"{folder}: holds a whole model, not an adapter; name its backbone/ as the base_model."
            )
        elif (folder / INDEX_FILE).is_file():
            with library_errors(folder):
                saved = Shards(folder)
                for name, parameter in self.named_parameters():
                    if parameter.requires_grad:
                        saved.fill(parameter, name)
        else:
            with library_errors(folder / "backbone"):
                saved, info = type(self.model).from_pretrained(
                    folder / "backbone",
                    dtype=torch.float32,
                    local_files_only=True,
                    output_loading_info=True,
                )
                if info["missing_keys"]:  # a scorer's backbone has no output layer
                    raise ValueError(f"no weights for {', '.join(sorted(info['missing_keys']))}")
                state = saved.state_dict()
                for name, tensor in self.model.state_dict().items():
                    copy_into(tensor, state[name])

    def start_from(self, folder):
        """Begin with the weights of an earlier stage: an adapter, a checkpoint or a final artifact.
        Raises UserError.

        LoRA goes on with the adapter; full fine-tuning folds it into the weights. A scorer's head
        comes along, or alone.
        """
        folder, trains_lora = Path(folder), bool(lora_layers(self.model))
        adapter = folder if (folder / "adapter_config.json").is_file() else folder / "lora_adapter"
        if adapter.is_dir() and not self.frozen:
            was_tied, tokens = is_tied(self.model), self.model.get_input_embeddings().num_embeddings
            load_adapter(self.model, adapter)
            if not trains_lora:
                merge(self.model)
                require_all_grads(self.model)
            found = self.model.get_input_embeddings().num_embeddings
            if found != tokens:
                raise UserError(
                    f"{adapter}: has embeddings of {found} tokens, not {tokens}; add its --add_special_tokens."
                )
            # A resumed run would begin with the base's tied ones
            if was_tied and not is_tied(self.model):
                raise UserError(
                    f"{adapter}: gives the model a head of its own; merge it (merge.py), and train the result."
                )
        else:
            self.load_model(folder)
        if (folder / "mlp_head.safetensors").is_file():
            self.load_head(folder)

    def load_head(self, folder):
        """The MLP head in `folder`, where the task has one: a file of its own, or among the weights
        of a merged scorer.
        """
        if not isinstance(self.head, MLPHead):
            return
        path = Path(folder) / "mlp_head.safetensors"
        with library_errors(path):
            if path.is_file():
                saved, ours = load_file(path), dict(self.head.named_parameters())
                if saved.keys() != ours.keys():
                    raise ValueError(
                        f"other tensors than the head's: {', '.join(sorted(saved.keys() ^ ours.keys()))}"
                    )
                for name, parameter in ours.items():
                    copy_into(parameter, saved[name])
                return
            if not load_two_rows(self.head, sorted(Path(folder).glob("*.safetensors"))):
                raise UserError(
                    f"{folder}: no mlp_head.safetensors, no score.0 and score.2 (of two rows); expected a scorer's."
                )
