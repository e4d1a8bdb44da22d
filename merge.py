"""Fold an adapter into its base: a plain Hugging Face folder, proved equal to base + adapter before it is written.

    python merge.py --adapter outputs/RUN/final_artifact --output merged
    python merge.py --adapter PEFT_ADAPTER --base_model FOLDER --output merged

The sums are made in fp32 and rounded once, to the base's own type (or --dtype). The head of a scorer goes along.
"""

from pathlib import Path
import shutil
import sys

from lora.config import Parser
from lora.errors import UserError, one_line_errors


def read_arguments(argv):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--adapter", metavar="DIR", required=True, help="an adapter, a checkpoint or a final artifact")
    parser.add_argument("--base_model", metavar="DIR", help="the base; default: the one that our checkpoint names")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write, which must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the base's")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"{unknown[0]}: not expected here. See --help.")
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
from lora.model import locate


def outputs(model, tokens):
    """What the model says: logits [b, t, vocabulary], or a backbone's hidden states [b, t, width]; fp32."""
    with torch.no_grad():
        out = model.eval()(input_ids=tokens)
    return (out.logits if "logits" in out else out.last_hidden_state).float()


def load(source, dtype):
    """The model in a folder (or of a Hub name) with the head that its config.json names."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    return getattr(transformers, config.architectures[0]).from_pretrained(source, dtype=dtype, use_safetensors=True)


def main(arguments):
    adapter, base = Path(arguments.adapter), arguments.base_model
    config = None
    if not (adapter / "adapter_config.json").is_file():
        config = saved_config(adapter)
        base = base or config.model.base_model
    if not base:
        raise UserError(f"{adapter}: this adapter is not one of our checkpoints; add --base_model FOLDER.")
    source, _ = locate(base)
    model = load(source, torch.float32)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else transformers.AutoConfig.from_pretrained(source).dtype

    torch.manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (4, min(64, model.config.max_position_embeddings)))
    of_base = outputs(model, tokens)
    load_adapter(model, adapter if config is None else adapter / "lora_adapter")
    of_adapter = outputs(model, tokens)
    merge(model)
    of_merged = outputs(model, tokens)

    size = of_adapter.abs().max().item()
    effect = (of_adapter - of_base).abs().max().item()
    error = (of_merged - of_adapter).abs().max().item()
    print(f"on 4 x {tokens.shape[1]} random tokens, largest output {size:.3g}")
    print(f"adapter against base:           {effect:.3g}")
    print(f"merged against adapter, fp32:   {error:.3g}")
    # The sums are the same but for their order; fp32 rounds each to 6e-8, and layers multiply that.
    if not error <= 1e-4 * max(size, 1.0):
        raise UserError(f"the merged model differs from base + adapter by {error:.3g}, which is more than rounding.")
    rounded = (outputs(model.to(dtype), tokens) - of_adapter).abs().max().item()
    print(f"merged against adapter, {str(dtype).removeprefix('torch.')}: {rounded:.3g}")
    if rounded > effect > 0:
        raise UserError(f"rounding to {dtype} changes more ({rounded:.3g}) than the adapter does; add --dtype float32.")

    final = Path(arguments.output)
    temporary = final.with_name(f".tmp_{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(temporary)
    if config is not None and config.model.task == "score":
        shutil.copy(adapter / "mlp_head.safetensors", temporary)
        config.lora, config.model.base_model = None, str(final)
        config.save(temporary / "training_config.toml")  # eval.py --checkpoint reads it
    if not torch.equal(outputs(load(temporary, dtype), tokens), outputs(model, tokens)):
        shutil.rmtree(temporary)
        raise UserError(f"{final}: the written model does not say what the merged one says; nothing is kept.")
    temporary.rename(final)
    print(f"wrote {final}")


if __name__ == "__main__":
    with one_line_errors():
        main(arguments)
