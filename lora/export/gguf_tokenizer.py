"""A tokenizer as GGUF's keys, for llama.cpp.

llama.cpp knows the ways of splitting text into words only by name, and has its own code for each. A
tokenizer is therefore recognised by what it does (the steps in its tokenizer.json), and one that
llama.cpp has no name for is refused, because it would be split otherwise in silence. llama.cpp does
not normalise: it says the same of text that is in NFC already. Source: src/llama-vocab.cpp of
llama.cpp.
"""

from itertools import pairwise
import json

import gguf

from lora.common.errors import UserError
from lora.evaluation.generate import turn_end

BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def by_regex(digits):
    """The steps of a pre-tokenizer like Llama 3's, as they stand in tokenizer.json, with so many
    digits to a word.
    """
    split = {
        "type": "Split",
        "pattern": {"Regex": WORDS.replace("DIGITS", digits)},
        "behavior": "Isolated",
        "invert": False,
    }
    return [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# Llama.cpp's name: (steps, whether a whole word that is a token is taken without merging)
PRE_TOKENIZERS = {
    "gpt-2": ([GPT2], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, GPT2], False),
    "qwen2": (by_regex(""), False),
    "llama-bpe": (by_regex("{1,3}"), True),
    "smaug-bpe": (by_regex("{1,3}"), False),
}
SENTENCE_PIECE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def tokenizer_keys(tokenizer, size):
    """{method of GGUFWriter: its argument}, for a model of `size` embeddings. Raises UserError."""
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    keys = byte_level_keys(facts) or sentence_piece_keys(facts, size)
    if keys is None:
        steps = json.dumps([facts["normalizer"], facts["pre_tokenizer"]], ensure_ascii=False)
        raise UserError(
            f"gguf: llama.cpp knows no tokenizer like this one and would split text otherwise: {steps[:400]}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "gguf: the tokenizer has no eos_token, and llama.cpp would end at one of its own choice."
        )
    keys["add_token_list"], keys["add_token_types"] = tokens_and_types(facts, size)
    keys["add_add_bos_token"], keys["add_add_eos_token"] = added_around(tokenizer)
    keys["add_eos_token_id"] = tokenizer.eos_token_id
    # Where none is named llama.cpp takes token 11.
    keys["add_bos_token_id"] = (
        tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    )
    if tokenizer.unk_token_id is not None:
        keys["add_unk_token_id"] = tokenizer.unk_token_id
    if tokenizer.pad_token_id is not None:
        keys["add_pad_token_id"] = tokenizer.pad_token_id
    if tokenizer.chat_template:
        keys["add_chat_template"] = tokenizer.get_chat_template()
        for token in turn_end(tokenizer) - {tokenizer.eos_token_id}:
            keys["add_eot_token_id"] = token
    return keys


def byte_level_keys(facts):
    """Of a byte-level BPE that llama.cpp knows: its name and the merges; else None."""
    model, steps = facts["model"], facts["pre_tokenizer"] or {}
    if (
        not plain_bpe(model)
        or model["byte_fallback"]
        or facts["normalizer"] not in (None, {"type": "NFC"})
    ):
        return None
    steps = [
        # Which is not about tokens
        {name: value for name, value in step.items() if name != "trim_offsets"}
        for step in steps.get("pretokenizers", [steps])
    ]
    for name, known in PRE_TOKENIZERS.items():
        if known == (steps, model["ignore_merges"]):
            merges = [" ".join(merge) for merge in model["merges"]]
            return {
                "add_tokenizer_model": "gpt2",
                "add_tokenizer_pre": name,
                "add_token_merges": merges,
            }
    return None


def sentence_piece_keys(facts, size):
    """Of a SentencePiece BPE as in Llama 2 and Mistral: a score for each token; else None."""
    model = facts["model"]
    if (
        not plain_bpe(model)
        or model["ignore_merges"]
        or facts["normalizer"] != SENTENCE_PIECE
        or facts["pre_tokenizer"]
    ):
        return None
    merges = [tuple(merge) for merge in model["merges"]]
    added = {token["content"] for token in facts["added_tokens"]}
    if not BYTES <= model["vocab"].keys() or any(
        token["normalized"] for token in facts["added_tokens"]
    ):
        return None
    if not scores_order(merges, model["vocab"], added):
        return None
    rank = {
        union: place
        for place, union in enumerate(dict.fromkeys(left + right for left, right in merges))
    }
    texts = {id: text for text, id in model["vocab"].items()}
    scores = [-float(rank.get(texts.get(id), 0)) for id in range(size)]
    return {
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_scores": scores,
    }


def scores_order(merges, vocab, added):
    """Whether to join the neighbours whose union scores highest, as llama.cpp does, is to go by
    this list of pairs.

    It is where pairs with one union stand together, and any two pieces whose union is a token are
    in the list. Runs of spaces may stand apart, as they do in Llama 2: they grow from the left by
    either rule.
    """
    words = [left + right for left, right in merges if (left + right).strip("▁")]
    together = len(words) < 2 or 1 + sum(one != other for one, other in pairwise(words)) == len(
        set(words)
    )
    cuts = {
        (text[:place], text[place:])
        for text in vocab.keys() - added
        for place in range(1, len(text))
    }
    pairs = {cut for cut in cuts if all(len(piece) == 1 or piece in vocab for piece in cut)}
    return together and pairs == set(merges)


def plain_bpe(model):
    """Whether it is BPE that marks neither inner pieces nor the ends of words and leaves out no
    merges at random.
    """
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return model["type"] == "BPE" and not any(model[name] for name in odd)


def tokens_and_types(facts, size):
    """([the text of each token], [its type]) for `size` embeddings, of which the last may have no
    token.
    """
    texts = {id: text for text, id in facts["model"]["vocab"].items()}
    added = {token["id"]: token for token in facts["added_tokens"]}
    if max(texts | added) >= size:
        raise UserError(
            f"gguf: the tokenizer has {max(texts | added) + 1} tokens, the model {size} embeddings."
        )
    types = dict.fromkeys(range(size), gguf.TokenType.UNUSED)
    for id, text in texts.items():
        is_byte = facts["model"]["byte_fallback"] and text in BYTES
        types[id] = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for id, token in added.items():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UserError(
                f"gguf: the token {token['content']!r} depends on the text around it; llama.cpp's cannot."
            )
        texts[id] = token["content"]
        types[id] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    return [texts.get(id, f"[PAD{id}]") for id in range(size)], [types[id] for id in range(size)]


def added_around(tokenizer):
    """(whether bos_token is put before a text, whether eos_token is put after it). Raises
    UserError.
    """
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise UserError(
        f"gguf: the tokenizer makes {whole} of {bare}; llama.cpp adds bos_token and eos_token only."
    )
