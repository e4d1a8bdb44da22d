"""Shapes of rows and kinds of files as people have them, and what becomes of each.

    python benchmarks/data_shapes.py        writes the tables of docs/data.md

A case holds what must be learned of it, or the words that must refuse it, and fails otherwise
(tests/data/test_data_shapes.py). A new shape is one more line of SHAPES, a new file of `files`.
"""

import bz2
from collections.abc import Callable
import contextlib
from dataclasses import dataclass, field
import gzip
import io
import json
import lzma
import math
import os
from pathlib import Path
import re
import sqlite3
import subprocess
import sys
import tempfile
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoTokenizer

from benchmarks.hub_server import hub
from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.readers import read
from lora.data.row_display import row_as_text
from lora.data.tokenise import tokenise

PAGE = ROOT / "docs" / "data.md"
# ChatML with tools and calls, which the template of the embedded base does not know
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ (call.function or call) | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Q, A = "What do bees make?", "Honey."
CHAT = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
CALL = {"name": "rain", "arguments": {"city": "Oslo"}}
CALL_TEXT = '{"name": "rain", "arguments": {"city": "Oslo"}}'
TOOL = {"name": "rain", "parameters": {}}
RAIN = {"role": "user", "content": "Rain in Oslo?"}
SAYS = [{"role": "tool", "content": "no"}, {"role": "assistant", "content": "No."}]


def call(**of_message: Any) -> list[dict]:
    return [RAIN, {"role": "assistant", "content": None, **of_message}, *SAYS]


@dataclass
class Shape:
    """A row as somebody writes it."""

    name: str
    row: dict
    learned: list = field(default_factory=lambda: [A])  # texts, or labels
    columns: dict[str, str] = field(default_factory=dict)
    refused: str = ""  # a part of what is said, if the row is not read
    task: str = "lm"


