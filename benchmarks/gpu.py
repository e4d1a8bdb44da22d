"""One command that shows on a GPU whether plainlora is right there, and how fast.

    python benchmarks/gpu.py                             all, at most 8 minutes on one H200
    python benchmarks/gpu.py --only correctness          the ceilings and the parts (a) to (h)
    python benchmarks/gpu.py --device cpu --size tiny    every line of it, on a CPU

Nothing is downloaded: models are random, of the shapes of real ones, and rows are random tokens.
Every part is a process of its own with a deadline, and writes a line of JSON when it ends; the
table comes last. benchmarks/README.md says what each part means. The exit status is 1 where a check
failed, or a part ended in an error or ran out of time.
"""

import argparse
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
import json
import multiprocessing
from pathlib import Path
import statistics
import sys
import tempfile
import time
import traceback
from typing import Any

from common import ROOT

from lora.common.allocator import keep_freed_memory

CORRECTNESS = tuple("abcdefgh")
DEADLINES = {  # of each part, in seconds, with its imports
    "ceilings": 120,  # the first imports read from a cold disk
    **dict.fromkeys(CORRECTNESS, 75),
    "d": 120,  # it compiles
    "lora 0.5b": 60,
    "lora 8b": 90,
    "lora 7b": 90,
}
TOTAL_SECONDS = 480  # of all parts; those that it leaves no time for are not run
CPU_PATIENCE = 10  # times as long on a CPU
H200_FLOPS = 989e12  # a second, in bfloat16, by its data sheet
MISSED = "not measured on a CPU"
RESULT = ROOT / "benchmarks" / "results" / "gpu.md"


def run_part(name: str, device: str, size: str, path: Path) -> None:
    """Run a part in this process, and add its line to the file `path`."""
    keep_freed_memory()  # before torch is imported, as the scripts do
    from gpu_correctness import CORRECTNESS
    from gpu_timing import TIMING, ceilings
    from gpu_work import NotRun, Place

    place = Place(device, size)
    row = {"part": name}
    started = time.monotonic()
    try:
        with redirect_stdout(sys.stderr):  # a run says much
            if name == "ceilings":
                row["ceilings"] = ceilings(place)
            elif name in TIMING:
                row["speed"] = TIMING[name](place)
            else:
                row["title"] = CORRECTNESS[name].__doc__
                row["checks"] = [asdict(check) for check in CORRECTNESS[name](place)]
    except NotRun as reason:
        row["not_run"] = str(reason)
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = round(time.monotonic() - started, 1)
    write(row, path)


