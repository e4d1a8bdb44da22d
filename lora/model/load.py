"""Load a base model with the head that its task needs."""

import torch
import transformers
from transformers import PreTrainedConfig

from lora.common.base_model_files import locate_base
from lora.common.errors import UserError, library_errors
from lora.config.schema import Config, ModelConfig
from lora.model.compatibility import find_incompatibility
from lora.model.device import choose_device, choose_dtype
from lora.model.heads import MLPHead
from lora.model.pretrained_heads import initialise_head, load_token_head
from lora.model.task import Task
from lora.model.weights import add_tokens, four_bits, load_shape, load_weights, weight_files
from lora.target_modules import make_all_trainable

DEFAULT_MAX_LENGTH = 2048
CPU = torch.device("cpu")


def load_task(
    config: Config, dtype: torch.dtype, packed: bool | None = None, device: torch.device = CPU
) -> Task:
    """Load the base with the head that its task needs, trainable. Raises UserError.

    Unless `packed` is given, rows are packed if the model's attention can be told where documents
    end, and padded otherwise. On a device other than the CPU, whose kernels depend on the dtype of
    the computation, the model is tried in that.
    """
    compute_dtype = None if device.type == "cpu" else choose_dtype(config, device)
    base_model = config.model.base_model
    where = f"base_model {base_model}"
    shape, base_dtype, tokenizer = load_shape(base_model)
    if shape.is_encoder_decoder:
        raise UserError(f"{where}: an encoder-decoder; expected a decoder or an encoder.")
    if shape.model_type == "rwkv":
        problem = "an evaluation changes its weights in place, and padding its answers"
        raise UserError(f"{where}: rwkv is not supported: {problem}.")

    def try_layout(is_packed: bool) -> tuple[Task | None, str]:
        """Return the task, or None and the reason why the model cannot have this layout."""
        try:
            model = build_model(config, shape, tokenizer, dtype, is_packed)
        except KeyError as error:  # some models accept only attention functions of their own
            return None, f"it has no attention {error}"
        settings = config.model
        task = Task(model, tokenizer, base_dtype, settings.head_dropout, settings.score_loss)
        # Weights in 4 bits stay on the device that they were quantised on.
        task.to(model.device if config.lora and config.lora.load_in_4bit else device)
        if not task.causal and shape.get_text_config() is not shape:
            expected = "expected one of text alone; save its language model, and name that"
            raise UserError(f"{where}: a multimodal model ({shape.model_type}); {expected}.")
        if settings.task == "lm" and not task.causal:
            problem = "an encoder sees what it would have to predict"
            raise UserError(f"{where}: {problem}; use --task score.")
        task.packed = is_packed
        with library_errors(where):
            problem = find_incompatibility(task, compute_dtype)
        return (None, problem) if problem else (task, "")

    task, problem = try_layout(packed is not False)
    if task is None and packed is None:
        task, problem = try_layout(False)
    if task is None:
        mend = "" if device.type == "cpu" else "; use --device cpu, or another --dtype"
        raise UserError(f"{where}: {shape.model_type} is not supported: {problem}{mend}.")

    if isinstance(task.head, MLPHead) and config.model.init_from != "scratch":
        initialise_score_head(task, config.model, shape)
    set_max_length(config, shape, task.first_position)
    return task


def initialise_score_head(task: Task, model: ModelConfig, shape: PreTrainedConfig) -> None:
    """Give a score head the weights of one that the base brings, or of `head_tokens`, if any."""
    files = weight_files(model)
    # A head that the base brings was trained on its last layer.
    last_layer = shape.get_text_config().num_hidden_layers
    reads_last = model.score_layer in (None, last_layer)
    heads = [path for path in files if path.name == "mlp_head.safetensors"]
    if model.head_tokens:
        load_token_head(task.head, files, model.head_tokens, task.tokenizer, task.model)
        task.head_is_random = False
    elif reads_last and heads:
        task.load_head(heads[0].parent)  # the base is a scorer's artifact or checkpoint
    elif reads_last:
        task.head_is_random = not initialise_head(task.head, files)


def set_max_length(config: Config, shape: PreTrainedConfig, first_position: int) -> None:
    """Replace max_length "auto" by a number. Raises UserError above what the base can read."""
    max_length = config.data.max_length
    positions = getattr(shape, "max_position_embeddings", None)
    longest = positions - first_position if positions else None
    if max_length == "auto":
        config.data.max_length = min(DEFAULT_MAX_LENGTH, longest or DEFAULT_MAX_LENGTH)
    elif longest and max_length > longest:
        problem = f"{config.model.base_model} has {longest} positions"
        raise UserError(f"max_length = {max_length}: {problem}; add --max_length {longest}.")


def build_model(
    config: Config,
    shape: transformers.PreTrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    dtype: torch.dtype,
    packed: bool,
) -> transformers.PreTrainedModel:
    """Build the model, trainable, with packed attention or with the one transformers chooses."""
    model_class = transformers.AutoModel
    if config.model.task == "lm":
        model_class = transformers.AutoModelForCausalLM
    attention = "packed" if packed else None
    torch.manual_seed(config.training.seed)
    quantization = four_bits(config.lora, choose_device(config.training.device))
    if config.model.init_from == "scratch":
        if quantization:
            problem = "random weights are not quantised"
            raise UserError(f"init_from scratch: {problem}; leave load_in_4bit out.")
        with library_errors(f"base_model {config.model.base_model}", KeyError):
            model = model_class.from_config(
                shape, dtype=torch.float32, attn_implementation=attention
            )
        # Drawn in float32 whatever they are computed in, so that an evaluation has the same base.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.name_or_path = locate_base(config.model.base_model)[0]
    else:
        model = load_weights(model_class, config.model.base_model, dtype, attention, quantization)
    if config.model.task == "score" and config.model.score_layer:
        from lora.model.first_layers import cut_above  # asked for by few

        cut_above(model, config.model.score_layer)
    add_tokens(model, tokenizer, config.model.add_special_tokens)
    make_all_trainable(model)
    return model
