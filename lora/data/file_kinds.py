"""What a file of data holds, by its name."""

HUB = "hf://datasets/"
KINDS = {"jsonl": "json", "json": "json", "ndjson": "json", "csv": "table", "tsv": "table"}
KINDS |= {"txt": "text", "text": "text", "md": "text"}
PACKED = (".gz", ".bz2", ".xz")
ARROW = (".parquet", ".arrow")


def kind_of(name: str) -> str:
    """Return "json", "table" or "text" by the ending of a file's name, or ""."""
    name = name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return KINDS.get(name.rpartition(".")[2], "")
