"""Load a base model and its tokenizer; choose the device and the type to compute in."""

from functools import partial
import os
from pathlib import Path

from huggingface_hub import hf_hub_download
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import AddedToken, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lora import distributed
import lora.attention  # noqa: F401  (registers the attention called "packed")
from lora.data import Rows
from lora.errors import UserError, refuse_any
from lora.foreign import EMBEDDED, check_weights, locate, one_line  # noqa: F401  (the base that comes along)
from lora.heads import LMHead, MLPHead
from lora.quantize import FourBitSettings, bitsandbytes
from lora.render import Row
from lora.score_forms import take_over
from lora.targets import decoder_layers, is_pooler, train_all
from lora.task import Task

BFLOAT16_WIDTH = 512  # on a CPU: 2.4 times as fast from there on, in a base of 128 between 0.7 and 1.6 times (LOG.md)
logging.disable_progress_bar()
logging.set_verbosity_error()  # what it would warn of while it loads is looked at here, and refused or right


def choose_device(name):
    """The device called `name`; "auto" is what DEVICE_PREFERENCE says, else the first of cuda, mps and cpu."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device in present if present[device]]
    preferred = os.environ.get("DEVICE_PREFERENCE") or "auto"
    for wanted, where in ((name, "device"), (preferred, "DEVICE_PREFERENCE")):
        if wanted not in ("auto", *available):
            raise UserError(f"{where} {wanted} is not available here; there is {', '.join(available)}.")
    name = preferred if name == "auto" else name
    return torch.device(available[0] if name == "auto" else name)


def choose_dtype(config, device):
    """The type to compute in. "auto": bfloat16 where the hardware multiplies it faster, else float32.

    That is on CUDA (where older cards have float16), and on CPUs with AVX512_BF16 or AMX if the base is wide enough: in a
    small one the casts can cost more than the products save. MPS has float32: no such machine was at hand to measure.
    """
    if config.training.dtype != "auto":
        return getattr(torch, config.training.dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    able = torch.cpu.get_capabilities()
    if device.type == "cpu" and (able.get("avx512_bf16") or able.get("amx_bf16")):
        width = read_shape(config.model.base_model).get_text_config().hidden_size
        return torch.bfloat16 if width >= BFLOAT16_WIDTH else torch.float32
    return torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prepare_layers(model, training):
    """Wrap the forward of every decoder layer as `training` asks: compiled; computed again when its gradient is asked for,
    so that only its input is kept; what is kept moved to main memory. The gradients stay what they are. Raises UserError.
    """
    asked = [key for key in ("compile", "gradient_checkpointing", "offload_activations") if getattr(training, key)]
    layers = decoder_layers(model)
    if asked and not layers:
        raise UserError(f"{asked[0]}: this model has no list of layers to do it to; leave it out.")
    for layer in layers:
        if training.compile:  # for any length: else every new one would be compiled
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if training.gradient_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if training.offload_activations:
            layer.forward = partial(offloaded, layer.forward)


def lay_out(task, config, device, dtype):
    """Bring a task to where it is trained: `device`, in parts if several processes train all weights. Raises UserError."""
    if distributed.world() > 1 and not config.lora:
        distributed.shard(task, dtype, config.training.optimizer, device)
    task.to(device)
    if device.type != "cpu" and not any(map(distributed.is_sharded, task.parameters())):
        problem = disagreement(task, dtype)  # it has been tried on the CPU, but for the device's own kernels
        if problem:
            raise UserError(f"device {device}: {problem}; use --device cpu, or another --dtype.")


def offloaded(forward, *args, **kwargs):
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return forward(*args, **kwargs)


def weight_files(model):
    """The base's files of weights, on this disk. `model` is the [model] table of a configuration."""
    if model.init_from == "scratch":
        return []
    source, local = locate(model.base_model)
    if not local:  # its config.json was read a moment ago; the weights lie beside it
        source = Path(hf_hub_download(source, "config.json", local_files_only=True)).parent
    return sorted(Path(source).glob("*.safetensors"))


