"""Fold an adapter into its base: a plain Hugging Face folder, proved equal to base + adapter before it is written.

    python merge.py --adapter outputs/RUN/final_artifact --output merged
    python merge.py --adapter PEFT_ADAPTER --base_model FOLDER --output merged
    python merge.py --adapter outputs/RUN/final_artifact --output merged --gguf merged.gguf --gguf_type q8_0
    python merge.py --adapter PEFT_ADAPTER --output rewritten --portable

The sums are made in fp32 and rounded once, to the base's own type (or --dtype). The head of a scorer goes along; one that
was trained on a frozen base (lora_r 0) is written with that base.
"""

from dataclasses import replace
from importlib.util import find_spec
import json
from pathlib import Path
import sys

from lora.command_line import Parser, add_flags, set_given
from lora.config import LoraConfig, get_lora_config, saved_config
from lora.errors import UserError, one_line_errors, require_one_process


FOUR_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def read_arguments(argv):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--adapter", metavar="DIR", required=True, help="an adapter, a checkpoint or a final artifact")
    parser.add_argument("--base_model", metavar="DIR", help="the base; default: the one that our checkpoint names")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write, which must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the base's")
    into = "the base as it is (default), or the 4-bit base that QLoRA was trained on, made dense again"
    parser.add_argument("--merge_into", choices=("16bit", "dequantized"), default="16bit", help=into)
    add_flags(parser, LoraConfig(), FOUR_BITS, "our checkpoint's, else nf4 and true")
    portable = "write an adapter instead: one rank, the scale in B, so that PEFT, vLLM and llama.cpp do the same with it"
    parser.add_argument("--portable", action="store_true", help=portable)
    parser.add_argument("--gguf", metavar="FILE", help="also write the merged model for llama.cpp, to a file not there yet")
    parser.add_argument("--gguf_type", choices=("f32", "f16", "bf16", "q8_0"), help="of its matrices; default: f16")
    arguments = parser.parse_args(argv)
    if Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output} exists; choose another folder.")
    if arguments.gguf and Path(arguments.gguf).exists():
        raise UserError(f"--gguf {arguments.gguf} exists; choose another file.")
    if arguments.gguf and find_spec("gguf") is None:
        raise UserError("--gguf needs the package gguf: pip install 'plainlora[gguf]'.")
    others = (vars(arguments)[name] for name in ("gguf", "dtype", "base_model", *FOUR_BITS))
    if arguments.portable and (any(value is not None for value in others) or arguments.merge_into != "16bit"):
        raise UserError("--portable rewrites an adapter and merges nothing; it goes with --adapter and --output only.")
    if arguments.gguf_type and not arguments.gguf:
        raise UserError("--gguf_type says how --gguf FILE is written; add it.")
    return arguments


if __name__ == "__main__":  # above torch, as in train.py
    with one_line_errors():
        require_one_process()
        arguments = read_arguments(sys.argv[1:])

import torch
import transformers
from transformers import AutoModel

from lora.adapter import load_adapter, write_portable
from lora.baseline import file_sums, other_base
from lora.checksums import require_as_written
from lora.durable import folder_for
from lora.layer import merge
from lora.model import add_tokens, four_bits, load_shape, load_tokenizer, load_weights
from lora.quantize import dequantize
from lora.score_forms import two_rows
from lora.task import Task


def outputs(model, tokens):
    """What the model says: logits [b, t, vocabulary], or a backbone's hidden states [b, t, width]; fp32."""
    with torch.no_grad():
        out = model.eval()(input_ids=tokens)
    said = out.get("logits", out.get("last_hidden_state"))
    if said is None:
        raise UserError(f"{type(model).__name__} gives neither logits nor hidden states, so nothing can be proved of it.")
    return said.float()


def find_adapter(folder, base_model):
    """(the folder with the adapter's files, the base's name, the configuration of our run or None). Raises UserError.

    Of a head that was trained on the frozen base there is no such folder.
    """
    if (folder / "adapter_config.json").is_file():
        if not base_model:
            raise UserError(f"--adapter {folder}: an adapter alone does not say which base it is for; add --base_model.")
        return folder, base_model, None
    config = saved_config(folder)
    if not (config.method == "head" or (folder / "lora_adapter").is_dir()):
        raise UserError(f"--adapter {folder}: there is no lora_adapter/; a fully fine-tuned model needs no merging.")
    if config.model.init_from == "scratch":
        raise UserError(f"--adapter {folder}: it was trained on random weights, which no folder holds; use it unmerged.")
    return folder / "lora_adapter", base_model or config.model.base_model, config


def class_for(shape):
    """The class of transformers that the base says it is. Raises UserError."""
    architecture = (shape.architectures or ["AutoModelForCausalLM"])[0]
    if not hasattr(transformers, architecture):
        raise UserError(f"transformers has no {architecture}, which the base says it is; a newer version may.")
    return getattr(transformers, architecture)


def load_base(model_class, base_model, quantization=None):
    """The base in fp32: its own weights, or what is left of them in 4 bits."""
    model = load_weights(model_class, base_model, torch.float32, "sdpa", quantization)
    if quantization:
        dequantize(model)
    return model


def four_bits_of(arguments, config):
    """How the 4-bit base was quantised: as our run says, else as QLoRA is usually done, and the flags above either."""
    config = config or get_lora_config()
    set_given(config, arguments, FOUR_BITS)
    config.lora.load_in_4bit = True
    return four_bits(config.lora, torch.device("cpu"))


def difference(one, other):
    return (one - other).abs().max().item()


