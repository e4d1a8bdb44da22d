"""A run as one page that needs no network: RUN/report.html.

    python -m lora report outputs/RUN

The page has the curves, the configuration, the startup log (data and trained parameters), the best
checkpoints and the environment. Where there is a final artifact, it also shows what the model
outputs for a few held-out examples: scored steps and how reliable the scores are, or generated
answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
import json
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup
import numpy as np

from lora.common.serialization import read_file
from lora.common.terminal import printable
from lora.config.flags import Parser
from lora.config.schema import Config
from lora.config.tables import saved_config
from lora.data.examples import Example
from lora.data.raw_data import RawData
from lora.evaluation.pages import render_template
from lora.evaluation.step_report import Chain, Rows, chains
from lora.tools.charts import Point, chart
from lora.tools.finished_run import FinishedRun, format_value

if TYPE_CHECKING:
    from lora.model.task import Task

MAX_SHOWN_EXAMPLES = 5
MAX_SCORED_EXAMPLES = 200  # for the reliability chart
MAX_TEXT_TOKENS = 80  # of a generated answer, and of the beginning of a text to be continued
TRAINED_FACTS = ("method", "trainable_parameters", "parameters", "base_unchanged")


@dataclass(frozen=True)
class Reliability:
    """How well scores agree with labels, over all labelled steps."""

    steps: int
    error: float  # expected calibration error
    chart: Markup


@dataclass(frozen=True)
class Answer:
    """A held-out prompt with the model's answer and the reference."""

    where: str  # file:line
    prompt: str
    rows: list[tuple[str, str]]  # the generated text and the expected one, each with its name


@dataclass
class Samples:
    """Output of the final artifact's model on held-out examples: scored chains, or answers."""

    chains: list[Chain] = field(default_factory=list)
    threshold: float = 0.5
    reliability: Reliability | None = None
    answers: list[Answer] = field(default_factory=list)


def page(run: FinishedRun, samples: Samples) -> str:
    """Return the page of a run; without samples it has no section of them."""
    metadata = artifact_metadata(run.folder)
    config = json.loads((run.folder / "logs" / "config.json").read_text())
    return render_template(
        "report.html",
        title=run.name,
        has_ended=bool(run.results),
        result=result_rows(run),
        charts=metric_charts(run),
        checkpoints=checkpoint_table(run.folder),
        samples=samples,
        startup_log=startup_log(run.folder),
        trained=value_rows({name: metadata.get(name) for name in TRAINED_FACTS}),
        environment=environment_rows(metadata),
        configuration={name: value_rows(table) for name, table in config.items()},
    )


def artifact_metadata(folder: Path) -> dict:
    """Return the final artifact's metadata.json; empty where there is none."""
    path = folder / "final_artifact" / "metadata.json"
    if not path.is_file():
        return {}
    return read_file(path)