def four_bits(lora, device):
    """How the base is to be quantised, or None where the [lora] table does not ask for it. Raises UserError."""
    if not (lora and lora.load_in_4bit):
        return None
    bitsandbytes("load_in_4bit", device)
    compute_dtype = getattr(torch, lora.bnb_4bit_compute_dtype)
    return FourBitSettings(lora.bnb_4bit_quant_type, lora.bnb_4bit_use_double_quant, compute_dtype, device)


def load_weights(model_class, base_model, dtype, attention, quantization=None):
    """A model of transformers with the weights of `base_model`, all of them, in `dtype` or quantised. Raises UserError."""
    source, local = locate(base_model)
    if local:
        check_weights(source)
    with one_line(f"base_model {base_model}"):
        model, info = model_class.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            trust_remote_code=False,
            local_files_only=local,
        )
    absent = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    absent = [name for name in absent if not is_pooler(name)]
    refuse_any(absent, f"base_model {base_model}: no weights, or of another shape, for")
    odd = [name for name, p in model.named_parameters() if p.is_floating_point() and not is_finite(p)]
    refuse_any(odd, f"base_model {base_model}: not finite (copy it again, or take another base)")
    if quantization:
        refuse_any(model.hf_quantizer.quantization_config.damaged, f"base_model {base_model}")
        model.hf_quantizer.remove_quantization_config(model)  # what is saved of it is the base's own config
    return model


def is_finite(tensor):
    """Whether all its numbers are, without a copy of it."""
    return not tensor.numel() or all(bound.isfinite() for bound in tensor.detach().aminmax())


def read_shape(base_model):
    """config.json as transformers reads it. Raises UserError."""
    source, local = locate(base_model)
    with one_line(f"base_model {base_model}"):
        shape = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    if getattr(shape, "quantization_config", None):
        raise UserError(
            f"base_model {base_model}: its files are quantised; name the dense base (load_in_4bit quantises it)."
        )
    return shape


def load_shape(base_model):
    """(config.json as transformers reads it, the type of the weights on disk, tokenizer). Raises UserError."""
    shape = read_shape(base_model)
    return shape, shape.dtype or torch.float32, load_tokenizer(base_model)


