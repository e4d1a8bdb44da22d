"""Writes assets/char: a tokenizer of single bytes (no merges, so a letter of plain English is a
token) and a model shape.

    python assets/make_char.py

The shape has nanoGPT's CPU setting (4 layers, 4 heads, width 128) as a Llama of no more parameters.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "char"
END = "<|endoftext|>"

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(
    models.BPE({letter: i for i, letter in enumerate([*letters, END])}, merges=[])
)
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(
    FOLDER
)
LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=len(letters) + 1,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=len(letters),
    pad_token_id=len(letters),
).save_pretrained(FOLDER)
