"""Merge an adapter into its base. The result is kept if its outputs equal those of base + adapter.

    python merge.py --adapter outputs/RUN/final_artifact --output merged
    python merge.py --adapter PEFT_ADAPTER --base_model FOLDER --output merged
    python merge.py --adapter outputs/RUN/final_artifact --output merged --gguf merged.gguf
    python merge.py --adapter PEFT_ADAPTER --output rewritten --portable

The result is a plain Hugging Face folder. The sums are computed in fp32 and rounded once, to the
base's own dtype (or --dtype). A scorer is written with its head as one model of two classes; one
that was trained on a frozen base (lora_r 0), with that base.
"""

from argparse import Namespace
from importlib.util import find_spec
import os
from pathlib import Path
import sys

from lora.common.allocator import keep_freed_memory
from lora.common.checksums import verify_checksums
from lora.common.errors import UserError
from lora.common.exit_status import one_line_errors, require_one_process
from lora.common.plain_file import plain_file
from lora.common.printable_text import printable
from lora.common.saved_files import refuse_inside_artifact, require_sha256
from lora.common.signals import begin_loading_torch
from lora.config.flags import Parser, add_flags
from lora.config.schema import DTYPES, QUANTIZATION_KEYS, LoraConfig


def make_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    adapter = "an adapter, a checkpoint or a final artifact"
    add("--adapter", metavar="DIR", required=True, help=adapter)
    base = "folder or Hub name of the base; default: the one that the checkpoint names"
    add("--base_model", metavar="MODEL", help=base)
    output = "folder to write, which must not exist"
    add("--output", metavar="DIR", required=True, help=output)
    add("--dtype", choices=DTYPES, help="dtype of the weights; default: the base's")
    into = "16bit: the base's own weights (default); dequantized: its 4-bit weights, as QLoRA"
    into += " saw them, made dense again"
    add("--merge_into", choices=("16bit", "dequantized"), default="16bit", help=into)
    add_flags(parser, LoraConfig(), QUANTIZATION_KEYS, "the checkpoint's, or nf4 and true")
    portable = "write no merged model but an adapter that PEFT, vLLM and llama.cpp all read"
    portable += " in the same way: of one rank, with the scale in B"
    add("--portable", action="store_true", help=portable)
    sha256 = "sha256 that the artifact's checksums.json must have, as training printed it"
    add("--expect_sha256", metavar="SHA256", default="", help=sha256)
    file = "also write the merged model for llama.cpp, to a new file, and a Modelfile for Ollama"
    add("--gguf", metavar="FILE", help=file)
    types = ("f32", "f16", "bf16", "q8_0")
    add("--gguf_type", choices=types, help="type of its matrices; default: f16")
    return parser


def modelfile_path(gguf: str) -> Path:
    return Path(gguf).with_suffix(".Modelfile")


def read_arguments(argv: list[str]) -> Namespace:
    arguments = make_parser().parse_args(argv)
    for name in ("adapter", "output", "gguf"):  # a shell leaves the ~ of --output=~/merged as it is
        if getattr(arguments, name):
            setattr(arguments, name, os.path.expanduser(getattr(arguments, name)))
    if Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output} exists; choose another folder.")
    refuse_inside_artifact("--output", arguments.output)
    refuse_inside_artifact("--gguf", arguments.gguf)
    if arguments.gguf:
        if Path(arguments.gguf).suffix.lower() == ".modelfile":
            taken = "the name of the Modelfile that is written beside it"
            raise UserError(f"--gguf {arguments.gguf}: {taken}; end it with .gguf.")
        for path in (Path(arguments.gguf), modelfile_path(arguments.gguf)):
            if path.exists():
                raise UserError(f"--gguf {arguments.gguf}: {path} exists; choose another file.")
        if find_spec("gguf") is None:
            raise UserError("--gguf needs the package gguf: pip install 'plainlora[gguf]'.")
    if arguments.portable:
        names = ("gguf", "dtype", "base_model", *QUANTIZATION_KEYS)
        is_merged = any(getattr(arguments, name) is not None for name in names)
        if is_merged or arguments.merge_into != "16bit":
            only = "it goes with --adapter and --output only"
            raise UserError(f"--portable rewrites an adapter and merges nothing; {only}.")
    given = [name for name in QUANTIZATION_KEYS if getattr(arguments, name) is not None]
    if given and arguments.merge_into == "16bit":
        raise UserError(f"--{given[0]} goes with --merge_into dequantized; add it.")
    if arguments.gguf_type and not arguments.gguf:
        raise UserError("--gguf_type says how --gguf FILE is written; add it.")
    if not Path(arguments.adapter).is_dir():
        raise UserError(f"--adapter {arguments.adapter}: no such folder.")
    return arguments


if __name__ == "__main__":
    # Above `import torch`: torch reads the allocators' settings when it is imported, and a mistake
    # in the command line is reported before the seconds that importing torch takes.
    keep_freed_memory()
    with one_line_errors():
        require_one_process()
        arguments = read_arguments(sys.argv[1:])
    begin_loading_torch()

import torch
from transformers import AutoModel

from lora.adapter import load_adapter
from lora.common.atomic_files import atomic_folder, write_text_atomically
from lora.common.checkpoint_folders import adapter_folder, is_written_by_us
from lora.evaluation.stop_tokens import set_stop_tokens, stop_tokens
from lora.export import merging
from lora.export.merging import AdapterSource, difference, four_bits_of, load_base, outputs
from lora.export.portable_adapter import write_portable
from lora.layer import merge
from lora.model.tokenizer_file import save_tokenizer
from lora.model.weights import add_tokens, cast_weights, load_shape, load_tokenizer