def load_tokenizer(base_model):
    source, local = locate(base_model)
    with one_line(f"base_model {base_model}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    if not tokenizer.is_fast:
        raise UserError(f"base_model {base_model}: its tokenizer has no fast version (no tokenizer.json), which is needed.")
    return tokenizer


def add_tokens(model, tokenizer, tokens):
    """Add tokens to the tokenizer, and rows for them to the embeddings, drawn around the mean of the others.

    Those that the chat template writes are special: where a chat's contents hold them, they are text. The others are
    there for contents to hold.
    """
    template = str(tokenizer.chat_template or "<|im_start|> <|im_end|>")  # ChatML's, which use_chatml will give it
    tokenizer.add_tokens([AddedToken(token, special=token in template, normalized=False) for token in tokens])
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def load_task(config, dtype, packed=None):
    """The base of `config` with the head its task needs, on the CPU, weights in `dtype`, trainable. Raises UserError.

    With `init_from = "scratch"` the weights are random (seeded), in the shape that the base's config.json gives.
    Rows are packed where the model's attention can be told where documents end, unless `packed` is given.
    """
    base_model, max_length = config.model.base_model, config.data.max_length
    shape, base_dtype, tokenizer = load_shape(base_model)
    if shape.is_encoder_decoder:
        raise UserError(f"base_model {base_model}: an encoder-decoder; expected a decoder or an encoder.")
    problems = []
    layouts = (True, False) if packed is None else (packed,)  # what cannot be packed is padded
    for layout in layouts:
        try:
            settings = config.model.head_dropout, config.model.score_loss
            task = Task(build(config, shape, tokenizer, dtype, layout), tokenizer, base_dtype, *settings)
            if config.model.task == "lm" and not task.causal:
                raise UserError(
                    f"base_model {base_model}: an encoder sees what it would have to predict; use --task score."
                )
            task.packed = layout
            problem = disagreement(task)
        except KeyError as error:  # of a model that knows its own kinds of attention only
            problem = f"it has no attention {error}"
        if not problem:
            break
        problems.append(problem)
    if problem:
        raise UserError(f"base_model {base_model}: {shape.model_type} is not supported: {problems[0]}.")
    if isinstance(task.head, MLPHead) and config.model.init_from != "scratch":
        take_over(task, weight_files(config.model), config.model.head_tokens)
    longest = (getattr(shape, "max_position_embeddings", None) or max_length) - task.first_position
    if max_length > longest:
        raise UserError(f"max_length = {max_length}: {base_model} has {longest} positions; add --max_length {longest}.")
    return task


def build(config, shape, tokenizer, dtype, packed):
    """The model that `config` asks for, trainable, with packed attention or with the one that transformers chooses."""
    auto = AutoModelForCausalLM if config.model.task == "lm" else AutoModel
    attention = "packed" if packed else None
    torch.manual_seed(config.training.seed)
    quantization = four_bits(config.lora, choose_device(config.training.device))
    if config.model.init_from == "scratch":
        if quantization:
            raise UserError("init_from scratch: random weights are not quantised; leave load_in_4bit out.")
        model = auto.from_config(shape, dtype=dtype, attn_implementation=attention)
        model.config.name_or_path = locate(config.model.base_model)[0]
    else:
        model = load_weights(auto, config.model.base_model, dtype, attention, quantization)
        if quantization:
            model.to(quantization.device)  # where its 4-bit weights are already
    if config.model.add_special_tokens:
        add_tokens(model, tokenizer, config.model.add_special_tokens)
    train_all(model)
    return model


@torch.no_grad()
def disagreement(task, dtype=None):
    """What this model does otherwise than the task assumes, measured on two short documents; None if all is well.

    A model whose attention does not go through transformers' AttentionInterface would let packed documents see
    each other and train all the same.
    """
    task.eval()
    types = {weight.dtype for weight in task.model.parameters()}  # of a frozen base, of what is trained, of 4 bits
    half = next(iter((types | {dtype}) & {torch.bfloat16, torch.float16}), None)
    rounding = 0.05 if half or types - {torch.float32} else 1e-4  # of the largest output; with room to spare
    vocabulary, device = task.model.get_input_embeddings().num_embeddings, task.model.device
    draws = torch.randint(vocabulary, (14,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = draws[:8], draws[8:]
    changed = [*first[:-1], (first[-1] + 1) % vocabulary]

    def hidden(*documents):
        rows = Rows.of(((Row(document, [0.0] * len(document)), 0) for document in documents), "score")
        return task.at_targets(rows.batch(range(len(documents)), task.packed).to(device)).float()

    def differ(one, other, rounding=rounding):
        return bool((one - other).abs().max() > rounding * one.abs().max())

    try:
        with torch.autocast(device.type, half, enabled=half is not None):  # what is trained is fp32 beside a frozen half
            alone = hidden(first)
            if differ(torch.cat([alone, hidden(second)]), hidden(first, second)):
                return "documents that are packed into one row see each other"
            if differ(alone[:-1], hidden(changed)[:-1], 1e-6) == task.causal:  # the same sums: equal in every type
                return "whether a position sees later ones is not what its attention modules say"
            if isinstance(task.head, LMHead):
                logits = task.model(torch.tensor([first], device=device), use_cache=False).logits[0].float()
                if differ(logits, task.head.logits(alone)):
                    return "its logits are not those of its output layer on the hidden states"
            task.train()
            hidden(first)  # some take another way in training
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        return f"a short forward pass ends in {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None
