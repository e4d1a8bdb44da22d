"""Random bad inputs: each is answered in one line and in time, and trains only what was meant.

    python benchmarks/fuzz.py [--cases 500] [--seed N]      new inputs; the seed is printed
    python benchmarks/fuzz.py --seed N --only K             one of them again, with its whole output

A case is something that works with one mutation: of a flag, a configuration, a data file, the
folder of a run, a base or an artifact. It runs as a program, forked from a server that has loaded
torch, on the embedded base with two steps of four examples. It fails where the answer is a
traceback, more than one line, an undocumented exit status, or none within --limit seconds. Silent
mistakes are found by comparing what was trained with what was meant: see `Meant`.
"""

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
import json
import os
from pathlib import Path
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import tomllib
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DEVICE_PREFERENCE": "cpu"}

from common import ROOT
from fuzz_cases import (
    ACTIONS,
    DATA_KINDS,
    KINDS,
    Case,
    Meant,
    action,
    copy_run,
    flat,
    prepare_rows,
    train,
)
from tqdm import tqdm

from tests.processes import context, run_here

os.environ["PYTHONPATH"] = str(ROOT)  # of the server: what it forks imports this copy
MEMORY = 24 * 2**30  # bytes of addresses of a program
DOCUMENTED = (0, 2, 3, 4)  # exit statuses; docs/troubleshooting.md
# What a program says of an input that it does not use as it is.
NOTE = re.compile(r"left out|not read|warning|note:|leaves? out|skipped|cut off|no effect", re.I)
HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Answer:
    status: int | None  # None: none in time
    output: str


@dataclass
class Training:
    """What a run trained, without what a clock decides."""

    config: dict[str, Any]
    numbers: list[Any]


# -------------------------------------------------------------------------------- how they are run


def limited(command: list[str], folder: Path, output: Path, cache: str) -> None:
    """Run a program in this process, which may not take the memory of the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["PLAINLORA_CACHE"] = cache
    sys.path.insert(0, str(ROOT))
    if command[0] != "-m":
        command = [str(ROOT / command[0]), *command[1:]]
    run_here([command], folder, output)


class Bench:
    """A folder with what works, and the folders of the cases."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.originals: dict[str, Training] = {}
        for kind in DATA_KINDS:
            prepare_rows(folder / kind, kind)
            answer = self.answer(train(kind), folder / kind)
            training = training_in(folder / kind, answer.output)
            assert answer.status == 0 and training, answer.output
            self.originals[kind] = training

    def answer(self, command: list[str], folder: Path) -> Answer:
        output = folder.with_name(f"{folder.name}.txt")
        arguments = (command, folder, output, str(self.folder / "cache"))
        for _ in range(2):
            process = context.Process(target=limited, args=arguments, daemon=True)
            process.start()
            process.join(self.limit)
            status = process.exitcode
            if status is None:
                process.kill()
                process.join()
            # 255 is multiprocessing's: the server that forks ended, and the status is not known.
            if status != 255:
                break
        return Answer(status, output.read_text(encoding="utf-8", errors="backslashreplace"))

    def check_actions(self) -> None:
        """Raise AssertionError where what is mutated later does not work as it is."""
        for name in ACTIONS:
            folder = self.folder / f"works_{name}"
            copy_run(self.folder / "chats", folder, name)
            answer = self.answer(action(name, "chats"), folder)
            assert answer.status == 0, f"{name}: {answer.output}"


def training_in(folder: Path, output: str) -> Training | None:
    """What the newest run in a folder trained; None where no run has ended there."""
    files = sorted(folder.rglob("training_config.toml"), key=lambda path: path.stat().st_mtime)
    if not files:
        return None
    tables = tomllib.loads(files[-1].read_text(encoding="utf-8"))
    config = flat(tables)
    for name in ("train_data", "eval_data"):  # some are absolute
        config[name] = [Path(path).name for path in config[name]]
    numbers = re.findall(r"^(?:train|eval): \d+ examples.*", output, re.M)
    log = files[-1].parent.parent / "logs" / "train_metrics.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        numbers += [metrics.get(name) for name in ("step", "train/loss", "val/loss")]
    return Training(config, numbers)


# -------------------------------------------------------------------------------- what is judged


def problem(case: Case, answer: Answer, original: Training, folder: Path) -> str:
    """What is wrong with an answer, or ""."""
    output, status = answer.output, answer.status
    lines = output.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status is None:
        return "no answer in time"
    if "Traceback (most recent call last)" in output:
        return "a traceback"
    if status not in DOCUMENTED:
        return f"exit status {status}"
    if status and (len(errors) != 1 or lines[-1] != errors[0]):
        return "the error is not one line, the last"
    if status == 0 and errors:
        return "an error with exit status 0"
    if HIDDEN.search(output):
        return f"a control character: {HIDDEN.search(output)[0]!r}"
    left = [path.name for path in folder.rglob(".tmp*")]
    if left:
        return f"left behind: {left}"
    if status == 0 and case.meant is Meant.REFUSED:
        return "SILENT: accepted"
    if status and case.meant is Meant.SAME:
        return "refused, although nothing is wrong"
    if status or case.meant in (Meant.REFUSED, Meant.ANY):
        return ""
    return difference(case, original, training_in(folder, output), output)


