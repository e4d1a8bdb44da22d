"""What eval.py measures: loss, answers, retrieval, scores of steps."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
import json
import math
from pathlib import Path
import sys

import numpy as np
import torch
from torch import Tensor

from lora.common.atomic_files import write_text_atomically
from lora.common.errors import UserError
from lora.common.printable_text import printable
from lora.common.toml_json import to_json, without_nan
from lora.config.schema import Config, EvaluationConfig, max_batch_tokens
from lora.data.counts import describe_data
from lora.data.examples import Example
from lora.data.mixing import dataset_names
from lora.data.token_cache import tokenise_examples
from lora.evaluation import retrieval, step_metrics, step_report, text_metrics
from lora.evaluation.best_of_n import best_of_n
from lora.evaluation.calibration import save_reliability_diagram
from lora.evaluation.eval_arguments import SCORE, EvaluationRequest, rows_path
from lora.evaluation.generate import embed, generate_answers, plain_text, prompt_tokens, step_scores
from lora.evaluation.predict import predict
from lora.evaluation.text_metrics import Measures, Question, mean_scores
from lora.model.task import Task

CATEGORY = "category/"  # begins the names of the numbers of one category: category/NAME/MEASURE
MAX_CATEGORIES = 100


@dataclass
class Results:
    numbers: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)  # an answer and its measures, or a scored chain
    critical_questions: list[dict] = field(default_factory=list)  # whether each was passed

    def save(self, path: Path, task: str) -> None:
        """Write the numbers as JSON, and the rows to a file beside it."""
        values = without_nan(self.numbers)
        if self.critical_questions:
            values["critical_questions"] = self.critical_questions
        path = path.resolve()  # a link is written through
        write_text_atomically(path, to_json(values))
        if self.rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
            write_text_atomically(rows_path(path, task), "".join(lines))


def measure_language(
    request: EvaluationRequest, task: Task, config: Config, dtype: torch.dtype
) -> Results:
    results = Results()
    if request.examples:
        results.numbers.update(measure_loss(request.examples, task, config, dtype))
    if request.test_set:
        results.rows, measures = measure_answers(request.test_set, task, config, dtype)
        results.numbers.update(means_by_category(request.test_set, measures))
    if request.critical:
        answers, measures = measure_answers(request.critical, task, config, dtype)
        for question, answer, answer_measures in zip(request.critical, answers, measures):
            passed = text_metrics.passes(answer["answer"], answer["reference"], config.evaluation)
            answer["passed"] = passed
            answer_measures["passed"] = float(passed)
            where, text = question.where, question.messages[-1]["content"]
            verdict = {"where": where, "question": text, "passed": passed}
            results.critical_questions.append(verdict)
            _, _, last_line = text.strip().rpartition("\n")
            print(printable(f"{'PASS' if passed else 'FAIL'}  {where}  {last_line}"))
        results.rows += answers
        means = means_by_category(request.critical, measures)
        results.numbers.update({f"critical/{name}": mean for name, mean in means.items()})
    return results


def categories_of(rows: Sequence[Example] | Sequence[Question]) -> list[str]:
    """Return the category of each row; "" for one without, and for all if they are too many."""
    categories = [row.category for row in rows]
    count = len(set(categories))
    if count > MAX_CATEGORIES:
        print(f"note: {count} categories, too many to give the means of each ({MAX_CATEGORIES})")
        return [""] * len(rows)
    return categories


def by_category(categories: Sequence[str], measure: Callable[[list[int]], dict]) -> dict:
    """Return what `measure` returns for the indices of each category, as category/NAME/KEY."""
    indices: dict[str, list[int]] = {}
    for i, name in enumerate(categories):
        if name:
            indices.setdefault(name, []).append(i)
    numbers = {}
    for name, chosen in indices.items():
        category_numbers = measure(chosen).items()
        numbers.update({f"{CATEGORY}{name}/{key}": value for key, value in category_numbers})
    return numbers


def means_by_category(questions: Sequence[Question], measures: Sequence[Measures]) -> Measures:
    """Return the means of the measures over all questions, and over those of each category."""

    def means(chosen: list[int]) -> dict:
        return {"questions": len(chosen), **mean_scores([measures[i] for i in chosen])}

    numbers = {"questions": len(questions), **mean_scores(measures)}
    return numbers | by_category(categories_of(questions), means)


def measure_loss(
    examples: Sequence[Example], task: Task, config: Config, dtype: torch.dtype
) -> dict[str, float]:
    # Predictions carry the dataset_id of their example. To find those of a category again, an
    # example is given the index of its category in the place of that id.
    categories = categories_of(examples)
    names = list(dict.fromkeys(categories))
    numbered = zip(examples, categories)
    examples = [replace(example, dataset_id=names.index(name)) for example, name in numbered]
    rows, facts = tokenise_examples(examples, task.tokenizer, task.causal, config, "eval")
    batches = rows.batches(range(len(rows)), max_batch_tokens(config), task.packed)
    predictions = predict(task, batches, task.model.device, dtype)
    print(describe_data("eval", facts))
    values, targets = predictions.values, predictions.targets
    target_categories = [names[i] for i in predictions.dataset_ids.tolist()]

    def metrics(chosen: list[int]) -> dict:
        numbers = language_metrics(task, values[chosen], targets[chosen])
        return {"targets": len(chosen), **numbers}

    numbers = {"targets": len(targets), **language_metrics(task, values, targets)}
    return numbers | by_category(target_categories, metrics)


def language_metrics(task: Task, values: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the metrics of predictions for targets, both [n, ...], and bits per byte."""
    numbers = task.head.metrics(values, targets)
    num_bytes = len(plain_text(targets, task.tokenizer).encode()) or math.nan
    numbers["bits_per_byte"] = numbers["loss"] * len(targets) / math.log(2) / num_bytes
    return numbers


