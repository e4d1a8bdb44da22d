"""Learn the embedded base's tokenizer: python assets/make_tokenizer.py TEXT_FILE...

A byte-level BPE, so that any text encodes; its pre-tokenizer is Qwen2's split (digits one by one,
known to llama.cpp as "qwen2"). The merges are learned on the generated arithmetic and on the plain
English of the files given; the one that is shipped was made from gsm8k/train.jsonl,
sgd_chat/train.jsonl and tinyshakespeare/input.txt (docs/results.md, "The embedded data and base").
"""

import json
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parent.parent))

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora.data import arithmetic

VOCABULARY = 2048
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def strings(value):
    """Every string inside a JSON value, so that a row counts by its text and not by its syntax."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def texts(files):
    for example in arithmetic.read("arithmetic:train:5000", "lm"):
        yield example.text
    for file in files:
        for line in Path(file).read_text(encoding="utf-8").splitlines(keepends=True):
            yield from strings(json.loads(line)) if file.endswith(".jsonl") else [line]


def main(files):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(files), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=512,
    ).save_pretrained(Path(__file__).parent / "tiny_base")


if __name__ == "__main__":
    main(sys.argv[1:])