def write(row: dict, path: Path) -> None:
    """Print the line of a part, and add it to a file, where it stays if this program is killed."""
    line = json.dumps(row)
    print(line, flush=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def run_parts(names: Sequence[str], device: str, size: str, path: Path) -> list[dict]:
    """Run each part in a process of its own, and return their rows."""
    # Once CUDA is in use, a process cannot be forked; on a CPU that saves the imports.
    context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    patience = 1 if device == "cuda" else CPU_PATIENCE
    end = time.monotonic() + TOTAL_SECONDS * patience
    path.write_text("", encoding="utf-8")
    for name in names:
        time_left = end - time.monotonic()
        if time_left < 10 * patience:
            write({"part": name, "not_run": "no time was left"}, path)
            continue
        deadline = min(DEADLINES[name] * patience, time_left)
        process = context.Process(target=run_part, args=(name, device, size, path))
        process.start()
        process.join(deadline)
        if process.is_alive():
            process.kill()
            process.join()
            write({"part": name, "error": f"no end within {deadline:.0f} s"}, path)
        elif process.exitcode:
            write({"part": name, "error": f"the process ended with {process.exitcode}"}, path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def has_failed(row: dict) -> bool:
    failed_checks = [check for check in row.get("checks", []) if check["passed"] is False]
    return "error" in row or bool(failed_checks)


def correctness_lines(rows: list[dict]) -> list[str]:
    lines = ["| | found | expected | |", "|---|---|---|---|"]
    for row in rows:
        title = row.get("title") or f"({row['part']})"
        outcome = row.get("error") or row.get("not_run")
        if outcome:
            verdict = "**FAIL**" if "error" in row else "not run"
            lines.append(f"| {title} | {outcome.splitlines()[0]} | | {verdict} |")
            continue
        lines.append(f"| {title} ({row['seconds']:.0f} s) | | | |")
        for check in row["checks"]:
            verdict = {True: "pass", False: "**FAIL**", None: ""}[check["passed"]]
            cells = [check["what"], check["found"], check["expected"], verdict]
            lines.append("| &nbsp; " + " | ".join(cells) + " |")
    return lines


def speed_lines(rows: list[dict], ceiling: float | None) -> list[str]:
    """Return the table of speeds, with their share of the data sheet's rate and of `ceiling`.

    The ceiling, a product's rate in FLOP/s, is None where it was not measured on CUDA.
    """
    lines = [
        "| | tokens/s | ms a step | MFU of 989 TFLOP/s | ... of the measured product | "
        "allocated, GB | reserved, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "speed" not in row:
            outcome = row.get("error") or row["not_run"]
            lines.append(f"| {row['part']} | {outcome.splitlines()[0]} | | | | | |")
            continue
        speed = row["speed"]
        seconds = sorted(speed["seconds"])
        median = statistics.median(seconds)
        rate = speed["flops"] / median
        milliseconds = f"{median * 1e3:.0f} ({seconds[0] * 1e3:.0f}-{seconds[-1] * 1e3:.0f})"
        cells = [speed["what"], f"{speed['tokens'] / median:.0f}", milliseconds]
        cells += [share(rate, H200_FLOPS if speed["allocated"] else None), share(rate, ceiling)]
        for size in (speed["allocated"], speed["reserved"]):
            cells.append(f"{size / 1e9:.1f}" if size else MISSED)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def share(rate: float, most: float | None) -> str:
    return f"{rate / most:.1%}" if most else MISSED


def table(rows: list[dict], command: str) -> str:
    """Return the page of the results."""
    facts = rows[0].get("ceilings", {})
    ceiling = facts.get("flops_per_second")
    lines = ["# plainlora on a GPU", "", f"`{command}`", ""]
    names = ("device", "python", "torch", "cuda", "transformers", "varlen_attn")
    lines += [f"- {name}: {facts.get(name)}" for name in names]
    if ceiling:
        lines.append(f"- a product of {facts['product']}: {ceiling / 1e12:.1f} TFLOP/s")
        lines.append(f"- a copy, read and written: {facts['bytes_per_second'] / 1e12:.2f} TB/s")
    correctness = [row for row in rows if row["part"] in CORRECTNESS]
    speeds = [row for row in rows[1:] if row["part"] not in CORRECTNESS]
    if correctness:
        lines += ["", "## Correctness", "", *correctness_lines(correctness)]
    if speeds:
        if facts.get("device_type") != "cuda":
            ceiling = None
        lines += ["", "## Speed", "", *speed_lines(speeds, ceiling)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("correctness",))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="full", choices=("full", "tiny"))
    parser.add_argument("--output", type=Path, help=f"default on CUDA: {RESULT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    names = list(DEADLINES)
    if arguments.only:
        names = ["ceilings", *CORRECTNESS]
    if arguments.device == "cpu":
        keep_freed_memory()
        import gpu_correctness  # noqa: F401  (once, for all processes that are forked)
    else:
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: there is none here; add --device cpu --size tiny")

    output = arguments.output
    if output is None and arguments.device == "cuda":
        output = RESULT
    with tempfile.TemporaryDirectory() as folder:
        path = output.with_suffix(".jsonl") if output else Path(folder) / "gpu.jsonl"
        rows = run_parts(names, arguments.device, arguments.size, path)
    page = table(rows, " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]))
    print(page)
    if output:
        output.write_text(page, encoding="utf-8")
    return int(any(map(has_failed, rows)))


if __name__ == "__main__":
    sys.exit(main())
