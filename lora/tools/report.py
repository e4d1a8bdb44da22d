"""A run as one page that needs no network: RUN/report.html.

    python -m lora report outputs/RUN

Where there is a final artifact, the page also shows what the model outputs for a few held-out
examples: scored steps and how reliable the scores are, or generated answers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import re

from markupsafe import Markup

from lora.common.atomic_files import write_text_atomically
from lora.common.checkpoint_folders import checkpoints_by_step
from lora.common.errors import UserError
from lora.common.printable_text import printable
from lora.common.saved_files import read_state, verify_artifact
from lora.config.flags import Parser
from lora.evaluation.html_templates import render_template
from lora.tools.charts import chart
from lora.tools.finished_run import FinishedRun, format_value

TRAINED_FACTS = ("method", "trainable_parameters", "parameters", "base_unchanged")


def page(run: FinishedRun) -> str:
    metadata, samples, problem = {}, None, ""
    try:
        metadata = artifact_metadata(run)
        if metadata:
            from lora.tools.report_samples import held_out_samples  # imports torch

            samples = held_out_samples(run.folder / "final_artifact")
    except UserError as error:
        problem = str(error)
        print(printable(f"no samples: {problem}"))
    environment = {**metadata.get("versions", {}), **metadata.get("hardware", {})}
    environment["commit"] = metadata.get("git_commit")
    values = {
        "title": run.name,
        "headline": headline(run),
        "ending": run.ending,
        "problem": problem,
        "result": result_rows(run),
        "charts": metric_charts(run),
        "checkpoints": checkpoint_table(run),
        "samples": samples,
        "startup_log": startup_log(run),
        "trained": value_rows({name: metadata.get(name) for name in TRAINED_FACTS}),
        "environment": value_rows(environment),
        "configuration": {name: value_rows(table) for name, table in run.settings_by_table.items()},
    }
    return render_template("report.html", values)


def artifact_metadata(run: FinishedRun) -> dict:
    """Return the metadata of the run's artifact, {} without one. Raises UserError as eval.py."""
    artifact = run.folder / "final_artifact"
    if artifact.is_symlink():
        raise UserError(f"{artifact}: a link, which is not followed.")
    return verify_artifact(artifact) if artifact.exists() else {}


def headline(run: FinishedRun) -> str:
    """Return what was trained on which base for which task, and how well it did."""
    config = run.settings
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
    return f"{text} Best at step {step}: {result}, on {held_out_size(run)}."


def describe_method(config: Mapping) -> str:
    if "lora_r" not in config:
        return "Full fine-tuning"
    if config["lora_r"] == 0:
        return "A score head"
    name = "QLoRA" if config["load_in_4bit"] else "LoRA"
    return f"{name} of rank {config['lora_r']}"


def held_out_size(run: FinishedRun) -> str:
    """Return how many sequences and targets were evaluated at the best step."""
    losses = run.example_losses(run.best_step)
    if not losses:
        return "the held-out data"
    targets = sum(count for _, count in losses.values())
    what = "labelled steps" if run.settings["task"] == "score" else "tokens"
    return f"{len(losses):,} held-out sequences with {targets:,} {what}"


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


def startup_log(run: FinishedRun) -> str:
    """Return the log up to the first step: data, trained parameters, warnings."""
    logs = sorted((run.folder / "logs").glob("train_*.log"))
    text = run.read_text(f"logs/{logs[0].name}") if logs else ""
    # The line of a step may begin with the time.
    return re.split(r"^[\d: -]*step \d", text, maxsplit=1, flags=re.MULTILINE | re.IGNORECASE)[0]


def checkpoint_table(run: FinishedRun) -> list[list[str]]:
    """Return a row for each validation metric, and a column for each checkpoint, the best first."""
    from lora.training.best_checkpoints import best_first  # imports torch

    checkpoints = checkpoints_by_step(run.folder / "checkpoints")
    states = [read_state(path, run.folder) for _, path in sorted(checkpoints.items())]
    if not states:
        return []
    best = best_first(states)
    states = best + [state for state in states if state not in best]  # no loss, or not finite
    names = {}
    for state in states:
        names.update(state["val"] or {})
    rows = [["", *(f"step {state['step']}" for state in states)]]
    for name in names:
        values = [(state["val"] or {}).get(name) for state in states]
        rows.append([name, *map(format_value, values)])
    return rows


def main(argv: Sequence[str]) -> None:
    parser = Parser("Write a run as one page that needs no network, RUN/report.html.")
    parser.add_argument("run", metavar="RUN", help="the run's folder, as outputs/RUN")
    run = FinishedRun.of(parser.parse_args(argv).run)
    path = run.folder / "report.html"
    write_text_atomically(path, page(run))
    print(path)
