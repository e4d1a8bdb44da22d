"""Parquet and Arrow files, through pyarrow, and how to convert what is not read at all."""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import NoneType
from typing import Any

from lora.common.errors import UserError
from lora.data.examples import SourceRows
from lora.data.file_kinds import ARROW, COMPRESSED, KINDS

BATCH = 1000  # rows that are read at once
# How a file begins, how its name ends, and the command that converts FILE
COMMANDS: list[tuple[bytes | None, tuple[str, ...], str]] = [
    (b"(\xb5/\xfd", (".zst",), "zstd -d FILE"),
    (None, (".xlsx", ".xls", ".ods"), "libreoffice --convert-to csv FILE"),
    (None, (".html", ".docx", ".epub", ".tex"), "pandoc FILE --to plain --output text.txt"),
    (None, (".tar", ".tar.gz", ".tgz"), "tar -xf FILE"),
    (b"PK\x03\x04", (".zip",), "unzip FILE"),
    (b"SQLite", (".db", ".sqlite"), "sqlite3 -json FILE 'select * from TABLE' > rows.json"),
    (b"%PDF", (".pdf",), "pdftotext FILE text.txt"),
]


def binary_rows(name: str, path: Path, beginning: bytes) -> SourceRows:
    """Yield the rows of a Parquet or an Arrow file. Raises UserError, also for any other."""
    if not beginning.startswith((b"PAR1", b"ARROW1", b"\xff" * 4)):
        raise UserError(f"{name}: {how_to_convert(name, beginning)}")
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        needs = "Parquet and Arrow files need pyarrow: pip install 'plainlora[data]'"
        raise UserError(f"{name}: {needs}.") from None
    number = 0
    try:
        for batch in batches(pa, path, beginning):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}: row {number}", {key: plain(value) for key, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}.") from None


def batches(pa: Any, path: Path, beginning: bytes) -> Iterator[Any]:
    """Yield the record batches of a file, so that few rows are in memory at once."""
    if beginning.startswith(b"PAR1"):
        with pa.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH)
        return
    with pa.memory_map(str(path)) as source:
        if beginning.startswith(b"ARROW1"):
            reader = pa.ipc.open_file(source)
            parts = map(reader.get_batch, range(reader.num_record_batches))
        else:
            parts = iter(pa.ipc.open_stream(source))
        for part in parts:
            for start in range(0, part.num_rows, BATCH):
                yield part.slice(start, BATCH)


def plain(value: Any) -> Any:
    """Return a value as JSON would hold it: of dates, their text.

    The null fields of objects, which a column's other rows have, are left out, and binary ones.
    """
    if isinstance(value, list) and value and isinstance(value[0], tuple):  # a MAP
        value = dict(value)
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not isinstance(item, (NoneType, bytes))}
        return {key: plain(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Decimal):
        return float(value)
    return value if isinstance(value, (str, int, float, bytes, NoneType)) else str(value)


def how_to_convert(name: str, beginning: bytes = b"") -> str:
    """Return the command that makes a readable file of one, or what was expected."""
    for magic, endings, command in COMMANDS:
        if name.lower().endswith(endings) or (magic and beginning.startswith(magic)):
            return f"a file of this kind is not read; convert it: {command.replace('FILE', name)}."
    if name.lower().endswith(ARROW):
        return "its first bytes are not those of a Parquet or Arrow file."
    expected = f"a file named .{', .'.join(KINDS)} (or one of these with {', '.join(COMPRESSED)})"
    return f"expected {expected}, or .parquet."