def difference(case: Case, original: Training, now: Training | None, output: str) -> str:
    """What was trained otherwise than meant, or ""."""
    if now is None:
        return "SILENT: exit status 0 without a run"
    config = original.config | case.values
    for name in config.keys() | now.config.keys():
        expected, found = config.get(name), now.config.get(name)
        if not same_value(expected, found):
            return f"SILENT: {name} is {found!r}; meant is {expected!r}"
    if case.meant is Meant.SAME and now.numbers != original.numbers:
        return "SILENT: trained something else"
    is_felt = case.meant is Meant.FELT and now.config != original.config
    told = NOTE.search(output)
    if (case.meant is Meant.TOLD or is_felt) and now.numbers == original.numbers and not told:
        return "SILENT: changed nothing, without a word"
    return ""


def same_value(meant: Any, found: Any) -> bool:
    """Whether a value that was given, perhaps as text, is the one in the configuration."""
    if meant == "auto" or meant == found or str(meant) == str(found):
        return True
    if isinstance(found, str) and os.path.isabs(found):  # an artifact has absolute paths
        return os.path.basename(found) == os.path.basename(str(meant))
    if isinstance(found, list):
        items = meant if isinstance(meant, list) else [meant]
        items = [item for item in items if item not in ("", "none")]
        return len(items) == len(found) and all(map(same_value, items, found))
    if isinstance(found, bool):
        return str(meant).lower() in (("true", "1", "yes") if found else ("false", "0", "no"))
    if isinstance(found, (int, float)):
        try:
            return float(meant) == found and not isinstance(meant, bool)
        except (TypeError, ValueError):
            return False
    return False


def try_case(bench: Bench, seed: int, number: int) -> tuple[str, Case, Answer, str]:
    """Return the kind of a case, the case, its answer and what is wrong with it."""
    draw = random.Random(f"{seed}:{number}")
    kind = KINDS[number % len(KINDS)]
    data_kind = draw.choice(list(DATA_KINDS))
    folder = bench.folder / "cases" / f"{number}" / "work"
    case = kind(draw, bench.folder, folder, data_kind)
    answer = bench.answer(case.command, folder)
    wrong = problem(case, answer, bench.originals[data_kind], folder)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return kind.__name__, case, answer, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int, nargs="+", metavar="K", help="these cases alone")
    parser.add_argument("--limit", type=float, default=60, help="seconds for an answer")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    # What every program would load once more.
    context.set_forkserver_preload(
        ["bitsandbytes", "transformers.models.qwen3.modeling_qwen3", "train_lora", "eval", "merge"]
    )
    numbers = arguments.only or range(arguments.cases)
    tally: dict[str, Counter] = {kind.__name__: Counter() for kind in KINDS}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="plainlora_fuzz_") as folder:
        bench = Bench(Path(folder), arguments.limit)
        bench.check_actions()
        with ThreadPoolExecutor(arguments.workers) as pool:
            answers = pool.map(lambda number: try_case(bench, arguments.seed, number), numbers)
            for number, found in zip(numbers, tqdm(answers, total=len(numbers), disable=None)):
                kind, case, answer, wrong = found
                tally[kind]["wrong" if wrong else str(answer.status)] += 1
                failed += bool(wrong)
                if wrong or len(numbers) == 1:
                    tqdm.write(described(number, arguments.seed, found, len(numbers) == 1))
                    sys.stdout.flush()
    print(table(tally))
    return 1 if failed else 0


def described(number: int, seed: int, found: tuple, in_full: bool) -> str:
    kind, case, answer, wrong = found
    output = answer.output.strip()
    if in_full:
        return f"{kind}: {case.mutation}\n{case.command}\n{output}\n{answer.status} {wrong}"
    last = output.splitlines()[-1][:200] if output else ""
    again = f"python benchmarks/fuzz.py --seed {seed} --only {number}"
    return f"{kind}: {case.mutation}: {wrong} (exit {answer.status})\n    {last}\n    {again}"


def table(tally: dict[str, Counter]) -> str:
    columns = [*map(str, DOCUMENTED), "wrong"]
    lines = [f"{'kind':12}" + "".join(f"{name:>8}" for name in columns)]
    for kind, counts in tally.items():
        lines.append(f"{kind:12}" + "".join(f"{counts[name]:8}" for name in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
