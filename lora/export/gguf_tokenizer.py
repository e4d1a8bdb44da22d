"""A tokenizer as GGUF's keys, for llama.cpp.

llama.cpp knows the ways of splitting text into words only by name. A tokenizer is recognised by the
steps in its tokenizer.json, and refused where they have no name, because its text would silently be
split otherwise. llama.cpp does not normalise: the two agree on text that is in NFC already. Source:
src/llama-vocab.cpp of llama.cpp.
"""

import copy
import json

import gguf
from transformers import PreTrainedTokenizerBase

from lora.common.errors import UserError
from lora.evaluation.stop_tokens import turn_end

BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_regex(digits: str) -> list[dict]:
    """Return the steps of a pre-tokenizer like Llama 3's; `digits` is how many a word may have."""
    pattern = {"Regex": WORDS.replace("DIGITS", digits)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# llama.cpp's name: (steps, whether a word that is itself a token is taken without merging)
PRE_TOKENIZERS = {
    "gpt-2": ([GPT2], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, GPT2], False),
    "qwen2": (by_regex(""), False),
    "llama-bpe": (by_regex("{1,3}"), True),
    "smaug-bpe": (by_regex("{1,3}"), False),
}
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SENTENCE_PIECE = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_embeddings: int
) -> None:
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = facts["model"]
    name = byte_level_name(facts)
    if name is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    elif is_sentence_piece(facts):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(sentence_piece_scores(model, num_embeddings))
    else:
        steps = json.dumps([facts["normalizer"], facts["pre_tokenizer"]], ensure_ascii=False)
        known = "llama.cpp knows no tokenizer like this one and would split text otherwise"
        raise UserError(f"gguf: {known}: {steps[:400]}")
    if tokenizer.eos_token_id is None:
        consequence = "llama.cpp would choose one itself"
        raise UserError(f"gguf: the tokenizer has no eos_token, and {consequence}.")
    texts, types = tokens_and_types(facts, num_embeddings)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    adds_bos, adds_eos = added_around(tokenizer)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    bos = tokenizer.bos_token_id
    # Where no bos_token is named, llama.cpp takes token 11.
    writer.add_bos_token_id(tokenizer.eos_token_id if bos is None else bos)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())
        for token in turn_end(tokenizer) - {tokenizer.eos_token_id}:
            writer.add_eot_token_id(token)


def byte_level_name(facts: dict) -> str | None:
    """Return llama.cpp's name of a byte-level BPE, or None."""
    model = facts["model"]
    if not is_plain_bpe(model) or model["byte_fallback"]:
        return None
    if facts["normalizer"] not in (None, {"type": "NFC"}):
        return None
    pre_tokenizer = facts["pre_tokenizer"] or {}
    steps = copy.deepcopy(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))
    for step in steps:
        step.pop("trim_offsets", None)  # changes no token
    for name, known in PRE_TOKENIZERS.items():
        if known == (steps, model["ignore_merges"]):
            return name
    return None


def is_sentence_piece(facts: dict) -> bool:
    """Return whether it is a SentencePiece BPE as in Llama 2 and Mistral."""
    model, added_tokens = facts["model"], facts["added_tokens"]
    if not is_plain_bpe(model) or model["ignore_merges"] or facts["pre_tokenizer"]:
        return False
    if facts["normalizer"] != SENTENCE_PIECE or not BYTES <= model["vocab"].keys():
        return False
    if any(token["normalized"] for token in added_tokens):
        return False
    pieces = model["vocab"].keys() - {token["content"] for token in added_tokens}
    merges = [tuple(merge) for merge in model["merges"]]
    return unions_stand_together(merges) and set(merges) == possible_merges(model["vocab"], pieces)


def unions_stand_together(merges: list[tuple[str, str]]) -> bool:
    """Return whether all pairs with one union stand side by side in the list.

    llama.cpp joins the neighbours whose union scores highest; where this and `possible_merges`
    hold, that is to follow the list. Runs of spaces may stand anywhere, as they do in Llama 2: by
    either rule they grow from the left.
    """
    unions = [left + right for left, right in merges if (left + right).strip("▁")]
    starts = [i for i in range(len(unions)) if i == 0 or unions[i] != unions[i - 1]]
    return len(starts) == len(set(unions))


def possible_merges(vocab: dict[str, int], pieces: set[str]) -> set[tuple[str, str]]:
    """Return all pairs of characters or tokens whose union is one of the pieces."""
    pairs = set()
    for text in pieces:
        for middle in range(1, len(text)):
            left, right = text[:middle], text[middle:]
            if all(len(part) == 1 or part in vocab for part in (left, right)):
                pairs.add((left, right))
    return pairs


def sentence_piece_scores(model: dict, num_embeddings: int) -> list[float]:
    """Return a score for each embedding; the earlier the merge that makes it, the higher."""
    ranks: dict[str, int] = {}
    for left, right in model["merges"]:
        ranks.setdefault(left + right, len(ranks))
    scores = [-0.0] * num_embeddings
    for text, token_id in model["vocab"].items():
        if token_id < num_embeddings:  # `tokens_and_types` refuses the others
            scores[token_id] = -float(ranks.get(text, 0))
    return scores


def is_plain_bpe(model: dict) -> bool:
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return model["type"] == "BPE" and not any(model[name] for name in extras)


def tokens_and_types(facts: dict, num_embeddings: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Return the text and the type of each embedding; the last embeddings may have no token."""
    model = facts["model"]
    texts = [f"[PAD{i}]" for i in range(num_embeddings)]
    types = [gguf.TokenType.UNUSED] * num_embeddings
    ids = [*model["vocab"].values(), *(token["id"] for token in facts["added_tokens"])]
    if max(ids) >= num_embeddings:
        sizes = f"{max(ids) + 1} tokens, the model {num_embeddings} embeddings"
        raise UserError(f"gguf: the tokenizer has {sizes}.")
    for text, token_id in model["vocab"].items():
        is_byte = model["byte_fallback"] and text in BYTES
        texts[token_id] = text
        types[token_id] = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for token in facts["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            found = f"the token {token['content']!r} depends on the text around it"
            raise UserError(f"gguf: {found}; llama.cpp's cannot.")
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        texts[token["id"]] = token["content"]
        types[token["id"]] = kind
    return texts, types


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether bos_token is put before a text, and eos_token after it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for adds_bos in (False, True):
        for adds_eos in (False, True):
            before = [tokenizer.bos_token_id] if adds_bos else []
            after = [tokenizer.eos_token_id] if adds_eos else []
            if full == before + bare + after:
                return adds_bos, adds_eos
    known = "llama.cpp adds bos_token and eos_token only"
    raise UserError(f"gguf: the tokenizer makes {full} of {bare}; {known}.")
