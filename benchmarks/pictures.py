"""Draw the picture of README and docs from recorded runs.

    pip install -e '.[plot]'
    python benchmarks/pictures.py                 draws benchmarks/results/default_runs.json
    python benchmarks/pictures.py --record WORK   trains the runs anew in WORK, then draws them

Each run is recorded with three seeds: its validation curve, the validation r2 of its best
checkpoint, and the r2 of that checkpoint on the test problems. Runs that have ended in WORK are not
repeated.
"""

import argparse
import json
from pathlib import Path
import statistics

from common import ROOT, call, metrics

RECORD = ROOT / "benchmarks" / "results" / "default_runs.json"
SEEDS = (42, 1, 2)
RUNS = {
    "lora": "train_lora.py --lora_r 16",
    "full": "train.py",
    "random_backbone": "train_lora.py --init_from scratch",
}
CURVES = {  # name -> (label, colour); of a lightness that is read on white and on black
    "lora": ("LoRA, rank 16", "#2f81f7"),
    "full": ("full fine-tuning", "#d1761b"),
    "random_backbone": ("LoRA on a random backbone", "#8b7bd8"),
}
INK = "#7a7a7a"  # text and axes: 4.3 times the contrast of GitHub's light page and of its dark one


def median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):z.3f} ({min(values):z.3f}-{max(values):z.3f})"


def record_run(run: Path, command: str, seed: int) -> dict:
    """Train one run, unless it has ended, and return its figures."""
    results, test = run / "logs" / "final_results.json", run.parent / f"{run.name}_test.json"
    if not results.exists():
        folder = ["--output_dir", run.parent, "--experiment_name", run.name]
        call(*command.split(), "--seed", seed, *folder)
    checkpoint = ["--checkpoint", run / "final_artifact"]
    call("eval.py", *checkpoint, "--eval_data", "arithmetic:test:400", "--output", test)
    return {
        "validation": round(json.loads(results.read_text())["best"]["r2"], 6),
        "test": round(json.loads(test.read_text())["r2"], 6),
        "curve": [[line["step"], round(line["val/r2"], 6)] for line in metrics(run, "val/r2")],
    }


def record_runs(work: Path) -> None:
    """Train three runs of each command, and write their figures and summaries."""
    lines = []
    for name, command in RUNS.items():
        seeds = {}
        for seed in SEEDS:
            seeds[str(seed)] = record_run(work / f"{name}_seed{seed}", command, seed)
        entry = {"command": f"python {command}"}
        for split in ("validation", "test"):
            entry[split] = median_and_range([figures[split] for figures in seeds.values()])
        print(f"{name}: {entry}", flush=True)
        lines.append(f"{json.dumps(name)}: {json.dumps(entry | {'seeds': seeds})}")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def draw_learning_curve(record: dict, path: Path) -> None:
    """Draw the median and the range over the seeds, at all heights and enlarged."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text stays text; ids and positions are the same wherever it is drawn.
    style = {"svg.fonttype": "none", "svg.hashsalt": "plainlora", "font.family": "sans-serif"}
    style |= {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none"}
    with rc_context(style):
        figure = Figure(figsize=(7.6, 3.2))
        whole, enlarged = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.07, right=0.97, bottom=0.15, top=0.9, wspace=0.2)
        for name, (label, colour) in CURVES.items():
            curves = [figures["curve"] for figures in record[name]["seeds"].values()]
            steps = [step for step, _ in curves[0]]
            by_step = [[value for _, value in points] for points in zip(*curves)]
            for place, axes in (("whole", whole), ("enlarged", enlarged)):
                low, high = list(map(min, by_step)), list(map(max, by_step))
                axes.fill_between(steps, low, high, color=colour, alpha=0.3, linewidth=0)
                medians = list(map(statistics.median, by_step))
                axes.plot(steps, medians, color=colour, label=label, gid=f"{name}-{place}")
        whole.set(ylim=(-0.25, 1.0), title="validation r2, three seeds")
        enlarged.set(ylim=(0.75, 0.95), title="enlarged: median and range of the seeds")
        enlarged.locator_params(axis="y", nbins=4)
        for axes in (whole, enlarged):
            axes.set(xlim=(0, 800), xlabel="optimizer step")
            axes.grid(color=INK, alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.title.set_size(10)
        whole.legend(frameon=False, loc="center right")
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="WORK")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=ROOT / "assets")
    arguments = parser.parse_args()
    if arguments.record:
        record_runs(arguments.record.resolve())
    recorded = json.loads(RECORD.read_text())
    draw_learning_curve(recorded, arguments.output / "learning_curve.svg")
