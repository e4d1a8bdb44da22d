"""The data that a configuration names, and a hash of all it depends on. Runs without torch."""

from collections.abc import Sequence
import contextlib
import hashlib
import os
from pathlib import Path
import time

from lora.common.atomic_files import write_text_atomically
from lora.common.checksums import file_sha256
from lora.config.schema import Config
from lora.data import files
from lora.data.split import Split

# Keys of [model] and [data] that change no token, so that runs which differ in nothing else share
# the tokenised data. Instead of their paths, the contents of files and the tokenizer are hashed.
# max_length may still be "auto" here; the folder that this key names is divided by its number.
NOT_IN_KEY = {
    "base_model", "init_from", "train_data", "eval_data",
    "prm800k_path", "eqasc_path", "reveal_path", "max_length",
    "data_weights", "prm800k_weight", "eqasc_weight", "reveal_weight",
    "head_dropout", "head_tokens", "score_layer", "score_loss",
}  # fmt: skip
SETTLED = 2.0  # seconds
CODE = sorted(Path(__file__).parent.rglob("*.py"))


def cache_folder() -> Path:
    """Return PLAINLORA_CACHE, or else plainlora/ in the user's cache folder."""
    if os.environ.get("PLAINLORA_CACHE"):
        return Path(os.environ["PLAINLORA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainlora"


def digest(*parts) -> str:
    """Return a hash of texts, settings and files (Path: the file's content)."""
    total = hashlib.sha256()
    for part in parts:
        text = file_sha256(part) if isinstance(part, Path) else repr(part)
        total.update(text.encode() + b"\n")
    return total.hexdigest()[:32]


def cache_key(config: Config, sums: dict[str, str | None]) -> str:
    """Return a hash of all that the tokens of a run's data depend on, except the tokenizer.

    `sums` is the sha256 of each path's content, or None where the path says what the data is.
    """
    data = config.data
    paths = [*data.train_paths, *data.held_out_paths]
    settings = {**vars(config.model), **vars(data)}
    chosen = sorted((name, value) for name, value in settings.items() if name not in NOT_IN_KEY)
    counts = (len(data.train_paths), len(data.eval_data))
    suffixes = [Path(path.lower()).suffixes for path in paths]  # they choose the reader
    return digest(chosen, counts, suffixes, *[sums[path] or path for path in paths], *CODE)


class RawData:
    """The data that a configuration names.

    It is read, and so checked, at once unless an earlier run has tokenised it. `files` holds
    "train_data" and "eval_data", each {path: its `content_sha256`}.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        train_paths = config.data.train_paths
        eval_paths = config.data.held_out_paths
        sums = {path: content_sha256(path) for path in dict.fromkeys(train_paths + eval_paths)}
        self.files = {
            "train_data": {path: sums[path] for path in train_paths},
            "eval_data": {path: sums[path] for path in eval_paths},
        }
        self.key = cache_key(config, sums)
        self.folder = cache_folder() / self.key
        is_tokenised = any(self.folder.glob("[!.]*/facts.json"))
        self.split = None if is_tokenised else Split(config)

    def split_data(self) -> Split:
        if self.split is None:
            self.split = Split(self.config)
        return self.split


def content_sha256(path: str) -> str | None:
    """Return the sha256 of a file, or a hash of those of a folder or a glob and their kinds.

    None for arithmetic:..., which is generated.
    """
    if path.startswith("arithmetic:"):
        return None
    local_files = files.local_files(path)
    if list(local_files) == [path]:
        return remembered_sha256(local_files[path])
    parts = [(Path(name).suffixes, remembered_sha256(file)) for name, file in local_files.items()]
    return digest(parts)


def changed_path(paths: Sequence[str], recorded: dict[str, str | None]) -> str:
    """Return the first path whose content is not what a run recorded of its data, or "".

    `recorded` is {path: sha256} as a run saved it, in the order of `paths`; its paths may differ.
    """
    sums = list(recorded.values())
    for i, path in enumerate(dict.fromkeys(paths)):
        if [content_sha256(path)] != sums[i : i + 1]:
            return path
    return ""


def remembered_sha256(path: Path) -> str:
    """Return the sha256 of a file, which is taken once for the same path, inode, size and time."""
    stat = path.stat()
    identity = (str(path.absolute()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    remembered = cache_folder() / "sha256" / digest(identity)
    try:
        sha256 = remembered.read_text(encoding="ascii")
        if len(sha256) == 64:  # fewer while another process writes it
            return sha256
    except (OSError, ValueError):
        pass
    sha256 = file_sha256(path)
    # A file that is being written may change again within the resolution of its time.
    if time.time() - stat.st_mtime > SETTLED:
        with contextlib.suppress(OSError):  # it is only taken again
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(remembered, sha256)
    return sha256
