"""Cases that a page shows: how they are run, and how the page is written.

Every case is something a user does, on a few rows and the embedded base, in this process. It fails
where the words that must be said are not there.
"""

import argparse
from collections.abc import Callable
import contextlib
from dataclasses import dataclass
import io
import json
import os
from pathlib import Path
import re
import runpy
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "assets" / "tiny_base"
LONGEST = 170  # characters of a line in the table
CHATS = ("--base_model", "embedded", "--task", "lm", "--max_length", 64, "--train_data")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Case:
    """Something that a user does, and a regular expression that the answer must have."""

    what: str  # in a user's words
    tried: str  # how, in short
    expected: str
    answer: Callable[[], str]


def program(path: str, *arguments: object) -> str:
    """Run a script, or the module "lora", as the command line does; return what it prints."""
    output = io.StringIO()
    status = ""
    before = sys.argv
    sys.argv = [path, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if path == "lora":
                runpy.run_module(path, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / path), run_name="__main__")
    except SystemExit as end:
        if end.code:
            status = f" (exit status {end.code})"
    finally:
        sys.argv = before
    return output.getvalue().rstrip() + status


def write(name: str, *rows: object) -> str:
    """Write rows of JSON, or lines of text, to a file in the working folder."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return name


def render(
    *rows: object, name: str = "rows.jsonl", base: object = "embedded", task: str = "lm"
) -> str:
    """What `plainlora render` prints of rows."""
    path = write(name, *rows)
    length = ("--max_length", 256)
    return program("lora", "render", path, "--base_model", base, "--task", task, *length)


def train(*flags: object, script: str = "train_lora.py", name: str = "run") -> str:
    """What a run prints; of one step, where the flags do not say otherwise."""
    shutil.rmtree(f"outputs/{name}", ignore_errors=True)
    settings = ["--batch_size", 4, "--gradient_accumulation_steps", 1, "--output_dir", "outputs"]
    steps = (
        [] if {"--max_steps", "--num_train_epochs", "default"} & set(flags) else ["--max_steps", 1]
    )
    flags = tuple(flag for flag in flags if flag != "default")
    return program(script, *settings, *steps, "--experiment_name", name, *flags)


def chat(*answers: dict, **more: object) -> dict:
    """A row of a chat whose answers are messages of the assistant."""
    messages = []
    for number, answer in enumerate(answers):
        messages.append({"role": "user", "content": f"q{number}"})
        messages.append({"role": "assistant", **answer})
    return {"messages": messages, **more}


def chats(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": str(number)},
            ]
        }
        for number in range(count)
    ]


def base_with(template: str, *special: str) -> Path:
    """The embedded base with another chat template."""
    folder = Path("base_with_template")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(BASE, folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(special)}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def said_line(output: str, expected: str) -> str | None:
    """Return the line of an output that has the expected words, in short; None if none has."""
    for line in output.splitlines():
        match = re.search(expected, line)
        if match:
            start = 0 if match.end() <= LONGEST else match.start()
            line = line[start:].strip()
            return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
    return None


def cell(text: str) -> str:
    text = text.replace("|", "\\|").replace("\r", "\\r").replace("\n", "\\n").replace("`", "'")
    return f"`{text}`"


def rows_of(cases_tried: list[Case]) -> tuple[list[str], list[str]]:
    """Return the rows of the table, and what is wrong with each case that says something else."""
    rows, silent = [], []
    for case in cases_tried:
        output = case.answer()
        line = said_line(output, case.expected)
        if line is None:
            silent.append(f"{case.what} ({case.tried}): {case.expected!r} not in\n{output}")
            continue
        line = line.replace(f"{Path.cwd()}/", "").replace(f"{ROOT}/", "")
        line = re.sub(r"[\w./-]*plainlora_cache/[0-9a-f]+/[0-9a-f]+", "CACHE/ENTRY", line)
        rows.append(f"| {case.what} | {cell(case.tried)} | {cell(line)} |")
    return rows, silent


def write_page(make_cases: Callable[[], list[Case]], page: Path, head: str) -> int:
    """Try cases in an empty folder, and write the page; return the exit status."""
    parser = argparse.ArgumentParser(description=head.partition("\n")[0].strip("# "))
    parser.add_argument("--output", type=Path, default=page)
    output = parser.parse_args().output.absolute()
    before = Path.cwd(), os.environ.get("PLAINLORA_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PLAINLORA_CACHE"] = f"{folder}/plainlora_cache"
        os.chdir(folder)
        try:
            rows, silent = rows_of(make_cases())
        finally:
            os.chdir(before[0])
            os.environ.pop("PLAINLORA_CACHE")
            if before[1] is not None:
                os.environ["PLAINLORA_CACHE"] = before[1]
    for problem in silent:
        print(f"SILENT: {problem}")
    print(f"{len(rows)} cases say what they must, {len(silent)} do not")
    if not silent:
        output.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    return 1 if silent else 0