def measure_answers(
    questions: Sequence[Question], task: Task, config: Config, dtype: torch.dtype
) -> tuple[list[dict], list[Measures]]:
    """Return the answer to each question as it is saved, and its measures."""
    tokenizer = task.tokenizer
    prompts = [(q.where, prompt_tokens(q.where, q.messages, q.tools, tokenizer)) for q in questions]
    texts = generate_answers(task, prompts, config, dtype)
    rouge = text_metrics.rouge_scorer()
    answers, measures = [], []
    for q, (_, tokens), text in zip(questions, prompts, texts):
        measures.append(text_metrics.score_answer(text, q.reference, config.evaluation, rouge))
        answer = {"where": q.where, "prompt": tokenizer.decode(tokens)}
        answer.update(category=q.category, reference=q.reference, answer=text, **measures[-1])
        answers.append(answer)
    return answers, measures


def measure_retrieval(
    request: EvaluationRequest, task: Task, config: Config, dtype: torch.dtype
) -> dict[str, float]:
    queries, relevant = zip(*request.queries)
    embeddings = embed(task, [*request.corpus.values(), *queries], config, dtype)
    corpus_embeddings, query_embeddings = np.split(embeddings, [len(request.corpus)])
    ranks = retrieval.relevant_ranks(query_embeddings, corpus_embeddings, relevant)
    return retrieval.metrics(ranks)


def measure_steps(
    request: EvaluationRequest, arguments: Namespace, task: Task, config: Config, dtype: torch.dtype
) -> Results:
    """Score the steps, show them where this was requested, and measure those with labels."""
    examples, threshold = request.examples, config.evaluation.threshold
    scores = step_scores(examples, task, config, dtype)
    print_unscored(scores, config)
    paths = arguments.eval_data or config.data.eval_paths
    if arguments.test_set or arguments.prompt is not None:
        paths = [arguments.test_set or "--prompt"]
    if arguments.tune_threshold_on is None:
        forget_absent_tuning_set(paths, config.evaluation)

    labels, labelled_scores = step_metrics.labelled_steps(examples, scores)
    why_no_labels = "no step has a label"
    if any(label is not None for example in examples for label in example.labels):
        why_no_labels = f"no step with a label fits max_length {config.data.max_length}"
    report: dict[str, dict] = {}
    if len(labels):
        report = compare_with_baselines(paths, examples, scores, config)
        threshold = report["thresholds"]["scores"]  # perhaps a tuned one
    elif arguments.reliability or config.evaluation.tune_threshold_on:
        raise UserError(f"{why_no_labels}: --reliability and --tune_threshold_on need them.")

    is_prompt = arguments.prompt is not None
    if is_prompt or arguments.test_set:
        print_chains(examples, scores, threshold, is_prompt)

    numbers, table = {}, []
    if report:
        values, targets = torch.from_numpy(labelled_scores), torch.from_numpy(labels)
        loss = task.head.metrics(values, targets)["loss"]
        print_labelled(labels, loss, report["thresholds"], config.evaluation.tune_threshold_on)
        if arguments.reliability:
            save_reliability_diagram(arguments.reliability, labelled_scores, labels)
        numbers = {"loss": loss, **report["measures"]["scores"], **report}
        table = step_report.table(report)

    best_results = best_of_n(examples, scores)
    is_shown = is_prompt or arguments.test_set or arguments.html
    if not (report or best_results or is_shown):
        nothing = f"{why_no_labels} and no solution has an outcome, so nothing is measured"
        raise UserError(f"{nothing}; --test_set prints the scores.")
    if best_results and not table:
        table = [["measure", "scores"]]
    for name, (value, interval) in best_results.items():
        numbers[f"best_of_n/{name}"] = value
        numbers.setdefault("intervals", {}).setdefault("best_of_n", {})[name] = interval
        table.append([f"best of n, {name}", step_report.number(value, interval)])
    if arguments.html:
        title = f"Step scores of {arguments.checkpoint or config.model.base_model}"
        page = step_report.page(title, examples, scores, threshold, table)
        write_text_atomically(Path(arguments.html), page)
    if table:
        print(*step_report.aligned(table), sep="\n")
    if report:
        print(step_report.INTERVALS, step_report.verdict(report), sep="\n")

    def metrics(chosen: list[int]) -> dict:
        chosen_scores = [scores[i] for i in chosen]
        return measure_chains([examples[i] for i in chosen], chosen_scores, threshold)

    numbers.update(by_category(categories_of(examples), metrics))
    return Results(numbers, [scored_chain(*chain) for chain in zip(examples, scores)])


