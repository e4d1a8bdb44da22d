"""The data that a configuration names: its examples, and a hash of everything that they depend on.

Light, like the readers: it runs before torch is loaded.
"""

import hashlib
import os
from pathlib import Path

from lora.common.checksums import file_sha256
from lora.data import files
from lora.data.split import read_data

# Keys of [model] and [data] that change no token, so that runs which differ in nothing else share
# what is tokenised. Of the files their contents are hashed, and of the base its tokenizer.
NOT_IN_KEY = {
    *(
        "base_model",
        "init_from",
        "train_data",
        "eval_data",
        "prm800k_path",
        "eqasc_path",
        "reveal_path",
    ),
    *("data_weights", "prm800k_weight", "eqasc_weight", "reveal_weight"),
    *("head_dropout", "head_tokens", "score_loss"),
}
CODE = sorted(Path(__file__).parent.rglob("*.py"))


def cache_folder():
    """Where tokenised data is kept: PLAINLORA_CACHE, else plainlora/ in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PLAINLORA_CACHE") or Path(cache) / "plainlora")


def digest(*parts):
    """A hash of texts, settings and files (Path: the file's content)."""
    total = hashlib.sha256()
    for part in parts:
        total.update((file_sha256(part) if isinstance(part, Path) else repr(part)).encode() + b"\n")
    return total.hexdigest()[:32]


def cache_key(config, sums):
    """A hash of all that the tokens of a configuration's data depend on, but for the tokenizer.

    sums: {path: sha256 of the file's content, or None where the path itself says what the data is}.
    """
    data = config.data
    held_out = data.eval_paths if data.eval_data else data.only_evaluated
    paths = (*data.train_paths, *held_out)
    settings = vars(config.model) | vars(data)
    chosen = sorted((name, value) for name, value in settings.items() if name not in NOT_IN_KEY)
    numbers = len(data.train_paths), len(data.eval_data)
    suffixes = [Path(path.lower()).suffixes for path in paths]  # they choose the reader
    return digest(chosen, numbers, suffixes, *(sums[path] or path for path in paths), *CODE)


class RawData:
    """The training and the held-out examples of `config`, read (and so checked) at once unless a
    run has tokenised them.

    `key` changes with every byte of the data, with the settings that may change a token, and with
    the code of lora/data/. `files` is {"train_data", "eval_data"}: path -> sha256, or None for
    arithmetic:..., which is made, not read.
    """

    def __init__(self, config):
        self.config, data = config, config.data
        held_out = data.eval_paths if data.eval_data else data.only_evaluated
        paths = (*data.train_paths, *held_out)
        sums = {
            path: None if path.startswith("arithmetic:") else file_sha256(files.local(path))
            for path in paths
        }
        named = {"train_data": data.train_paths, "eval_data": held_out}
        self.files = {
            name: {path: sums[path] for path in of_name} for name, of_name in named.items()
        }
        self.key = cache_key(config, sums)
        self.folder = cache_folder() / self.key
        self.read = None if any(self.folder.glob("*/facts.json")) else read_data(config)

    def examples(self):
        """(training examples, held-out examples)."""
        self.read = self.read or read_data(self.config)
        return self.read