def value_rows(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the names and the values as texts, without those that are empty."""
    rows = []
    for name, value in values.items():
        is_empty = value in ("", None, [], {})
        if not is_empty:
            rows.append((name, format_value(value)))
    return rows


def result_rows(run: FinishedRun) -> list[tuple[str, str]]:
    """Return the best validation metrics, the speed and the memory of a run."""
    best_metrics = run.results.get("best", {})
    values = {f"best {name}": value for name, value in best_metrics.items()}
    values["tokens/s"] = run.values["tokens/s"]
    values["seconds"] = run.values["seconds"]
    values["peak memory, GB"] = run.values["GB"]
    return value_rows(values)


def environment_rows(metadata: Mapping) -> list[tuple[str, str]]:
    """Return the versions, the hardware and the commit that a run had."""
    values = {}
    values.update(metadata.get("versions", {}))
    values.update(metadata.get("hardware", {}))
    values["commit"] = metadata.get("git_commit")
    return value_rows(values)


def metric_charts(run: FinishedRun) -> list[Markup]:
    """Return the charts of the metrics that a run has."""
    losses = {"training": run.curve("train/loss"), "validation": run.curve("val/loss")}
    charts = [
        chart("loss", "step", losses),
        chart("validation r2", "step", {"": run.curve("val/r2")}),
        chart("validation token_accuracy", "step", {"": run.curve("val/token_accuracy")}),
        chart("gradient norm", "step", {"": run.curve("train/grad_norm")}),
        chart("learning rate", "step", {"": run.curve("train/learning_rate")}),
    ]
    return [drawing for drawing in charts if drawing]


def startup_log(folder: Path) -> str:
    """Return the log up to the first step: data, trained parameters, warnings."""
    logs = sorted((folder / "logs").glob("train_*.log"))
    if not logs:
        return ""

    lines = []
    for line in logs[0].read_text(encoding="utf-8").splitlines():
        if line.startswith("step "):
            break
        lines.append(printable(line))
    return "\n".join(lines)


def checkpoint_table(folder: Path) -> Rows:
    """Return the checkpoints and their validation metrics, the best first; empty without any."""
    from lora.training.best_checkpoints import best_first, saved_states  # imports torch

    states = saved_states(folder / "checkpoints")
    if not states:
        return []
    not_evaluated = [state for state in states if not state["val"]]
    ordered_states = best_first(states) + not_evaluated

    metric_names: list[str] = []
    for state in ordered_states:
        for name in state["val"] or {}:
            if name not in metric_names:
                metric_names.append(name)

    rows = [["checkpoint", *metric_names]]
    for state in ordered_states:
        metrics = state["val"] or {}
        cells = [format_value(metrics.get(name)) for name in metric_names]
        rows.append([state["path"].name, *cells])
    return rows


def held_out_samples(folder: Path) -> Samples:
    """Run the final artifact's model on held-out examples."""
    import torch

    from lora.model.device import choose_device
    from lora.model.load import load_task

    config = saved_config(folder / "final_artifact")
    task = load_task(config, torch.float32)
    task.load(folder / "final_artifact")
    task.to(choose_device(config.training.device)).eval()

    _, held_out_examples = RawData(config).examples()
    if config.model.task == "score":
        return scored_samples(task, held_out_examples, config)
    return Samples(answers=generated_answers(task, held_out_examples, config))


def scored_samples(task: Task, examples: Sequence[Example], config: Config) -> Samples:
    """Score the steps of held-out chains: a few to show, more for the reliability."""
    import torch

    from lora.evaluation.generate import step_scores
    from lora.evaluation.step_metrics import measured

    examples = examples[:MAX_SCORED_EXAMPLES]
    scores = step_scores(examples, task, config, torch.float32)
    threshold = config.evaluation.threshold
    samples = Samples(threshold=threshold)
    samples.chains = chains(examples[:MAX_SHOWN_EXAMPLES], scores[:MAX_SHOWN_EXAMPLES], threshold)

    labels, labelled_scores = measured(examples, scores)
    if len(labels):
        samples.reliability = reliability(labelled_scores, labels)
    return samples


def reliability(scores: np.ndarray, labels: np.ndarray) -> Reliability:
    """Compare the scores of labelled steps with their labels, both [steps]."""
    from lora.evaluation.calibration import calibration, expected_calibration_error

    bubbles: list[Point] = []
    for mean_score, mean_label, count in calibration(scores, labels):
        bubbles.append((mean_score, mean_label, count / len(scores)))
    diagonal = [(0, 0), (1, 1)]
    drawing = chart("mean label", "mean score", {"as it should be": diagonal, "": bubbles})
    return Reliability(len(scores), expected_calibration_error(scores, labels), drawing)


def generated_answers(
    task: Task,
    examples: Sequence[Example],
    config: Config,
) -> list[Answer]:
    """Answer the last question of a few held-out chats; continue texts after their beginning."""
    import torch

    from lora.evaluation.generate import answers

    answer_length = min(MAX_TEXT_TOKENS, config.data.max_length // 2)
    max_prompt_length = config.data.max_length - answer_length
    prompts, references = [], []
    for example in examples[:MAX_SHOWN_EXAMPLES]:
        if example.messages:
            where, prompt, reference = chat_prompt(example, task)
            prompt = prompt[-max_prompt_length:]
        else:
            where, prompt, reference = text_prompt(example, task, answer_length)
        prompts.append((where, prompt))
        references.append(reference)

    config.evaluation.max_new_tokens = answer_length
    generated_texts = answers(task, prompts, config, torch.float32)

    shown_answers = []
    for (where, prompt), reference, generated in zip(prompts, references, generated_texts):
        prompt_text = printable(task.tokenizer.decode(prompt))
        texts = {"says": printable(generated) or " ", "expected": printable(reference)}
        shown_answers.append(Answer(where, prompt_text, value_rows(texts)))
    return shown_answers


def chat_prompt(example: Example, task: Task) -> tuple[str, list[int], str]:
    """Return (where, tokens up to the last answer, the last answer) of a chat."""
    from lora.evaluation.generate import prompt_tokens
    from lora.evaluation.text_metrics import last_question

    question = last_question(example)
    tokens = prompt_tokens(question.where, question.messages, question.tools, task.tokenizer)
    return question.where, tokens, question.reference


def text_prompt(example: Example, task: Task, max_length: int) -> tuple[str, list[int], str]:
    """Return (where, tokens of the beginning, the text after it), each of max_length at most."""
    from lora.evaluation.generate import text_tokens

    tokens = text_tokens(example.text, task.tokenizer)
    prompt_length = max(1, min(len(tokens) // 2, max_length))
    reference = task.tokenizer.decode(tokens[prompt_length : prompt_length + max_length])
    return example.where, tokens[:prompt_length], reference


def main(argv: Iterable[str]) -> None:
    """Write RUN/report.html and print its path."""
    parser = Parser("A run as one page, RUN/report.html.")
    parser.add_argument("run", metavar="RUN", help="its folder")
    run = FinishedRun.of(parser.parse_args(argv).run)

    samples = Samples()
    if (run.folder / "final_artifact").is_dir():
        samples = held_out_samples(run.folder)

    path = run.folder / "report.html"
    path.write_text(page(run, samples), encoding="utf-8")
    print(path)
