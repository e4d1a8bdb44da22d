"""Draw the learning curves of runs: python benchmarks/learning_curve.py LABEL=outputs/RUN ...
--output FILE.png
"""

import argparse

from common import metrics
from matplotlib.figure import Figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=DIR")
    parser.add_argument("--output", default="learning_curve.png")
    arguments = parser.parse_args()
    figure = Figure(figsize=(7, 3.6), dpi=120, layout="tight")
    axes = figure.subplots()
    for run in arguments.runs:
        label, _, folder = run.rpartition("=")
        steps, values = zip(*((line["step"], line["val/r2"]) for line in metrics(folder, "val/r2")))
        axes.plot(steps, values, marker="o", markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="val/r2", ylim=(-0.25, 1.0))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output)