STEPS = {"steps": ["12+9=21", "21*2=43"]}
SHAPES = [
    Shape("OpenAI, and ours", {"messages": CHAT}),
    Shape("with a system prompt beside it", {"system": "Be short.", "messages": CHAT}),
    Shape(
        "parts of text (OpenAI, Anthropic)",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, CHAT[1]]},
    ),
    Shape(
        "OpenAI: only the last answer",
        {"messages": [RAIN, {"role": "assistant", "content": "No.", "weight": 0}, *CHAT]},
    ),
    Shape("ShareGPT", {"conversations": SHAREGPT}),
    Shape("ShareGPT with roles", {"conversations": CHAT}),
    Shape("LMSYS, WildChat", {"conversation": CHAT}),
    Shape(
        "ShareGPT with system and tools",
        {
            "system": "Be short.",
            "conversations": [
                {"from": "human", "value": "Rain in Oslo?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "no"},
                {"from": "gpt", "value": "No."},
            ],
            "tools": json.dumps([TOOL]),
        },
        [CALL_TEXT, "No."],
    ),
    Shape(
        "tool_calls, arguments as an object",
        {"messages": call(tool_calls=[{"type": "function", "function": CALL}]), "tools": [TOOL]},
        [CALL_TEXT, "No."],
    ),
    Shape(
        "tool_calls, arguments as text",
        {"messages": call(tool_calls=[{"function": {**CALL, "arguments": '{"city": "Oslo"}'}}])},
        [CALL_TEXT, "No."],
    ),
    Shape(
        "function_call (OpenAI, older)",
        {
            "messages": call(function_call={**CALL, "arguments": '{"city": "Oslo"}'}),
            "functions": [TOOL],
        },
        [CALL_TEXT, "No."],
    ),
    Shape(
        "functions or tools as JSON in a text",
        {"messages": call(tool_calls=[{"function": CALL}]), "functions": json.dumps([TOOL])},
        [CALL_TEXT, "No."],
    ),
    Shape("tools, each JSON in a text", {"messages": CHAT, "tools": [json.dumps(TOOL)]}),
    Shape("a row without its weight", {"messages": CHAT, "weight": None}),
    Shape("Alpaca", {"instruction": "Answer.", "input": Q, "output": A}),
    Shape(
        "Alpaca with system and history",
        {
            "instruction": Q,
            "input": "",
            "output": A,
            "system": "Be short.",
            "history": [["Do bees fly?", "Yes."]],
        },
        ["Yes.", A],
    ),
    Shape("Dolly", {"instruction": Q, "context": "Bees make honey.", "response": A}),
    Shape("OpenOrca", {"system_prompt": "Be short.", "question": Q, "response": A}),
    Shape("MetaMath", {"query": Q, "response": A}),
    Shape("GSM8K", {"question": Q, "answer": A}),
    Shape("prompt and completion", {"prompt": Q, "completion": A}),
    Shape("prompt and response", {"prompt": Q, "response": A}),
    Shape("instruction and response", {"instruction": Q, "response": A}),
    Shape("input and output", {"input": Q, "output": A}),
    Shape("problem and solution", {"problem": Q, "solution": A}),
    Shape(
        "TRL, conversational",
        {"prompt": [RAIN, SAYS[1], CHAT[0]], "completion": [CHAT[1]]},
    ),
    Shape(
        "glaive-function-calling",
        {
            "system": "SYSTEM: You may call rain(city).",
            "chat": "USER: Rain in Oslo?\n\n\nASSISTANT: <functioncall> rain <|endoftext|>\n\n\n"
            "FUNCTION RESPONSE: no\n\n\nASSISTANT: No. <|endoftext|>",
        },
        ["<functioncall> rain", "No."],
    ),
    Shape("a text", {"text": "Bees fly."}, ["es fly.<|endoftext|>"]),
    Shape("SQuAD", {"question": Q, "context": "Bees make honey.", "answers": {"text": [A]}},
          columns={"prompt": "question", "completion": "answers.text.0"}),
    Shape("a chat under another name", {"dialog": CHAT}, columns={"messages": "dialog"}),
    Shape("other names", {"ask": Q, "reply": A}, columns={"prompt": "ask", "completion": "reply"}),
    Shape("other names, not told", {"ask": Q, "reply": A},
          refused="add --columns prompt=ask completion=reply"),
    Shape("turns as a list (UltraChat)", {"data": [Q, A]}, refused="python -c 'import json"),
    Shape("preferences (DPO)", {"prompt": Q, "chosen": A, "rejected": "Milk."},
          refused="a preference row (DPO); here a model learns from good answers alone"),
    Shape("preferences, the chosen ones", {"prompt": Q, "chosen": A, "rejected": "Milk."},
          columns={"completion": "chosen"}),
    Shape("KTO", {"prompt": Q, "completion": A, "label": True}, refused="as for KTO"),
    Shape("images",
          {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[1]]},
          refused="has the part {'type': 'image_url'}; only text is read"),
    Shape("ours", {"prompt": "12+9, doubled", **STEPS, "labels": [1, 0]}, [1, 0], task="score"),
    Shape("TRL, stepwise", {"prompt": "12+9, doubled", "completions": STEPS["steps"],
                            "labels": [True, False]}, [1, 0], task="score"),
    Shape("Math-Shepherd",
          {"input": "12+9, doubled? Step 1: 12+9=21 ки\nStep 2: 21*2=43 ки",
           "label": "12+9, doubled? Step 1: 12+9=21 +\nStep 2: 21*2=43 -", "task": "GSM8K"},
          [1, 0], task="score"),
    Shape("BIG-Bench-Mistake", {"input": "12+9, doubled", **STEPS, "mistake_index": 1}, [1, 0],
          task="score"),
    Shape("ProcessBench", {"problem": "12+9, doubled", **STEPS, "label": -1}, [1, 1], task="score"),
    Shape("PRMBench",
          {"modified_question": "12+9, doubled", "modified_process": STEPS["steps"],
           "error_steps": [2]}, [1, 0], task="score"),
    Shape("PRMBench, an error past the end",
          {"modified_question": "12+9, doubled", "modified_process": STEPS["steps"],
           "error_steps": [3]}, refused="1 rows (an error step past the last)", task="score"),
    Shape("MR-Ben",
          {"Question": "12+9, doubled", "Options": "", "Model_Solution_Steps": STEPS["steps"],
           "Model_Solution_First_Error_Step": "2"}, [1, 0], task="score"),
    Shape("MR-Ben, all right",
          {"Question": "12+9, doubled", "Options": "", "Model_Solution_Steps": STEPS["steps"],
           "Model_Solution_First_Error_Step": "N/A"}, [1, 1], task="score"),
    Shape("a pair of texts (STS-B)", {"sentence1": "Bees fly.", "sentence2": "Bees can fly.",
                                      "score": 0.9}, [0.9], task="score"),
    Shape("steps under other names", {"q": "12+9, doubled", "cot": STEPS["steps"], "ok": [1, 0]},
          [1, 0], columns={"prompt": "q", "steps": "cot", "labels": "ok"}, task="score"),
    Shape("steps under other names, not told",
          {"q": "12+9, doubled", "cot": STEPS["steps"], "ok": [1, 0]},
          refused="add --columns prompt=q steps=cot labels=ok", task="score"),
]  # fmt: skip


