"""The data that a configuration names, as one thing: its examples, and a hash of all that they depend on.

Like the readers it imports the standard library only, and runs before torch is loaded.
"""

import hashlib
import os
from pathlib import Path

from lora.checksums import sha256_of
from lora.readers import files, read_data

CHOOSES = (  # the keys, beside the files, that say what their examples are
    *("eval_fraction", "max_samples", "label_max", "max_steps_per_example", "neutral_label"),
    "reveal_train_i_have_permission",
)
READERS = Path(__file__).parent / "readers"


def cache_folder():
    """Where tokenised data is kept: PLAINLORA_CACHE, else plainlora/ in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PLAINLORA_CACHE") or Path(cache) / "plainlora")


def digest(*parts):
    """A hash of texts, settings and files (Path: the file's content)."""
    total = hashlib.sha256()
    for part in parts:
        total.update((sha256_of(part) if isinstance(part, Path) else repr(part)).encode() + b"\n")
    return total.hexdigest()[:32]


class Source:
    """The training and the held-out examples of `config`, read (and so checked) at once unless a run has tokenised them.

    `key` changes with every byte of the data, with the settings that choose from it, and with the readers' code. `files`
    is {"train_data", "eval_data"}: path -> sha256, or None for arithmetic:..., which is made, not read.
    """

    def __init__(self, config):
        self.config, data = config, config.data
        held_out = data.eval_paths if data.eval_data else data.only_evaluated
        paths = (*data.train_paths, *held_out)
        sums = {path: None if path.startswith("arithmetic:") else sha256_of(files.local(path)) for path in paths}
        named = {"train_data": data.train_paths, "eval_data": held_out}
        self.files = {name: {path: sums[path] for path in of_name} for name, of_name in named.items()}
        suffixes = [Path(path.lower()).suffixes for path in paths]  # they choose the reader
        chosen = [getattr(data, name) for name in CHOOSES]
        chosen += [len(data.train_paths), len(data.eval_data), config.model.task, suffixes]
        self.key = digest(chosen, *(sums[path] or path for path in paths), *sorted(READERS.glob("*.py")))
        self.folder = cache_folder() / self.key
        self.read = None if any(self.folder.glob("*/facts.json")) else read_data(config)

    def examples(self):
        """(training examples, held-out examples)."""
        self.read = self.read or read_data(self.config)
        return self.read
