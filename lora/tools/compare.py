"""Runs side by side: what differs in their configurations, how they ended, and whether one is
better than another.

    python -m lora compare outputs/r_*                          a table, the best validation loss first
    python -m lora compare outputs/r_* --against outputs/r_16   ... and for each run: better, worse, or cannot tell
    python -m lora compare outputs/r_* --sweep lora_r=1,4,16 seed=1,2      ... and the commands of those not yet run
    python -m lora compare outputs/r_* --plot sweep.png         learning curves, and the loss against what is swept

Two runs are compared on the validation examples that both were evaluated on, at the best step of
each: a 95 % interval of the difference of their losses, from drawing the examples again. That says
which of two *models* is better. Of two *settings* it does not, as another seed gives another model;
where runs differ in nothing but their seed, their spread is taken into the interval.
"""

from collections import defaultdict
from importlib.util import find_spec
import itertools
import math
from pathlib import Path
import shlex
import statistics

import numpy as np

from lora.common.errors import UserError
from lora.common.serialization import read_file
from lora.config.flags import Parser
from lora.config.tables import fields_by_key, from_dict, set_key
from lora.config.values import kind_of, parse_text
from lora.evaluation.statistics import draws_of, quantiles
from lora.tools.finished_run import FinishedRun, flat, format_value

BLOCKS, WIDTH = "▁▂▃▄▅▆▇█", 40  # of a curve in the terminal
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def differing(runs):
    """The keys in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)
    ]


def table(runs):
    """Rows of cells, the first a heading."""
    keys, values = differing(runs), [run.values for run in runs]
    columns = dict.fromkeys(column for row in values for column in row)
    rows = [["run", *keys, *columns, ""]]
    for run, of in zip(runs, values):
        cells = [*(run.config.get(key) for key in keys), *(of.get(column) for column in columns)]
        rows.append([run.name, *map(format_value, cells), "" if run.results else "not ended"])
    return rows


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def interval(ones, others, counts, draws=2000, seed=0):
    """(difference, [low, high]): of sum(ones) / sum(counts) and sum(others) / sum(counts), arrays
    [examples].
    """
    apart = np.asarray(ones, np.float64) - np.asarray(others, np.float64)
    counts = np.asarray(counts, np.float64)
    found = [
        apart[drawn].sum() / counts[drawn].sum() for drawn in draws_of(len(apart), draws, seed)
    ]
    return apart.sum() / counts.sum(), quantiles(found)


def spread_of_seeds(runs):
    """(standard deviation of the best losses of runs that differ by their seed only, degrees of
    freedom); (0, 0): none.
    """
    groups = defaultdict(list)
    for run in runs:
        if run.best[0]:
            groups[run.setting].append(run.best[1])
    freedom = sum(len(losses) - 1 for losses in groups.values())
    squares = sum(
        (loss - statistics.fmean(losses)) ** 2 for losses in groups.values() for loss in losses
    )
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)


def verdict(run, other, spread):
    """One line: run less other, and what follows of it. spread: `spread_of_seeds`."""
    from lora.evaluation.example_losses import read_example_losses

    ours, theirs = (read_example_losses(one.folder, one.best[0]) for one in (run, other))
    both = [key for key in ours if key in theirs]
    begin = f"{run.name} less {other.name}: "
    if not both:
        return f"{begin}cannot tell: no validation examples that both were evaluated on"
    sums, counts = zip(*(ours[key] for key in both))
    difference, ends = interval(sums, [theirs[key][0] for key in both], counts)
    deviation, freedom = spread
    # Two models, each with a seed of its own; the two sources of chance are added as variances
    if freedom:
        chance = STUDENT[min(freedom, len(STUDENT)) - 1] * deviation * math.sqrt(2)
        ends = [
            difference + math.copysign(math.hypot(end - difference, chance), end - difference)
            for end in ends
        ]
    said = "better" if ends[1] < 0 else "worse" if ends[0] > 0 else "cannot tell"
    text = f"{begin}{difference:+.5f} [{ends[0]:+.5f}, {ends[1]:+.5f}] over {len(both)} examples: {said}"
    if freedom:
        return f"{text} (seeds spread by {deviation:.5f})"
    return f"{text} (as models; of the settings only more seeds can tell)"


def sketch(runs):
    """The validation losses of each run as a line of blocks, all on one scale."""
    curves = {run.name: [value for _, value in run.curve()] for run in runs if run.curve()}
    if not curves:
        return ""
    low, high = (end(value for curve in curves.values() for value in curve) for end in (min, max))
    width, lines = max(map(len, curves)), [f"validation loss, from {high:.4g} (high) to {low:.4g}"]
    for name, curve in curves.items():
        picked = [
            curve[i * len(curve) // min(WIDTH, len(curve))] for i in range(min(WIDTH, len(curve)))
        ]
        blocks = [
            BLOCKS[round((value - low) / (high - low or 1) * (len(BLOCKS) - 1))] for value in picked
        ]
        lines.append(f"{name:>{width}}  {''.join(blocks)}")
    return "\n".join(lines)


def plot(path, runs, key):
    """Write a picture: the learning curves, and the best losses against the swept key, where there
    is one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if key else 6, 4), layout="constrained")
    curves, *rest = figure.subplots(1, 2 if key else 1, squeeze=False)[0]
    for run in runs:
        if run.curve():
            curves.plot(*zip(*run.curve()), marker=".", label=run.name)
    curves.set(xlabel="step", ylabel="validation loss")
    if curves.lines:
        curves.legend(fontsize=7)
    for axes in rest:
        points = sorted(
            (run.config[key], run.best[1])
            for run in runs
            if run.best[0] and run.config.get(key) is not None
        )
        axes.plot(*zip(*points), marker="o", linestyle="none")
        axes.set(xlabel=key, ylabel="best validation loss")
        values = [value for value, _ in points]
        if values and min(values) > 0 and max(values) / min(values) > 8:
            axes.set_xscale("log")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def swept(runs):
    """The one numeric key, the seed aside, in which the runs differ; or None."""

    def is_number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    keys = [
        key
        for key in differing(runs)
        if key != "seed" and all(is_number(run.config.get(key)) for run in runs)
    ]
    return keys[0] if len(keys) == 1 else None


