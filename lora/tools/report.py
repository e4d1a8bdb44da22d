"""A run as one page that needs no network: RUN/report.html.

    python -m lora report outputs/RUN

Where there is a final artifact, the page also shows what the model outputs for a few held-out
examples: scored steps and how reliable the scores are, or generated answers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from lora.common.printable_text import printable
from lora.common.toml_json import read_file
from lora.config.flags import Parser
from lora.evaluation.html_templates import render_template
from lora.tools.charts import chart
from lora.tools.finished_run import FinishedRun, format_value

TRAINED_FACTS = ("method", "trainable_parameters", "parameters", "base_unchanged")


def page(run: FinishedRun) -> str:
    artifact = run.folder / "final_artifact"
    metadata, samples = {}, None
    if artifact.is_dir():
        from lora.tools.report_samples import held_out_samples  # imports torch

        metadata = read_file(artifact / "metadata.json")
        samples = held_out_samples(artifact)
    environment = {**metadata.get("versions", {}), **metadata.get("hardware", {})}
    environment["commit"] = metadata.get("git_commit")
    config = read_file(run.folder / "logs" / "config.json")
    values = {
        "title": run.name,
        "headline": headline(run),
        "has_ended": bool(run.results),
        "result": result_rows(run),
        "charts": metric_charts(run),
        "checkpoints": checkpoint_table(run.folder / "checkpoints"),
        "samples": samples,
        "startup_log": startup_log(run.folder / "logs"),
        "trained": value_rows({name: metadata.get(name) for name in TRAINED_FACTS}),
        "environment": value_rows(environment),
        "configuration": {name: value_rows(table) for name, table in config.items()},
    }
    return render_template("report.html", values)


def headline(run: FinishedRun) -> str:
    """Return what was trained on which base for which task, and how well it did."""
    config = run.config
    base = config["base_model"]
    if base == "embedded":
        base = "the embedded base"
    elif Path(base).is_absolute():
        base = Path(base).name
    task = "score the steps of solutions" if config["task"] == "score" else "predict the next token"
    text = f"{describe_method(config)} on {base}, to {task}."
    step, columns = run.best_step, run.columns()
    if step is None:
        return text
    quality = "r2" if config["task"] == "score" else "token_accuracy"
    result = f"loss {format_value(run.best_loss)}, "
    result += f"{quality.replace('_', ' ')} {format_value(columns.get(quality))}"
    size = held_out_size(run.folder, step, config["task"])
    return f"{text} Best at step {step}: {result}, on {size}."


def describe_method(config: Mapping) -> str:
    if "lora_r" not in config:
        return "Full fine-tuning"
    if config["lora_r"] == 0:
        return "A score head"
    name = "QLoRA" if config["load_in_4bit"] else "LoRA"
    return f"{name} of rank {config['lora_r']}"


def held_out_size(folder: Path, step: int, task: str) -> str:
    """Return how many sequences and targets were evaluated at a step."""
    import numpy as np

    from lora.evaluation.example_losses import SUBFOLDER  # imports torch

    path = folder / SUBFOLDER / f"step_{step}.npz"
    if not path.is_file():
        return "the held-out data"
    with np.load(path) as saved:
        targets = saved["targets"]
    what = "labelled steps" if task == "score" else "tokens"
    return f"{len(targets):,} held-out sequences with {targets.sum():,} {what}"


def value_rows(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the names and the values as texts, without those that are empty."""
    rows = []
    for name, value in values.items():
        if value not in ("", None, [], {}):
            rows.append((name, format_value(value)))
    return rows


def result_rows(run: FinishedRun) -> list[tuple[str, str]]:
    values = {f"best {name}": value for name, value in run.results.get("best", {}).items()}
    columns = run.columns()
    values["tokens/s"] = columns["tokens/s"]
    values["seconds"] = columns["seconds"]
    values["peak memory, GB"] = columns["GB"]
    return value_rows(values)


def metric_charts(run: FinishedRun) -> list[Markup]:
    losses = {"training": run.curve("train/loss"), "validation": run.curve("val/loss")}
    charts = [
        chart("loss", "step", losses),
        chart("validation r2", "step", {"": run.curve("val/r2")}),
        chart("validation token accuracy", "step", {"": run.curve("val/token_accuracy")}),
        chart("gradient norm", "step", {"": run.curve("train/grad_norm")}),
        chart("learning rate", "step", {"": run.curve("train/learning_rate")}),
    ]
    return [drawing for drawing in charts if drawing]


def startup_log(folder: Path) -> str:
    """Return the log up to the first step: data, trained parameters, warnings."""
    lines = []
    for log in sorted(folder.glob("train_*.log"))[:1]:
        for line in log.read_text(encoding="utf-8").splitlines():
            if line.startswith("step "):
                break
            lines.append(printable(line))
    return "\n".join(lines)


def checkpoint_table(folder: Path) -> list[list[str]]:
    """Return a row for each validation metric, and a column for each checkpoint, the best first."""
    from lora.training.best_checkpoints import best_first, saved_states  # imports torch

    states = saved_states(folder)
    if not states:
        return []
    states = best_first(states) + [state for state in states if not state["val"]]
    names = {}
    for state in states:
        names.update(state["val"] or {})
    rows = [[name, *metric_values(name, states)] for name in names]
    return [["", *(f"step {state['step']}" for state in states)], *rows]


def metric_values(name: str, states: list[dict]) -> list[str]:
    return [format_value((state["val"] or {}).get(name)) for state in states]


def main(argv: Sequence[str]) -> None:
    parser = Parser("Write a run as one page that needs no network, RUN/report.html.")
    parser.add_argument("run", metavar="RUN", help="the run's folder, as outputs/RUN")
    run = FinishedRun.of(parser.parse_args(argv).run)
    path = run.folder / "report.html"
    path.write_text(page(run), encoding="utf-8")
    print(path)
