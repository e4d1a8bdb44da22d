"""Draw the learning curves of runs: python benchmarks/learning_curve.py LABEL=outputs/RUN ... --output FILE.png"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def series(run, name):
    """(steps, values) of one metric of a run."""
    lines = map(json.loads, (Path(run) / "logs" / "train_metrics.jsonl").read_text().splitlines())
    points = [(line["step"], line[name]) for line in lines if name in line]
    return zip(*points)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=DIR")
    parser.add_argument("--metric", default="val/r2")
    parser.add_argument("--output", default="learning_curve.png")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=120)
    for run in arguments.runs:
        label, _, folder = run.rpartition("=")
        axes.plot(*series(folder, arguments.metric), marker="o", markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel=arguments.metric, ylim=(-0.25, 1.0))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(arguments.output)


if __name__ == "__main__":
    main()
