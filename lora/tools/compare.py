"""Runs side by side: how their configurations differ, how they ended, and which is better.

python -m lora compare outputs/r_*                     a table, the best validation loss first
python -m lora compare outputs/r_* --against outputs/r_16    is each better, worse, or neither?
python -m lora compare outputs/r_* --sweep lora_r=1,4 seed=1,2   the commands of those not run
python -m lora compare outputs/r_* --plot sweep.png    curves, and losses against the swept key
python -m lora compare outputs/r_* --format csv        the table alone, for other programs
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
import csv
from importlib.util import find_spec
import io
import json
from pathlib import Path
import sys

from lora.common.atomic_files import atomic_file
from lora.common.errors import UserError, library_errors
from lora.common.printable_text import printable
from lora.config.flags import Parser
from lora.config.schema import LoraConfig
from lora.tools.finished_run import DATA_KEYS, FinishedRun, format_value
from lora.tools.sweep import missing_commands
from lora.tools.verdict import loss_name, spread_of_seeds, verdict

BLOCKS = "▁▂▃▄▅▆▇█"  # heights of a curve in the terminal
MAX_WIDTH = 40  # of a curve in the terminal


def differing_keys(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the keys that differ among the runs.

    Full fine-tuning has none of LoRA's keys, of which lora_r alone tells the two methods apart.
    """
    keys = {}
    for run in runs:
        keys.update(run.settings)
    differing = []
    for key in keys:
        # A key without a value, as max_samples, is not in the configuration either.
        is_of_lora = key in vars(LoraConfig())
        values = [run.settings.get(key) for run in runs if key in run.settings or not is_of_lora]
        tells_method = key == "lora_r" and len(values) < len(runs)
        if tells_method or any(value != values[0] for value in values):
            differing.append(key)
    return differing


def table(runs: Sequence[FinishedRun]) -> list[dict]:
    """Return a row for each run, {column: value}, with the same columns in the same order."""
    keys = differing_keys(runs)
    same_paths = not set(DATA_KEYS).intersection(keys)
    hashes = {run.data for run in runs if run.data and same_paths}
    results_of_runs = [run.columns() for run in runs]
    names = {}
    for results in results_of_runs:
        names.update(results)
    rows = []
    for run, results in zip(runs, results_of_runs):
        row = {"run": run.name}
        row.update({key: run.settings.get(key) for key in keys})
        if len(hashes) > 1:  # under one path there were several files
            row["data"] = run.data or None
        row.update({name: results.get(name) for name in names})
        rows.append({**row, "ending": run.ending})
    return rows