def main(arguments: Namespace) -> None:
    require_sha256(arguments.adapter, arguments.expect_sha256)
    if arguments.expect_sha256:  # so its checksums.json is ours, and not another program's
        verify_checksums(arguments.adapter)
    if arguments.portable:
        rewrite_portable(arguments)
        return

    # 1. Load the base and its tokenizer.
    source = merging.find_adapter(arguments.adapter, arguments.base_model)
    refuse_other_kinds(arguments, source)
    shape, dtype, tokenizer = load_shape(source.base_model)
    num_base_tokens = len(tokenizer)
    if arguments.dtype:
        dtype = getattr(torch, arguments.dtype)
    # A scorer's model is the bare backbone.
    model_class = AutoModel if source.is_scorer else merging.class_for(shape)
    warning = source.verify()
    if warning:
        print(warning)
    into_4bit = arguments.merge_into == "dequantized"
    quantization = four_bits_of(arguments, source.config) if into_4bit else None
    model = load_base(model_class, source.base_model, quantization)
    config = source.config
    if config is not None:
        add_tokens(model, tokenizer, config.model.add_special_tokens)
    if (source.folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(str(source.folder))  # with the tokens and template of the run
    elif (source.folder / "chat_template.jinja").is_file():  # a checkpoint
        template = source.folder / "chat_template.jinja"
        tokenizer.chat_template = plain_file(template).read_text(encoding="utf-8")

    # 2. Merge, and compare the outputs of the base, of base + adapter, and of the merged model.
    torch.manual_seed(0)
    tokens = torch.randint(shape.get_text_config().vocab_size, (4, 32))
    base_outputs = outputs(model, tokens)
    if source.adapter_path:
        load_adapter(model, source.adapter_path)
    merging.require_embeddings(source, model, len(tokenizer), num_base_tokens)
    gguf_type = arguments.gguf_type or "f16"
    if arguments.gguf:
        from lora.export.gguf import make_writer, write_gguf  # an extra
        from lora.export.modelfile import modelfile

        make_writer(model.config, tokenizer, gguf_type)  # refuses what it cannot, before the work
        stops = stop_tokens(model, tokenizer)
        for_ollama = modelfile(Path(arguments.gguf).name, stops, tokenizer)
    adapter_outputs = outputs(model, tokens)
    merge(model)
    merged_outputs = outputs(model, tokens)
    effect = merging.require_same_outputs(source, base_outputs, adapter_outputs, merged_outputs)
    if source.is_4bit and not into_4bit:
        try:
            quantization = four_bits_of(arguments, config)
        except UserError as error:  # the merge itself does not need bitsandbytes
            print(f"note: not compared with the 4-bit base of the training: {error}")
        else:
            outputs_of_4bit = merging.outputs_in_4bit(
                source, model_class, quantization, tokenizer, tokens
            )
            distance = difference(merged_outputs, outputs_of_4bit)
            hint = "(--merge_into dequantized keeps that base)"
            print(f"against the 4-bit base it was trained on: {distance:.3g} {hint}")

    # 3. Round, write, and compare what was written.
    with atomic_folder(Path(arguments.output)) as temporary:
        cast_weights(model, dtype)
        save_tokenizer(tokenizer, temporary)
        if source.is_scorer:
            merging.save_scorer(model, tokenizer, source.folder, temporary)
            # eval.py --checkpoint reads this configuration.
            config.lora = None
            config.model.base_model = str(Path(arguments.output))
            config.model.add_special_tokens = []
            config.model.head_tokens = []
            config.save(temporary / "training_config.toml")
        else:
            set_stop_tokens(model, tokenizer)
            model.save_pretrained(temporary)
        written = merging.read_back(model, temporary)
        rounding = merging.compare_written(written, tokens, adapter_outputs, merged_outputs)
        if source.adapter_path:
            merging.require_small_rounding(rounding, effect, dtype)
    print(f"wrote {arguments.output}")
    if arguments.gguf:
        write_gguf(Path(arguments.output), Path(arguments.gguf), gguf_type)
        path = modelfile_path(arguments.gguf)
        write_text_atomically(path, for_ollama)
        print(f"wrote {arguments.gguf} and {path}")


def rewrite_portable(arguments: Namespace) -> None:
    """Write the adapter anew, in the form that PEFT, vLLM and llama.cpp all read."""
    folder = Path(arguments.adapter)
    merging.refuse_part(folder)
    if is_written_by_us(folder):
        verify_checksums(folder)
    with atomic_folder(Path(arguments.output)) as temporary:
        write_portable(adapter_folder(folder) or folder, temporary)
    if (folder / "mlp_head.safetensors").is_file():
        print(printable(f"note: {folder}: the score head, mlp_head.safetensors, is left out"))
    print(f"wrote {arguments.output}")


def refuse_other_kinds(arguments: Namespace, source: AdapterSource) -> None:
    """Raise UserError where the flags ask for what cannot be made of such an adapter."""
    if arguments.gguf and source.is_scorer:
        found = f"{source.folder} is a step scorer, whose head llama.cpp does not know"
        raise UserError(f"--gguf: {found}; leave it out.")
    if source.is_scorer and source.config.model.score_layer:
        found = f"its head reads layer {source.config.model.score_layer}"
        problem = "only whole models are merged"
        raise UserError(f"--adapter {source.folder}: {found}, and {problem}; use it unmerged.")
    if arguments.merge_into == "dequantized" and source.config is not None and not source.is_4bit:
        found = f"{source.folder} was not trained in 4 bits"
        raise UserError(f"--merge_into dequantized: {found}; leave it out.")


if __name__ == "__main__":
    with one_line_errors():
        main(arguments)