def commands(first, runs, sweep):
    """The commands of the combinations of `sweep` ("key=a,b,c" each) that no run ended with; the
    rest is `first`'s.
    """
    axes = []
    for axis in sweep:
        key, _, values = axis.partition("=")
        if not values:
            raise UserError(f"--sweep {axis}: expected KEY=VALUE,VALUE,...")
        axes.append([(key, value) for value in values.split(",")])
    saved = first.folder / "logs" / "config.toml"
    script = "train_lora.py" if "lora_r" in first.config else "train.py"
    for chosen in itertools.product(*axes):
        config = from_dict(read_file(saved), str(saved))
        keys = fields_by_key(config)
        for key, value in chosen:
            value = parse_text(value, kind_of(keys[key][1].type)[1]) if key in keys else value
            set_key(config, key, value, f"--sweep {key}")
        if any(run.results and run.config == flat(config) for run in runs):
            continue
        name = "_".join(f"{key}_{value}" for key, value in chosen)
        flags = [part for key, value in chosen for part in (f"--{key}", value)]
        flags += ["--experiment_name", name, "--resume_from", "auto"]
        yield shlex.join(["python", script, "--config", str(saved), *flags])


def main(argv):
    parser = Parser("Runs side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--against", metavar="RUN", help="say of each other run whether it is better than this one"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="KEY=A,B",
        help="print the commands of those not yet run",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="a picture of the curves, and of the loss against what is swept",
    )
    arguments = parser.parse_args(argv)
    if arguments.plot and find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'plainlora[plot]'.")
    if arguments.plot and not (
        Path(arguments.plot).suffix == ".png" and Path(arguments.plot).absolute().parent.is_dir()
    ):
        raise UserError(
            f"--plot {arguments.plot}: expected the name of a .png file in a folder that is there."
        )
    others = [
        folder for folder in arguments.runs if not (Path(folder) / "logs" / "config.json").is_file()
    ]
    if others:
        print(f"no runs of ours, left out: {' '.join(others)}")
    named = [
        FinishedRun.of(folder) for folder in dict.fromkeys(arguments.runs) if folder not in others
    ]
    if not named:
        raise UserError("no run of ours is named: expected folders like outputs/RUN.")
    runs = sorted(named, key=lambda run: run.best[1])
    print(aligned(table(runs)), sketch(runs), sep="\n\n")
    if arguments.against:
        other = FinishedRun.of(arguments.against)
        others = [run for run in runs if run.folder.resolve() != other.folder.resolve()]
        spread = spread_of_seeds([other, *others])
        print("\nvalidation losses, of which less is better:")
        for run in others:
            print(verdict(run, other, spread))
    if arguments.plot:
        plot(arguments.plot, runs, swept(runs))
    waiting = list(commands(named[0], runs, arguments.sweep)) if arguments.sweep else []
    if waiting:
        print("\nnot yet run:", *waiting, sep="\n")
