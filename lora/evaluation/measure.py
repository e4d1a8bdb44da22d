"""What eval.py measures: loss, answers, retrieval, scores of steps."""

import math
from pathlib import Path
import sys

import numpy as np
import torch

from lora.common.terminal import printable
from lora.config.schema import max_batch_tokens
from lora.data.mixing import dataset_names
from lora.data.summary import describe_data
from lora.data.token_cache import tokenise_examples
from lora.evaluation import best_of_n, calibration, retrieval, step_metrics, step_report
from lora.evaluation.generate import answers, embed, prompt_tokens, step_scores
from lora.evaluation.predict import predict
from lora.evaluation.text_metrics import means, rouge_scorer, scores


def loss_numbers(examples, task, config, dtype):
    rows, facts = tokenise_examples(examples, task, config, "eval")
    batches = rows.batches(range(len(rows)), max_batch_tokens(config), task.packed)
    predictions = predict(task, batches, task.model.device, dtype)
    said, targets = predictions.values, predictions.targets
    print(describe_data("eval", facts))
    numbers = task.head.metrics(said, targets)
    text = task.tokenizer.decode(
        targets, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    size = len(text.encode()) or math.nan
    return numbers | {"bits_per_byte": numbers["loss"] * len(targets) / math.log(2) / size}


def answer_rows(questions, task, config, dtype):
    """(a dict for each question: where, prompt, reference, answer and its scores; the means of the
    scores).
    """
    prompts = [
        (q.where, prompt_tokens(q.where, q.messages, q.tools, task.tokenizer)) for q in questions
    ]
    texts = answers(task, prompts, config, dtype)
    rouge = rouge_scorer()
    measured = [
        scores(text, q.reference, config.evaluation, rouge) for q, text in zip(questions, texts)
    ]
    rows = [
        {
            "where": q.where,
            "prompt": task.tokenizer.decode(tokens),
            "reference": q.reference,
            "answer": text,
            **of_row,
        }
        for q, (_, tokens), text, of_row in zip(questions, prompts, texts, measured)
    ]
    return rows, means(measured)


def retrieval_numbers(asked, task, config, dtype):
    texts = [*asked.corpus.values(), *(query for query, _ in asked.queries)]
    embeddings = embed(task, texts, config, dtype)
    corpus, queries = embeddings[: len(asked.corpus)], embeddings[len(asked.corpus) :]
    return retrieval.metrics(
        retrieval.ranks_of(queries, corpus, [relevant for _, relevant in asked.queries])
    )


def judge_steps(arguments, config, asked, task, dtype):
    """Score the steps that are asked for; show them where that is asked for; the numbers, where
    they have labels.
    """
    examples, settings = asked.examples, config.evaluation
    scores = step_scores(examples, task, config, dtype)
    unread = sum(int(np.isnan(of).sum()) for of in scores)
    if unread:
        total = sum(map(len, scores))
        print(
            f"note: {unread} of {total} steps do not fit max_length {config.data.max_length} and have no score"
        )
    if arguments.prompt is not None or arguments.test_set:
        for example, of_steps in zip(examples, scores):
            print(
                ""
                if arguments.prompt is not None
                else f"\n{example.where}\n{printable(example.prompt)}\n",
                end="",
            )
            print(
                "\n".join(
                    step_report.lines(example, of_steps, settings.threshold, sys.stdout.isatty())
                )
            )
    numbers, table = {}, []
    if step_metrics.measured(examples, scores).size:
        numbers, table = labelled_numbers(arguments, config, examples, scores, task)
    for name, (value, ends) in best_of_n.best_of_n(examples, scores).items():
        numbers[f"best_of_n/{name}"] = value
        numbers.setdefault("intervals", {}).setdefault("best_of_n", {})[name] = ends
        table.append([f"best of n, {name}", step_report.number(value, ends)])
    if arguments.html:
        title = f"{arguments.checkpoint or config.model.base_model}: scores of steps"
        text = step_report.page(title, examples, scores, settings.threshold, table)
        Path(arguments.html).write_text(text, encoding="utf-8")
    for name, *cells in table:
        print(f"{name:>24}  " + "  ".join(f"{cell:24}" for cell in cells).rstrip())
    return numbers


def labelled_numbers(arguments, config, examples, scores, task):
    """(numbers, the table that shows them) of scored steps with labels."""
    paths = arguments.eval_data or (
        [arguments.test_set] if arguments.test_set else config.data.eval_paths
    )
    measured = {
        e.dataset_id for e, of in zip(examples, scores) if step_metrics.measured([e], [of]).size
    }
    names = {name: source for source, name in enumerate(dataset_names(paths)) if source in measured}
    found = step_metrics.report(
        examples, scores, config.evaluation, names if len(names) > 1 else {}
    )
    labels, said = step_metrics.measured(examples, scores)
    loss = task.head.metrics(torch.from_numpy(said), torch.from_numpy(labels))["loss"]
    print(
        f"{len(labels)} labelled steps, {(labels >= 0.5).mean():.1%} of them right; loss {loss:.6f}"
    )
    if config.evaluation.tune_threshold_on:
        at = ", ".join(f"{value:g} ({name})" for name, value in found["thresholds"].items())
        print(f"thresholds tuned on {config.evaluation.tune_threshold_on}: {at}")
    if arguments.reliability:
        calibration.reliability_picture(arguments.reliability, said, labels)
    return {"loss": loss} | found["measures"]["scores"] | found, step_report.table(found)