def scored_chain(example: Example, scores: np.ndarray) -> dict:
    """Return a chain as it is saved; a step that does not fit has the score None."""
    return {
        "where": example.where,
        "category": example.category,
        "prompt": example.prompt,
        "steps": example.steps,
        "labels": example.labels,
        "is_correct": example.outcome,
        "scores": without_nan(scores.tolist()),
    }


def print_unscored(scores: step_metrics.Scores, config: Config) -> None:
    """Print how many steps have no score, if any."""
    has_no_score = np.isnan(np.concatenate(scores))
    if has_no_score.any():
        too_long = f"do not fit max_length {config.data.max_length} and have no score"
        print(f"note: {has_no_score.sum()} of {len(has_no_score)} steps {too_long}")


def print_labelled(
    labels: np.ndarray, loss: float, thresholds: dict[str, float], tuned_on: str
) -> None:
    """Print how many steps have a label and a score, and the thresholds where they are tuned."""
    right = (labels >= 0.5).mean()
    print(f"{len(labels)} labelled steps, {right:.1%} of them right; loss {loss:.6f}")
    if tuned_on:
        tuned = [f"{value:g} ({name})" for name, value in thresholds.items()]
        print(f"thresholds tuned on {tuned_on}: {', '.join(tuned)}")


def measure_chains(
    examples: Sequence[Example], scores: step_metrics.Scores, threshold: float
) -> dict[str, float]:
    """Measure the labelled steps of some chains, if there are any, and the best of n."""
    scored = step_metrics.ScoredChains(examples, scores, threshold)
    measures = scored.measures() if any(map(len, scored.labels)) else {}
    for way, (value, _) in best_of_n(examples, scores).items():
        measures[f"best_of_n/{way}"] = value
    return {"chains": len(examples), **measures}


def forget_absent_tuning_set(paths: Sequence[str], settings: EvaluationConfig) -> None:
    """Keep the threshold as it is where the set that the run tuned it on is not evaluated here."""
    tuned_on, threshold = settings.tune_threshold_on, settings.threshold
    is_there = tuned_on in dataset_names(paths)
    if tuned_on and not (is_there and len(paths) > 1):
        reason = "the only set here" if is_there else "which is not here"
        print(f"note: the threshold is {threshold:g}, not tuned on {tuned_on}, {reason}")
        settings.tune_threshold_on = ""


def print_chains(
    examples: Sequence[Example], scores: step_metrics.Scores, threshold: float, is_prompt: bool
) -> None:
    """Print scored steps; those of a file with their problems, and what the marks mean."""
    for example, chain_scores in zip(examples, scores):
        if not is_prompt:
            print(printable(f"\n{example.where}\n{example.prompt}"))
        for line in step_report.lines(example, chain_scores, threshold, sys.stdout.isatty()):
            print(line)
    if not is_prompt:
        print(f"\n{SCORE}")
        print(f"<- first error: the first step with a score below the threshold, {threshold:g}.")


def compare_with_baselines(
    paths: Sequence[str], examples: Sequence[Example], scores: step_metrics.Scores, config: Config
) -> dict[str, dict]:
    """Measure scores of chains that were read from `paths`, see `step_metrics.report`."""
    measured_ids = set()
    for example, chain_scores in zip(examples, scores):
        labels, _ = step_metrics.labelled_steps([example], [chain_scores])
        if len(labels):
            measured_ids.add(example.dataset_id)
    dataset_ids = {name: i for i, name in enumerate(dataset_names(paths)) if i in measured_ids}
    if len(dataset_ids) == 1:
        dataset_ids = {}
    scorers = step_metrics.with_baselines(examples, scores)
    return step_metrics.report(examples, scorers, config.evaluation, dataset_ids)
