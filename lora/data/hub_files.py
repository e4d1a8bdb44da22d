"""Files of data sets on the Hugging Face Hub, downloaded once into its cache.

    hf://datasets/OWNER/NAME/PATH               a file, or the files that a glob matches
    hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]   what the data set's card says, or its Parquet files,
                                                or else the Hub's own conversion to Parquet

OWNER/NAME@REVISION is a branch, tag or commit. Without SPLIT it is "train".
"""

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
import re
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import HTTPError
from yaml import YAMLError

from lora.common.errors import UserError
from lora.common.printable_text import print_on_rank_zero
from lora.data.file_kinds import ARROW, HUB, SPLIT_NAMES, kind_of
from lora.data.file_sets import is_data, note_unread, require_one_set

ADDRESS = re.compile(HUB + r"([^/@:]+/[^/@:]+)(?:@([^/:]+))?(?:/(.+?))?(?::([\w.-]+))?")
DATA_SET: dict[str, Any] = {"repo_type": "dataset"}
# FOLDER/SPLIT-00000-of-00001.parquet, FOLDER/SPLIT/0000.parquet, FOLDER/SPLIT.parquet
SPLIT_FILE = re.compile(
    r"(?:(.*)/)?(?:partial-)?([A-Za-z][\w.]*?)(?:-\d+-of-\d+\S*|/\d+|)\.parquet"
)
SHARD = re.compile(r"(.*-)\d{5}(-of-(\d{5})\..*)")  # NAME-00000-of-00002.parquet
Splits = dict[str, dict[str, list[str]]]  # {config: {split: files or globs}}


@cache  # a path names the same files during a run
def hub_files(path: str) -> dict[str, Path]:
    """Return {name in messages: file} of the files that a path names. Raises UserError."""
    match = ADDRESS.fullmatch(path)
    if not match:
        expected = f"{HUB}OWNER/NAME/FILE or {HUB}OWNER/NAME/CONFIG:SPLIT"
        raise UserError(f"{path}: expected {expected} (or OWNER/NAME@REVISION).")
    repository, revision, name, split = match.groups()
    name = name or ""
    is_glob = "*" in name
    try:
        is_file = bool(kind_of(name)) or name.lower().endswith(ARROW)
        if is_file and not split and not is_glob:
            return {path: Path(hf_hub_download(repository, name, revision=revision, **DATA_SET))}
        folder, files, is_listed = folder_and_names(repository, revision)
        patterns = [name]
        if not is_glob:
            configs = configs_of_card(folder / "README.md") or configs_of_names(files)
            if not configs and revision:
                problem = f"neither a card nor Parquet files give the splits of {revision}"
                mend = f"name the files, {HUB}{repository}@{revision}/GLOB"
                raise UserError(f"{path}: {problem}; {mend}, or no revision.")
            if not configs:
                folder, files, is_listed = folder_and_names(repository, "refs/convert/parquet")
                configs = configs_of_names(files)
            splits = configs[choose(path, "config", name, configs)]
            patterns = splits[choose(path, "split", split, splits)]
        files = [file for file in sorted(files) if matches(file, patterns)]
        note_unread(path, [Path(file) for file in files])
        files = [file for file in files if is_data(Path(file))]
        if not files:
            raise UserError(f"{path}: no data file matches {', '.join(patterns)}.")
        if is_glob:
            require_one_set(path, files)
        if not is_listed:
            require_all_shards(path, files, name if is_glob else "**")
            how_many = f"the {len(files)} in the cache that it names are read"
            print_on_rank_zero(f"note: {path}: the list of files cannot be fetched; {how_many}")
        snapshot_download(repository, revision=folder.name, allow_patterns=files, **DATA_SET)
    except (HTTPError, OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    if any("partial-" in file for file in files):
        print_on_rank_zero(f"note: {path}: the Hub's conversion to Parquet holds only a part of it")
    return {f"{HUB}{repository}/{file}": folder / file for file in files}


def matches(name: str, patterns: list[str]) -> bool:
    """Return whether a file is one of these, or one of a glob's: only "**" crosses folders."""
    return any(parts_match(name.split("/"), pattern.split("/")) for pattern in patterns)


def parts_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    first, *rest = patterns
    if first == "**":
        return any(parts_match(parts[i:], rest) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], first) and parts_match(parts[1:], rest)


def folder_and_names(repository: str, revision: str | None) -> tuple[Path, list[str], bool]:
    """Return the folder of a revision in the cache, with its card, and the names of its files.

    Without a network these are the files that were downloaded before, and the last value is false.
    """
    small = ["README.md", ".gitattributes"]
    snapshot = snapshot_download(repository, revision=revision, allow_patterns=small, **DATA_SET)
    folder = Path(snapshot)
    try:
        return folder, HfApi().list_repo_files(repository, revision=folder.name, **DATA_SET), True
    except (HTTPError, OSError):
        files = [file for file in folder.rglob("*") if file.is_file()]
        return folder, [file.relative_to(folder).as_posix() for file in files], False


def require_all_shards(path: str, files: list[str], pattern: str) -> None:
    """Raise UserError where one of NAME-00000-of-00002 that matches is not among the files."""
    sets = {match.groups() for match in map(SHARD.fullmatch, files) if match}
    for start, end, count in sorted(sets):
        first = int(f"{start}{count}{end}" in files)  # some count from 1
        for i in range(int(count)):
            shard = f"{start}{first + i:05}{end}"
            if matches(shard, [pattern]) and shard not in files:
                problem = f"not in the cache, and the Hub cannot be reached: {shard}"
                raise UserError(f"{path}: {problem}; download it first.")


def configs_of_card(card: Path) -> Splits:
    """Return the files that a data set's card gives for each configuration and split."""
    metadata = metadata_load(card) if card.is_file() else None
    configs: Splits = {}
    for config in (metadata or {}).get("configs") or []:
        entries = config.get("data_files") or []
        if isinstance(entries, str) or all(isinstance(entry, str) for entry in entries):
            entries = [{"split": "train", "path": entries}] if entries else []
        splits = {}
        for entry in entries:
            paths = entry["path"]
            splits[entry["split"]] = paths if isinstance(paths, list) else [paths]
        if splits:
            configs[config["config_name"]] = splits
            if config.get("default"):
                configs["default"] = splits
    return configs


def configs_of_names(names: list[str]) -> Splits:
    """Return the Parquet files of each configuration and split, by their names."""
    configs: Splits = {}
    for name in names:
        match = SPLIT_FILE.fullmatch(name)
        if match:
            config = match[1] if match[1] not in (None, "data") else "default"
            configs.setdefault(config, {}).setdefault(match[2], []).append(name)
    splits = {split for splits in configs.values() for split in splits}
    others = []
    for name in names:
        is_about_data = "/" not in name and Path(name).stem in ("dataset_info", "dataset_infos")
        if kind_of(name) in ("json", "table") and not is_about_data:
            others.append(name)
    if others and not any(re.match(rf"({SPLIT_NAMES})(?![a-z])", split) for split in splits):
        return {}  # the data may lie in these
    return configs


def choose(path: str, what: str, wanted: str | None, known: dict) -> str:
    """Return the configuration or the split that is wanted, or the default. Raises UserError."""
    usual = {"config": "default", "split": "train"}[what]
    choice = wanted or (next(iter(known)) if len(known) == 1 else usual)
    if choice not in known:
        found = f"its {what}s are {', '.join(sorted(known)) or 'unknown'}"
        raise UserError(f"{path}: {found}; name one, {HUB}OWNER/NAME/CONFIG:SPLIT, or a file.")
    return choice