def main(arguments):
    if arguments.portable:
        folder = Path(arguments.adapter)
        with folder_for(Path(arguments.output)) as temporary:
            write_portable(folder / "lora_adapter" if (folder / "lora_adapter").is_dir() else folder, temporary)
        print(f"wrote {arguments.output}")
        return
    adapter, base_model, config = find_adapter(Path(arguments.adapter), arguments.base_model)
    ours, scorer = adapter.parent, config is not None and config.model.task == "score"
    head_alone = not adapter.is_dir()
    if arguments.gguf and scorer:
        raise UserError(f"--gguf: {arguments.adapter} is a step scorer, whose head llama.cpp does not know; leave it out.")
    into_4bit = arguments.merge_into == "dequantized"
    if into_4bit and config is not None and not config.lora.load_in_4bit:
        raise UserError(f"--merge_into dequantized: {arguments.adapter} was not trained in 4 bits; leave it out.")
    shape, dtype, tokenizer = load_shape(base_model)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else dtype
    model_class = AutoModel if scorer else class_for(shape)  # of a scorer the bare backbone
    if config is not None:
        require_as_written(ours)
        if warning := other_base(ours, base_model, file_sums(replace(config.model, base_model=base_model))):
            print(warning)
    model = load_base(model_class, base_model, four_bits_of(arguments, config) if into_4bit else None)
    if config is not None and config.model.add_special_tokens:
        add_tokens(model, tokenizer, config.model.add_special_tokens)
    if config is not None and (ours / "tokenizer.json").is_file():  # a final artifact's, with its template
        tokenizer = load_tokenizer(str(ours))
    if arguments.gguf:
        from lora.gguf import gguf_keys, write_gguf  # an extra

        gguf_keys(model.config, tokenizer)  # what cannot be written is refused before the work

    torch.manual_seed(0)
    tokens = torch.randint(shape.get_text_config().vocab_size, (4, 32))
    of_base = outputs(model, tokens)
    if not head_alone:
        load_adapter(model, adapter)
    of_adapter = outputs(model, tokens)
    merge(model)
    of_merged = outputs(model, tokens)
    size = of_adapter.abs().max().item()
    effect = difference(of_adapter[..., : of_base.shape[-1]], of_base)  # an adapter may add tokens
    error = difference(of_merged, of_adapter)
    print(f"on 4 x 32 random tokens, largest output {size:.3g}")
    print(f"adapter against base:           {effect:.3g}")
    print(f"merged against adapter, fp32:   {error:.3g}")
    # The sums are the same but for their order; fp32 rounds each to 6e-8, and layers multiply that.
    if not error <= 1e-4 * size or error > effect:
        found = f"merged it differs from base + adapter by {error:.3g}, more than rounding"
        raise UserError(f"--adapter {arguments.adapter}: {found}; use it unmerged.")
    if not (effect or head_alone):
        raise UserError(f"--adapter {arguments.adapter}: it changes nothing; use the base as it is.")
    if config is not None and config.lora.load_in_4bit and not into_4bit:
        trained = load_base(model_class, base_model, four_bits_of(arguments, config))
        if not head_alone:
            load_adapter(trained, adapter)
        apart = difference(of_merged, outputs(trained, tokens))
        print(f"against the 4-bit base it was trained on: {apart:.3g} (--merge_into dequantized keeps that base)")
        del trained

    final = Path(arguments.output)
    with folder_for(final) as temporary:
        model.to(dtype)
        tokenizer.save_pretrained(temporary)
        if scorer:
            save_scorer(model, tokenizer, ours, temporary)
            config.lora, config.model.base_model, config.model.add_special_tokens = None, str(final), []
            config.save(temporary / "training_config.toml")  # eval.py --checkpoint reads it
        else:
            model.save_pretrained(temporary)
        rounded = difference(outputs(read_back(model, model_class, temporary), tokens), of_adapter)
        print(f"merged against adapter, {str(dtype).removeprefix('torch.')}: {rounded:.3g}")
        if rounded > effect and not head_alone:
            raise UserError(f"rounding to {dtype} changes more ({rounded:.3g}) than the adapter does; add --dtype float32.")
    print(f"wrote {final}")
    if arguments.gguf:
        write_gguf(final, Path(arguments.gguf), arguments.gguf_type or "f16")
        print(f"wrote {arguments.gguf}")


def read_back(model, model_class, folder):
    """The model that was written to `folder`. Raises UserError where a weight of it is not that of `model`."""
    written = load_weights(model_class, str(folder), model.dtype, "sdpa")
    merged = model.state_dict()
    if any(not torch.equal(tensor, merged[name]) for name, tensor in written.state_dict().items()):
        raise UserError(f"{folder}: the written weights are not the merged ones, and are not kept; try another disk.")
    return written


def save_scorer(model, tokenizer, folder, output):
    """The backbone and the MLP head in `folder` as one model of two classes, in the names of vLLM's reward models.

    `model.*` and `score.0`, `score.2` are what Qwen2ForProcessRewardModel is made of; transformers' AutoModel reads the
    backbone of it, and eval.py --checkpoint all of it.
    """
    task = Task(model, tokenizer)
    task.load_head(folder)
    state = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {name: tensor.detach() for name, tensor in two_rows(task.head).items()}  # fp32, as it was trained
    family = type(model).__name__.removesuffix("Model")
    model.save_pretrained(output, state_dict=state)
    shape = json.loads((output / "config.json").read_text())
    shape["architectures"] = [f"{family}ForProcessRewardModel"]
    (output / "config.json").write_text(json.dumps(shape, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(arguments)
