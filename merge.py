"""Fold an adapter into its base: a plain Hugging Face folder, proved equal to base + adapter before it is written.

    python merge.py --adapter outputs/RUN/final_artifact --output merged
    python merge.py --adapter PEFT_ADAPTER --base_model FOLDER --output merged

The sums are made in fp32 and rounded once, to the base's own type (or --dtype). The head of a scorer goes along.
"""

from pathlib import Path
import shutil
import sys

from lora.command_line import Parser
from lora.errors import UserError, one_line_errors


def read_arguments(argv):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--adapter", metavar="DIR", required=True, help="an adapter, a checkpoint or a final artifact")
    parser.add_argument("--base_model", metavar="DIR", help="the base; default: the one that our checkpoint names")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write, which must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the base's")
    arguments = parser.parse_args(argv)
    if Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output} exists; choose another folder.")
    return arguments


if __name__ == "__main__":  # above torch, as in train.py
    with one_line_errors():
        arguments = read_arguments(sys.argv[1:])

import torch
import transformers

from lora.adapter import load_adapter
from lora.config import saved_config
from lora.layer import merge
from lora.model import add_tokens, load_shape, load_tokenizer, load_weights


def outputs(model, tokens):
    """What the model says: logits [b, t, vocabulary], or a backbone's hidden states [b, t, width]; fp32."""
    with torch.no_grad():
        out = model.eval()(input_ids=tokens)
    said = out.get("logits", out.get("last_hidden_state"))
    if said is None:
        raise UserError(f"{type(model).__name__} gives neither logits nor hidden states, so nothing can be proved of it.")
    return said.float()


def find_adapter(folder, base_model):
    """(the folder with the adapter's files, the base's name, the configuration of our run or None). Raises UserError."""
    if (folder / "adapter_config.json").is_file():
        if not base_model:
            raise UserError(f"--adapter {folder}: an adapter alone does not say which base it is for; add --base_model.")
        return folder, base_model, None
    config = saved_config(folder)
    if not (folder / "lora_adapter").is_dir():
        raise UserError(f"--adapter {folder}: there is no lora_adapter/; a fully fine-tuned model needs no merging.")
    if config.model.init_from == "scratch":
        raise UserError(f"--adapter {folder}: it was trained on random weights, which no folder holds.")
    return folder / "lora_adapter", base_model or config.model.base_model, config


def main(arguments):
    adapter, base_model, config = find_adapter(Path(arguments.adapter), arguments.base_model)
    shape, dtype, tokenizer = load_shape(base_model)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else dtype
    architecture = (shape.architectures or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise UserError(f"base_model {base_model}: transformers has no {architecture}.")
    model = load_weights(model_class, base_model, torch.float32, "sdpa")
    if config is not None and config.model.add_special_tokens:
        add_tokens(model, tokenizer, config.model.add_special_tokens)
    if config is not None and (adapter.parent / "tokenizer.json").is_file():  # a final artifact's, with its template
        tokenizer = load_tokenizer(str(adapter.parent))

    torch.manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (4, 32))
    of_base = outputs(model, tokens)
    load_adapter(model, adapter)
    of_adapter = outputs(model, tokens)
    merge(model)
    of_merged = outputs(model, tokens)

    size = of_adapter.abs().max().item()
    known = of_base.shape[-1]  # an adapter may add tokens
    effect = (of_adapter[..., :known] - of_base).abs().max().item()
    error = (of_merged - of_adapter).abs().max().item()
    print(f"on 4 x 32 random tokens, largest output {size:.3g}")
    print(f"adapter against base:           {effect:.3g}")
    print(f"merged against adapter, fp32:   {error:.3g}")
    # The sums are the same but for their order; fp32 rounds each to 6e-8, and layers multiply that.
    if not error <= 1e-4 * size or error > effect:
        raise UserError(f"the merged model differs from base + adapter by {error:.3g}, which is more than rounding.")

    final = Path(arguments.output)
    temporary = final.with_name(f".tmp_{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.to(dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if config is not None and config.model.task == "score":
            shutil.copy(adapter.parent / "mlp_head.safetensors", temporary)
            config.lora, config.model.base_model = None, str(final)
            config.save(temporary / "training_config.toml")  # eval.py --checkpoint reads it
        written = load_weights(model_class, str(temporary), dtype, "sdpa")
        merged = model.state_dict()
        if any(not torch.equal(tensor, merged[name]) for name, tensor in written.state_dict().items()):
            raise UserError(f"{final}: the written weights are not the merged ones; nothing is kept.")
        rounded = (outputs(written, tokens) - of_adapter).abs().max().item()
        print(f"merged against adapter, {str(dtype).removeprefix('torch.')}: {rounded:.3g}")
        if rounded > effect > 0:
            raise UserError(f"rounding to {dtype} changes more ({rounded:.3g}) than the adapter does; add --dtype float32.")
        temporary.rename(final)
    except OSError as error:
        raise UserError(f"--output {final}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {final}")


if __name__ == "__main__":
    with one_line_errors():
        main(arguments)
