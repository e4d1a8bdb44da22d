"""tokenizer.json is what a base was trained with, and transformers may read it otherwise.

transformers 5 makes some tokenizers anew from the name of their class and drops parts of the file
(its issues 45812 and 45920): GPT2Tokenizer forgets that numbers are split into digits.
"""

from pathlib import Path
import shutil

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

# What tokenizers split in different ways: digits, line ends, blanks, accents, CJK, emoji, code.
PROBE = (
    "In 2024 she paid $1,234.50 (007).\r\n\r\n\tdef f(x1):\n    return x1 ** 2  # naïve\n\n"
    " Ärger\u00a0… don't  WON'T   你好，世界。日本語 한국어 😀🇫🇷 ﬁ ½ ١٢٣ https://a.b/c?d=10%20 "
)


def tokenizer_file(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Return the tokenizer.json that a tokenizer was loaded from, or None without one."""
    return base_file(tokenizer.name_or_path, "tokenizer.json") if tokenizer.name_or_path else None


def base_file(base_model: str, name: str) -> Path | None:
    """Return a file of a base, downloaded where it is not on this disk; None if it has none."""
    path = cached_file(base_model, name, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None


def follows_its_file(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether PROBE has the tokens that tokenizer.json by itself gives it."""
    path = tokenizer_file(tokenizer)
    if path is None:
        return True
    by_file = Tokenizer.from_file(str(path))
    by_file.no_truncation()  # files of sentence-transformers cut a text, and fill it up
    by_file.no_padding()
    tokens = tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
    return tokens == by_file.encode(PROBE, add_special_tokens=False).ids


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer; unless tokens were added, with the very file it was loaded from."""
    path = tokenizer_file(tokenizer)
    tokenizer.save_pretrained(folder)
    if path is None:
        return
    # A token that the vocabulary had already can be added, and leaves its size as it was. The named
    # special tokens, such as "</s>", are added by transformers where the file does not say so.
    own = Tokenizer.from_file(str(path))
    added = tokenizer.added_tokens_decoder
    new = {str(added[i]) for i in added.keys() - own.get_added_tokens_decoder().keys()}
    if own.get_vocab_size() == len(tokenizer) and new <= set(tokenizer.all_special_tokens):
        shutil.copyfile(path, folder / path.name)
