"""Fold an adapter into its base: a plain Hugging Face folder, proved equal to base + adapter before
it is written.

    python merge.py --adapter outputs/RUN/final_artifact --output merged
    python merge.py --adapter PEFT_ADAPTER --base_model FOLDER --output merged
    python merge.py --adapter outputs/RUN/final_artifact --output merged --gguf merged.gguf --gguf_type q8_0
    python merge.py --adapter PEFT_ADAPTER --output rewritten --portable

The sums are made in fp32 and rounded once, to the base's own type (or --dtype). The head of a
scorer goes along; one that was trained on a frozen base (lora_r 0) is written with that base.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
import sys

from lora.common.allocator import keep_freed_memory
from lora.common.errors import UserError
from lora.common.exit_status import one_line_errors, require_one_process
from lora.config.flags import Parser, add_flags
from lora.config.schema import QUANTIZATION_KEYS, LoraConfig


def read_arguments(argv):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        required=True,
        help="an adapter, a checkpoint or a final artifact",
    )
    parser.add_argument(
        "--base_model", metavar="DIR", help="the base; default: the one that our checkpoint names"
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="folder to write, which must not exist"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; default: the base's",
    )
    into = (
        "the base as it is (default), or the 4-bit base that QLoRA was trained on, made dense again"
    )
    parser.add_argument(
        "--merge_into", choices=("16bit", "dequantized"), default="16bit", help=into
    )
    add_flags(parser, LoraConfig(), QUANTIZATION_KEYS, "our checkpoint's, else nf4 and true")
    portable = "write an adapter instead: one rank, the scale in B, so that PEFT, vLLM and llama.cpp do the same with it"
    parser.add_argument("--portable", action="store_true", help=portable)
    parser.add_argument(
        "--gguf",
        metavar="FILE",
        help="also write the merged model for llama.cpp, to a file not there yet",
    )
    parser.add_argument(
        "--gguf_type", choices=("f32", "f16", "bf16", "q8_0"), help="of its matrices; default: f16"
    )
    arguments = parser.parse_args(argv)
    if Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output} exists; choose another folder.")
    if arguments.gguf and Path(arguments.gguf).exists():
        raise UserError(f"--gguf {arguments.gguf} exists; choose another file.")
    if arguments.gguf and find_spec("gguf") is None:
        raise UserError("--gguf needs the package gguf: pip install 'plainlora[gguf]'.")
    others = (vars(arguments)[name] for name in ("gguf", "dtype", "base_model", *QUANTIZATION_KEYS))
    if arguments.portable and (
        any(value is not None for value in others) or arguments.merge_into != "16bit"
    ):
        raise UserError(
            "--portable rewrites an adapter and merges nothing; it goes with --adapter and --output only."
        )
    if arguments.gguf_type and not arguments.gguf:
        raise UserError("--gguf_type says how --gguf FILE is written; add it.")
    return arguments


if __name__ == "__main__":
    # Above `import torch`: torch reads the allocators' settings when it is imported, and a mistake
    # in the command line or the data is reported before the seconds that importing torch takes.
    keep_freed_memory()
    with one_line_errors():
        require_one_process()
        arguments = read_arguments(sys.argv[1:])

import torch
from transformers import AutoModel

from lora.adapter import load_adapter
from lora.common.atomic_files import atomic_folder
from lora.common.checksums import verify_checksums
from lora.export.merging import (
    class_for,
    difference,
    find_adapter,
    four_bits_of,
    load_base,
    outputs,
    read_back,
    save_scorer,
)
from lora.export.portable_adapter import write_portable
from lora.layer import merge
from lora.model.weights import add_tokens, load_shape, load_tokenizer
from lora.training.base_integrity import file_sums, warn_other_base


def main(arguments):
    if arguments.portable:
        folder = Path(arguments.adapter)
        with atomic_folder(Path(arguments.output)) as temporary:
            write_portable(
                folder / "lora_adapter" if (folder / "lora_adapter").is_dir() else folder, temporary
            )
        print(f"wrote {arguments.output}")
        return
    adapter, base_model, config = find_adapter(Path(arguments.adapter), arguments.base_model)
    ours, scorer = adapter.parent, config is not None and config.model.task == "score"
    head_alone = not adapter.is_dir()
    if arguments.gguf and scorer:
        raise UserError(
            f"--gguf: {arguments.adapter} is a step scorer, whose head llama.cpp does not know; leave it out."
        )
    into_4bit = arguments.merge_into == "dequantized"
    if into_4bit and config is not None and not config.lora.load_in_4bit:
        raise UserError(
            f"--merge_into dequantized: {arguments.adapter} was not trained in 4 bits; leave it out."
        )
    shape, dtype, tokenizer = load_shape(base_model)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else dtype
    model_class = AutoModel if scorer else class_for(shape)  # of a scorer the bare backbone
    if config is not None:
        verify_checksums(ours)
        if warning := warn_other_base(
            ours, base_model, file_sums(replace(config.model, base_model=base_model))
        ):
            print(warning)
    model = load_base(
        model_class, base_model, four_bits_of(arguments, config) if into_4bit else None
    )
    if config is not None and config.model.add_special_tokens:
        add_tokens(model, tokenizer, config.model.add_special_tokens)
    # A final artifact's, with its template
    if config is not None and (ours / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(str(ours))
    if arguments.gguf:
        from lora.export.gguf import gguf_keys, write_gguf  # an extra

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
        raise UserError(
            f"--adapter {arguments.adapter}: it changes nothing; use the base as it is."
        )
    if config is not None and config.lora.load_in_4bit and not into_4bit:
        trained = load_base(model_class, base_model, four_bits_of(arguments, config))
        if not head_alone:
            load_adapter(trained, adapter)
        apart = difference(of_merged, outputs(trained, tokens))
        print(
            f"against the 4-bit base it was trained on: {apart:.3g} (--merge_into dequantized keeps that base)"
        )
        del trained

    final = Path(arguments.output)
    with atomic_folder(final) as temporary:
        model.to(dtype)
        tokenizer.save_pretrained(temporary)
        if scorer:
            save_scorer(model, tokenizer, ours, temporary)
            config.lora, config.model.base_model, config.model.add_special_tokens = (
                None,
                str(final),
                [],
            )
            config.save(temporary / "training_config.toml")  # eval.py --checkpoint reads it
        else:
            model.save_pretrained(temporary)
        rounded = difference(outputs(read_back(model, model_class, temporary), tokens), of_adapter)
        print(f"merged against adapter, {str(dtype).removeprefix('torch.')}: {rounded:.3g}")
        if rounded > effect and not head_alone:
            raise UserError(
                f"rounding to {dtype} changes more ({rounded:.3g}) than the adapter does; add --dtype float32."
            )
    print(f"wrote {final}")
    if arguments.gguf:
        write_gguf(final, Path(arguments.gguf), arguments.gguf_type or "f16")
        print(f"wrote {arguments.gguf}")


if __name__ == "__main__":
    with one_line_errors():
        main(arguments)
