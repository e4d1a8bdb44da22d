"""What a data file holds, by the ending of its name."""

HUB = "hf://datasets/"
KINDS = {"jsonl": "json", "json": "json", "ndjson": "json", "csv": "table", "tsv": "table"}
KINDS |= {"txt": "text", "text": "text", "md": "text"}
SPLIT_NAMES = "train|test|valid|validation|val|dev|eval|h[eo]ld[ _-]?out"  # a regular expression
COMPRESSED = (".gz", ".bz2", ".xz")
ARROW = (".parquet", ".arrow")


def kind_of(name: str) -> str:
    """Return "json", "table" or "text" by the ending of a file's name, or ""."""
    name = name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return KINDS.get(name.rpartition(".")[2], "")