def becomes(shape: Shape, tokenizer: Any) -> tuple[str, list]:
    """Return what becomes of a row, in words, and its targets (texts or labels)."""
    data = DataConfig(columns=shape.columns, max_length=512)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(shape.row) + "\n")
        try:
            with contextlib.redirect_stdout(said):
                (example,) = read([str(path)], shape.task, data)
        except UserError as error:
            line = said.getvalue() + str(error)
            reason = re.sub(rf"(note: )?{re.escape(str(path))}(:1)?: ", "", line.splitlines()[0])
            return f"refused: {reason.replace(folder, '')}", []
    (result,) = tokenise([example], tokenizer, shape.task, data, causal=True)
    (row,) = result.rows
    text = row_as_text(row, tokenizer, colour=False)
    if shape.task == "score":
        return " ".join(text.split()), [t for t in row.targets if not math.isnan(t)]
    targets = [part.removesuffix("<|im_end|>") for part in re.findall("⟦(.*?)⟧", text, re.DOTALL)]
    text = re.sub(r"<\|im_start\|>(\w+)\n", r"\1: ", text)
    return " ".join(text.replace("<|im_end|>", "").split()), targets


# ------------------------------------------------------------------------------------------- files

ROWS = [{"question": Q, "answer": A}, {"question": "Do bees fly?", "answer": "Yes."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXT = "Bees make honey.\n"


@dataclass
class File:
    """A file or a folder, and how it is written."""

    name: str  # in the table
    path: str
    write: Callable[[Path], object]  # at the path, in an empty folder
    refused: str = ""


def text_file(content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def table(rows: list[dict] = ROWS) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def parquet(path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(), path)


def saved_data_set(folder: Path) -> None:
    """Write what `datasets.Dataset.save_to_disk` writes."""
    import pyarrow

    folder.mkdir(parents=True)
    arrow = folder / "data-00000-of-00001.arrow"
    with pyarrow.ipc.new_stream(str(arrow), table().schema) as stream:
        stream.write_table(table())
    (folder / "cache-4f3a.arrow").write_bytes(arrow.read_bytes())  # as `Dataset.map` leaves
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": arrow.name}]}))


def saved_splits(folder: Path) -> None:
    saved_data_set(folder / "train")
    saved_data_set(folder / "test")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


def parts(*names: str) -> Callable[[Path], object]:
    """Return a writer of a folder with a row in each of these files."""

    def write(path: Path) -> None:
        folder = path if path.suffix == "" else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        for name, line in zip(names, LINES.splitlines()):
            (folder / name).write_text(line + "\n")
        (folder / "README.md").write_text("Notes.")

    return write


def database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("create table chats (question, answer)")
        connection.commit()


CSV = f"question,answer\n{Q},{A}\nDo bees fly?,Yes.\n"
TSV = CSV.replace(",", "\t")
LIST = json.dumps(ROWS)
OBJECTS = "\n".join(json.dumps(row, indent=2) for row in ROWS)
NAMED = json.dumps({"logic": ROWS[:1], "law": ROWS[1:]})
FILES = [
    File("JSON Lines", "a.jsonl", text_file(LINES)),
    File("JSON Lines", "a.ndjson", text_file(LINES)),
    File("gzip", "a.jsonl.gz", text_file(gzip.compress(LINES.encode()))),
    File("bzip2", "a.jsonl.bz2", text_file(bz2.compress(LINES.encode()))),
    File("xz", "a.csv.xz", text_file(lzma.compress(CSV.encode()))),
    File("a JSON list", "a.json", text_file(LIST)),
    File("printed prettily", "a.json", text_file(json.dumps(ROWS, indent=2))),
    File("objects printed prettily", "a.jsonl", text_file(OBJECTS)),
    File('`{"data": [...]}`', "a.json", text_file(f'{{"version": 1, "data": {LIST}}}')),
    File('`{"logic": [...], "law": [...]}`', "a.json", text_file(NAMED)),
    File("CSV", "a.csv", text_file(CSV)),
    File("TSV", "a.tsv", text_file(TSV)),
    File("JSON Lines named .json", "a.json", text_file(LINES)),
    File("a JSON list named .jsonl", "a.jsonl", text_file(LIST)),
    File("JSON Lines named .txt", "a.txt", text_file(LINES)),
    File("JSON Lines without an ending", "chats", text_file(LINES)),
    File("gzip without its ending", "a.jsonl", text_file(gzip.compress(LINES.encode()))),
    File("tabs in a .csv", "a.csv", text_file(TSV)),
    File("a folder", "chats", parts("1.jsonl", "2.jsonl")),
    File("a glob", "chats/*.jsonl", parts("1.jsonl", "2.jsonl")),
    File("Parquet", "a.parquet", parquet),
    File("a folder of `save_to_disk`", "saved", saved_data_set),
    File("one split of several", "saved/train", lambda path: saved_splits(path.parent)),
    File("all splits", "saved", saved_splits, "name the folder of one: test, train"),
    File("train and test together", "chats", parts("train.jsonl", "test.jsonl"), "(test, train)"),
    File("several kinds in a folder", "chats", parts("1.jsonl", "2.txt"), "(json, text)"),
    File("zstd", "a.jsonl.zst", text_file(b"(\xb5/\xfd\0"), "zstd -d"),
    File("zip", "a.zip", text_file(b"PK\3\4\0"), "unzip"),
    File("a database", "a.db", database, "sqlite3 -json"),
    File("PDF", "a.pdf", text_file(b"%PDF-1.7"), "pdftotext"),
    File("a page", "a.html", text_file("<p>Bees"), "pandoc"),
]  # fmt: skip


def rows_of(file: File) -> str:
    """Return what becomes of a file, in words. Its rows must be ROWS."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.path
        path.parent.mkdir(exist_ok=True)
        file.write(path)
        try:
            with contextlib.redirect_stdout(said):
                examples = read([str(path)], "lm")
        except UserError as error:
            return f"refused: {str(error).replace(folder + '/', '')}"
    found = [[message["content"] for message in example.messages] for example in examples]
    assert found == [list(row.values()) for row in ROWS], (file.name, found)
    return f"{len(examples)} rows"


# ----------------------------------------------------------------------------------------- the Hub

OWN = "hf://datasets/someone"
READ_PATHS = """
import json, sys
from lora.common.errors import UserError
from lora.data.files import local_files
from lora.data.readers import read
for path in json.loads(sys.argv[1]):
    try:
        texts = [example.text for example in read([path], "lm")]
        in_cache = next(iter(local_files(path).values())).parts
        commit = in_cache[in_cache.index("snapshots") + 1]
        print(json.dumps([", ".join(texts), commit]))
    except UserError as error:
        print(json.dumps([str(error), ""]))
"""
# path -> (the texts that are read, the revision), or (what is said, "")
HUB_PATHS = {
    f"{OWN}/parquet": ("one, two", "a"),
    f"{OWN}/parquet:test": ("three", "a"),
    f"{OWN}/parquet/data/test-00000-of-00001.parquet": ("three", "a"),
    f"{OWN}/parquet/data/train-*.parquet": ("one, two", "a"),
    f"{OWN}/card": ("english", "a"),
    f"{OWN}/card/french:dev": ("french", "a"),
    f"{OWN}/all": ("not its card", "a"),
    f"{OWN}/mixed": ("of train.jsonl", "b"),
    f"{OWN}/script": ("converted", "b"),
    f"{OWN}/parquet:dev": ("its splits are test, train", ""),
    f"{OWN}/mixed@main": ("neither a card nor Parquet files give the splits of main", ""),
    f"{OWN}/card/dutch": ("its configs are default, english, french", ""),
    f"{OWN}/absent": ("Repository Not Found", ""),
}


def parquet_bytes(*texts: str) -> bytes:
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table([{"text": text} for text in texts]), buffer)
    return buffer.getvalue()


def repositories() -> dict[str, Any]:
    """Return the data sets of the stand-in: {name: {revision: {file: content}}}."""
    card = (
        "---\nconfigs:\n- config_name: english\n  default: true\n  data_files: en/*.jsonl\n"
        "- config_name: french\n  data_files:\n  - split: dev\n    path: fr.csv\n---\n# A card\n"
    )
    return {
        "someone/parquet": {
            "main": {
                "data/test-00000-of-00001.parquet": parquet_bytes("three"),
                "data/train-00000-of-00002.parquet": parquet_bytes("one"),
                "data/train-00001-of-00002.parquet": parquet_bytes("two"),
            }
        },
        "someone/card": {
            "main": {
                "README.md": card.encode(),
                "en/1.jsonl": b'{"text": "english"}\n',
                "fr.csv": b"text\nfrench\n",
            }
        },
        "someone/all": {
            "main": {
                "README.md": b"---\nconfigs:\n- config_name: c\n  data_files: '*'\n---\n# A card\n",
                "1.jsonl": b'{"text": "not its card"}\n',
                "test/1.jsonl": b'{"text": "in a folder"}\n',
                "chart.pdf": b"%PDF",
            }
        },
        "someone/mixed": {
            "main": {
                "train.jsonl": b'{"text": "of train.jsonl"}\n',
                "extras/embeddings.parquet": parquet_bytes("of extras"),
            },
            "refs/convert/parquet": {"default/train/0000.parquet": parquet_bytes("of train.jsonl")},
        },
        "someone/script": {
            "main": {"data.zip": b"PK"},
            "refs/convert/parquet": {"default/train/0000.parquet": parquet_bytes("converted")},
        },
    }


def answers_of_hub() -> dict[str, tuple[str, str]]:
    """Return {path: (texts or an error, commit)}, read from the stand-in by another process."""
    with hub(repositories()) as (address, _), tempfile.TemporaryDirectory() as cache:
        printed = read_by_hub(list(HUB_PATHS), address, cache)
    pairs = [json.loads(line) for line in printed if line.startswith("[")]
    return {path: (said, commit) for path, (said, commit) in zip(HUB_PATHS, pairs, strict=True)}


def read_by_hub(paths: list[str], address: str, cache: str) -> list[str]:
    """Return what a process prints that reads paths by a cache, without an address offline."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_CACHE": cache}
    environment["HF_HUB_OFFLINE"] = "0" if address else "1"
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", READ_PATHS, json.dumps(paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


# ---------------------------------------------------------------------------------------- the page


def code(text: str) -> str:
    """Return a cell of a table, which keeps every character of the text."""
    return "`" + text.replace("|", "\\|").replace("\n", "⏎") + "`"


def load_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def shape_lines(task: str) -> list[str]:
    tokenizer = load_tokenizer()
    lines = ["| who writes so | a row | what is read |", "|---|---|---|"]
    for shape in SHAPES:
        if shape.task == task:
            row = code(json.dumps(shape.row, ensure_ascii=False))
            if shape.columns:
                pairs = [f"{ours}={theirs}" for ours, theirs in shape.columns.items()]
                row += f", with `--columns {' '.join(pairs)}`"
            lines.append(f"| {shape.name} | {row} | {code(becomes(shape, tokenizer)[0])} |")
    return lines


def file_lines() -> list[str]:
    lines = ["| a file | named | what becomes of it |", "|---|---|---|"]
    for file in FILES:
        found = rows_of(file)
        lines.append(f"| {file.name} | `{file.path}` | {code(found) if file.refused else found} |")
    return lines


def hub_lines() -> list[str]:
    lines = ["| a path | what is read |", "|---|---|"]
    for path, (expected, commit) in HUB_PATHS.items():
        found = "the texts " + expected if commit else "refused: " + expected
        lines.append(f"| `{path}` | {found} |")
    return lines


def tables() -> dict[str, list[str]]:
    """Return the lines of each table of the page, by the name in its marker."""
    lines = {task: shape_lines(task) for task in ("lm", "score")}
    return {**lines, "files": file_lines(), "hub": hub_lines()}


def page(text: str) -> str:
    """Return the text of docs/data.md with its tables written anew."""
    for name, lines in tables().items():
        begin, end = f"<!-- {name}: benchmarks/data_shapes.py -->", f"<!-- end of {name} -->"
        before, after = text.split(begin)[0], text.split(end)[1]
        written = "\n".join(lines)
        text = f"{before}{begin}\n\n{written}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
