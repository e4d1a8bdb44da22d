"""The task: a model and a head, trained, saved and loaded as one module.

The model reads the packed documents, the hidden states at the target positions are picked out, and
the head turns them into the sum of their losses.
"""

from pathlib import Path

from safetensors.torch import save_file
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora.adapter import load_adapter, save_adapter
from lora.adapter_format import load_tensors
from lora.common.checkpoint_folders import adapter_folder, model_folder
from lora.common.errors import UserError, library_errors
from lora.data.batches import Batch
from lora.distributed.collectives import on_rank_zero
from lora.distributed.sharding import any_sharded, copy_into
from lora.layer import lora_layers, merge
from lora.model.attention import Documents
from lora.model.heads import LMHead, MLPHead
from lora.model.pretrained_heads import load_two_class_head
from lora.model.tokenizer_file import save_tokenizer
from lora.model.weights import cast_weights, load_weights
from lora.target_modules import first_position, is_causal, is_tied, make_all_trainable


class Task(nn.Module):
    """A causal LM, whose own output layer is the head, or a bare backbone under an MLPHead."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base_dtype: torch.dtype = torch.float32,  # of the base's files, and so of the artifact
        head_dropout: float = 0.0,
        score_loss: str = "mse",
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.base_dtype = base_dtype
        shape = model.config.get_text_config()
        if model.get_output_embeddings() is not None:
            self.head = LMHead(model.get_output_embeddings, shape)
        else:
            width = getattr(shape, "word_embed_proj_dim", None) or shape.hidden_size  # of OPT
            self.head = MLPHead(width, head_dropout, score_loss)
        self.head_is_random = isinstance(self.head, MLPHead)  # until one is loaded
        self.causal = is_causal(model)
        self.packed = True  # False: padded, as the model cannot be told where documents end
        self.first_position = first_position(model)
        num_token_types = getattr(model.config, "type_vocab_size", 0)
        self.uses_token_type_ids = not self.causal and num_token_types > 1

    @property
    def frozen(self) -> bool:
        """Whether only the head is trained: no weight of the model below it."""
        return not any(parameter.requires_grad for parameter in self.model.parameters())

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the sum of the losses of a micro-batch, and its number of targets."""
        hidden = self.target_hidden_states(batch)
        return self.head(hidden, batch.targets, batch.loss_weights), batch.num_targets

    def predict(self, batch: Batch) -> Tensor:
        """Return what the head predicts at each target, [n, ...]."""
        return self.head.predict(self.target_hidden_states(batch), batch.targets)

    def target_hidden_states(self, batch: Batch) -> Tensor:
        """Return the hidden states at the targets, [n, width]: cached in the batch, or computed."""
        if batch.features is not None:
            return batch.features
        return self.hidden_states(batch).index_select(0, batch.target_positions)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the backbone's hidden states at all positions of a micro-batch, [b x t, width]."""
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        if self.packed:
            inputs["position_ids"] = batch.position_ids + self.first_position
            inputs["documents"] = Documents(batch.seq_lens, batch.input_ids.device)
        elif not self.causal:  # no token of a causal model sees the padding on its right
            num_tokens = torch.tensor(batch.seq_lens, device=batch.position_ids.device)
            columns = torch.arange(batch.input_ids.shape[1], device=num_tokens.device)
            is_token = columns < num_tokens[:, None]
            inputs["attention_mask"] = is_token.long()  # DeBERTa's convolution subtracts it
        if self.uses_token_type_ids:
            inputs["token_type_ids"] = batch.token_type_ids
        return self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)

    def save(
        self,
        folder: Path | str,
        model_state: dict[str, Tensor] | None = None,
        head_state: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint: `lora_adapter/` or `backbone/`, and `mlp_head.safetensors`.

        If weights are sharded, the full state of the model and of the head must be given.
        """
        folder = Path(folder)
        if lora_layers(self.model):
            save_adapter(self.model, folder / "lora_adapter")
            if self.tokenizer.chat_template:  # it may be the run's, where the base has none
                template = folder / "chat_template.jinja"
                template.write_text(self.tokenizer.chat_template, encoding="utf-8")
        elif not self.frozen:
            self.model.save_pretrained(folder / "backbone", state_dict=model_state)
            save_tokenizer(self.tokenizer, folder / "backbone")
        self.save_head(folder, head_state or self.head.state_dict())

    def save_artifact(self, folder: Path) -> None:
        """Write what was trained where PEFT and transformers look for it, and the tokenizer.

        That is the top of the folder. A whole model is written in the base's own type.
        """
        if lora_layers(self.model):
            save_adapter(self.model, folder)
        elif not self.frozen:
            cast_weights(self.model, self.base_dtype)
            self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
        self.save_head(folder, self.head.state_dict())

    def save_head(self, folder: Path, state: dict[str, Tensor]) -> None:
        if isinstance(self.head, MLPHead):
            save_file(state, folder / "mlp_head.safetensors", {"format": "pt"})

    def load(self, folder: Path | str) -> None:
        """Load a checkpoint or an artifact. Raises UserError if it does not fit."""
        self.load_model(Path(folder))
        self.load_head(folder)

    def load_model(self, folder: Path) -> None:
        """Load a checkpoint or an artifact without the MLP head."""
        adapter, whole_model = adapter_folder(folder), model_folder(folder)
        if not adapter and not whole_model:
            if isinstance(self.head, MLPHead) and (folder / "mlp_head.safetensors").is_file():
                return  # only the head was trained
            expected = "expected a checkpoint or an artifact"
            raise UserError(f"{folder}: neither an adapter nor a model in it; {expected}.")
        if self.frozen:
            problem = "holds more than a head, but with lora_r 0 only the head is trained"
            raise UserError(f"{folder}: {problem}; name the merged base_model.")
        if adapter:
            load_adapter(self.model, adapter)
            return
        if lora_layers(self.model):
            problem = "holds a whole model, not an adapter"
            raise UserError(f"{folder}: {problem}; name {whole_model} as the base_model.")
        self.load_backbone(whole_model)

    def load_backbone(self, folder: Path) -> None:
        """Load all weights of the model from a plain Hugging Face folder.

        Where they are sharded, the first process reads them, and scatters one after the other.
        """
        sharded = any_sharded(self.parameters())
        saved = on_rank_zero(self.read_backbone, folder) if sharded else self.read_backbone(folder)
        with library_errors(folder):
            for name, tensor in self.model.state_dict().items():
                copy_into(tensor, saved[name] if saved else None, from_rank_zero=sharded)

    def read_backbone(self, folder: Path) -> dict[str, Tensor]:
        return load_weights(type(self.model), str(folder), torch.float32, None).state_dict()

    def start_from(self, folder: Path | str) -> None:
        """Begin with an earlier stage's adapter, checkpoint, artifact or head. Raises UserError."""
        folder = Path(folder)
        adapter = adapter_folder(folder)
        if adapter and not self.frozen:
            self.start_from_adapter(adapter)
        else:
            self.load_model(folder)
        if (folder / "mlp_head.safetensors").is_file():
            self.load_head(folder)

    def start_from_adapter(self, adapter: Path) -> None:
        """Continue an adapter, or merge it if all weights are trained."""
        trains_lora = bool(lora_layers(self.model))
        was_tied = is_tied(self.model)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        load_adapter(self.model, adapter)
        if not trains_lora:
            merge(self.model)
            make_all_trainable(self.model)
        loaded = self.model.get_input_embeddings().num_embeddings
        if loaded != vocabulary:
            problem = f"has embeddings of {loaded} tokens, not {vocabulary}"
            raise UserError(f"{adapter}: {problem}; add its --add_special_tokens.")
        # Refused, because a resumed run would start from the base, where the two are tied.
        if was_tied and not is_tied(self.model):
            problem = "gives the model a head of its own"
            raise UserError(f"{adapter}: {problem}; merge it (merge.py), and train the result.")

    def load_head(self, folder: Path | str) -> None:
        """Load the MLP head, if the task has one, from its file or a merged scorer's weights."""
        if not isinstance(self.head, MLPHead):
            return
        self.head_is_random = False
        path = Path(folder) / "mlp_head.safetensors"
        with library_errors(path):
            if not path.is_file():
                files = sorted(Path(folder).glob("*.safetensors"))
                if load_two_class_head(self.head, files):
                    return
                absent = "no mlp_head.safetensors, no score.0 and score.2 (of two rows)"
                raise UserError(f"{folder}: {absent}; expected a scorer's.")
            saved = load_tensors(path)
            parameters = dict(self.head.named_parameters())
            unexpected = saved.keys() ^ parameters.keys()
            if unexpected:
                raise ValueError(f"other tensors than the head's: {', '.join(sorted(unexpected))}")
            for name, parameter in parameters.items():
                copy_into(parameter, saved[name])