def as_text(rows: list[dict], form: str | None) -> str:
    """Return the table as csv, json or md (Markdown), or with the endings below it."""
    if form == "json":
        return json.dumps(rows, indent=2)
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return printable(text.getvalue().rstrip("\n"))
    cells = [list(rows[0])]
    cells += [list(map(format_value, row.values())) for row in rows]
    if form == "md":
        cells.insert(1, ["---"] * len(rows[0]))
        lines = []
        for line in cells:
            in_a_cell = [" ".join(cell.replace("|", "/").split()) for cell in line]
            lines.append(f"| {' | '.join(in_a_cell)} |")
        return "\n".join(lines)
    endings = [f"{row['run']}: {row['ending']}" for row in rows if row["ending"]]
    return "\n".join([aligned([line[:-1] for line in cells]), *endings])


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def by_loss(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    groups = defaultdict(list)
    for run in runs:
        groups[loss_name(run)].append(run)
    return groups


def sketch(runs: Sequence[FinishedRun], loss: str) -> str:
    """Return the validation losses of each run as a line of blocks, all on one scale."""
    curves = []
    for run in runs:
        losses = [loss for _, loss in run.curve()]
        if losses:
            curves.append((run.name, losses))
    if not curves:
        return ""
    low = min(min(curve) for _, curve in curves)
    high = max(max(curve) for _, curve in curves)
    span = high - low if high > low else 1
    name_width = max(len(name) for name, _ in curves)
    lines = [f"validation loss ({loss}), from {high:.4g} (high) to {low:.4g}"]
    for name, curve in curves:
        width = min(MAX_WIDTH, len(curve))
        blocks = ""
        for i in range(width):
            height = (curve[i * len(curve) // width] - low) / span
            blocks += BLOCKS[round(height * (len(BLOCKS) - 1))]
        lines.append(f"{name.rjust(name_width)}  {blocks}")
    return "\n".join(lines)


def plot(path: str, runs: Sequence[FinishedRun], key: str | None) -> None:
    """Draw the learning curves and, where a key is swept, the best losses against it."""
    from matplotlib.figure import Figure

    groups, columns = by_loss(runs), 2 if key else 1
    figure = Figure(figsize=(5.5 * columns, 4 * len(groups)), layout="constrained")
    for row, (loss, group) in enumerate(groups.items()):
        curves = figure.add_subplot(len(groups), columns, row * columns + 1)
        for run in group:
            if run.curve():
                curves.plot(*zip(*run.curve()), marker=".", label=run.name)
        curves.set(xlabel="step", ylabel=f"validation loss ({loss})")
        if curves.lines:
            curves.legend(fontsize=7)
        if key:
            evaluated = [run for run in group if run.best_step is not None]
            values = [run.settings[key] for run in evaluated]
            axes = figure.add_subplot(len(groups), columns, row * columns + 2)
            axes.plot(values, [run.best_loss for run in evaluated], marker="o", linestyle="none")
            axes.set(xlabel=key, ylabel=f"best validation loss ({loss})")
            if values and min(values) > 0 and max(values) / min(values) > 8:
                axes.set_xscale("log")
    with atomic_file(Path(path)) as temporary, library_errors(f"--plot {path}"):
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")


def swept_key(runs: Sequence[FinishedRun]) -> str | None:
    """Return the numeric key in which the runs differ, the seed aside, if there is only one."""
    numeric_keys = []
    for key in differing_keys(runs):
        types = {type(run.settings.get(key)) for run in runs}
        if key != "seed" and types <= {int, float}:
            numeric_keys.append(key)
    return numeric_keys[0] if len(numeric_keys) == 1 else None


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("Compare runs: how their configurations differ, and how each of them ended.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, as outputs/RUN")
    against = "test of each run whether its validation loss is better than this run's"
    parser.add_argument("--against", metavar="RUN", help=against)
    sweep = "print the commands of those combinations of values that no run has"
    parser.add_argument(
        "--sweep", nargs="+", action="extend", default=[], metavar="KEY=A,B", help=sweep
    )
    picture = "write a .png of the curves, and of the loss against the key that differs"
    parser.add_argument("--plot", metavar="FILE", help=picture)
    parser.add_argument("--format", choices=("csv", "json", "md"), help="print the table alone")
    arguments = parser.parse_args(argv)
    if arguments.format and (arguments.against or arguments.sweep):
        raise UserError("--format prints the table alone; leave --against and --sweep out.")
    if arguments.plot:
        path = Path(arguments.plot)
        if find_spec("matplotlib") is None:
            raise UserError("--plot needs matplotlib: pip install 'plainlora[plot]'.")
        if path.suffix != ".png" or not path.absolute().parent.is_dir():
            expected = "expected the name of a .png file in a folder that is there"
            raise UserError(f"--plot {path}: {expected}.")
    return arguments


def read_runs(folders: Iterable[str]) -> list[FinishedRun]:
    """Read the runs in some folders; name those that are none, and leave them out."""
    runs, others = [], []
    for folder in dict.fromkeys(folders):
        if (Path(folder) / "logs" / "config.json").is_file():
            runs.append(FinishedRun.of(folder))
        else:
            others.append(folder)
    if others:
        found = f"left out, because they are not folders of runs: {' '.join(others)}"
        print(printable(found), file=sys.stderr)
    if not runs:
        raise UserError("no folder of a run is named: expected folders like outputs/RUN.")
    return runs


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    named = read_runs(arguments.runs)
    runs = sorted(named, key=lambda run: run.best_loss)
    print(as_text(table(runs), arguments.format))
    if not arguments.format:
        for loss, group in by_loss(runs).items():
            print("", sketch(group, loss), sep="\n")
    if arguments.against:
        other = FinishedRun.of(arguments.against)
        compared = [run for run in runs if run.folder.resolve() != other.folder.resolve()]
        same_loss = [run for run in compared if loss_name(run) == loss_name(other)]
        spread = spread_of_seeds([other, *same_loss])
        print("\nvalidation losses (lower is better):")
        for run in compared:
            print(verdict(run, other, spread))
    if arguments.plot:
        plot(arguments.plot, runs, swept_key(runs))
    if arguments.sweep:
        commands = missing_commands(named[0], runs, arguments.sweep)
        if commands:
            title = f"not yet run, with all other keys as in {named[0].folder}:"
            print("", *map(printable, [title, *commands]), sep="\n")
