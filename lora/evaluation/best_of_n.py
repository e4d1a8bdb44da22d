"""Best-of-N: choosing one of several solutions by the scores of their steps."""

from collections import Counter, defaultdict
from collections.abc import Sequence
import re

import numpy as np

from lora.data.examples import Example
from lora.evaluation.statistics import bootstrap_samples, interval_95

AGGREGATES = {"min": np.min, "product": np.prod, "last": lambda scores: scores[-1], "mean": np.mean}
MARK = re.compile(r"####|\\boxed|\banswer(?: is|:)|=", re.IGNORECASE)  # before a final answer
# A command of LaTeX; or a fraction, a power, a pair or an interval that no other number follows.
EXPRESSION = re.compile(
    r"\\[a-z]|(?:[\da-z)]\s*[/^]\s*(?:\d[\d.]*|\([^()]*\)|[a-z]\b)|[(\[][^()]*,[^()]*[)\]])\D*$"
)


def final_answer(example: Example) -> float | str:
    """Return the answer that the majority vote counts: the last step's last number, or its text.

    An expression, such as a fraction or a pair, is a text: what follows the last mark of an answer.
    """
    answer = MARK.split(example.steps[-1])[-1].strip(" \n$.{}").lower()
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)
    if EXPRESSION.search(answer):
        return "".join(answer.split())
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
    return float(numbers[-1]) if numbers else answer


def best_of_n(
    examples: Sequence[Example], scores: Sequence[np.ndarray]
) -> dict[str, tuple[float, list[float]]]:
    """Return the share of right answers and its 95 % interval [low, high] for each way to choose.

    The ways are AGGREGATES of the scores of steps, "majority", "random" and "oracle". Problems with
    one solution and steps without a score are left out. Solutions that share the best value count
    with their mean outcome.
    """
    solutions = defaultdict(list)
    for example, example_scores in zip(examples, scores):
        if example.outcome is not None:
            known = example_scores[~np.isnan(example_scores)]
            solutions[example.prompt].append((example, known))

    accuracies = defaultdict(list)
    for candidates in solutions.values():
        if len(candidates) < 2:
            continue
        right = np.array([example.outcome for example, _ in candidates])
        values = {}
        for name, aggregate in AGGREGATES.items():
            # A solution without any score is below all others, whose values are 0..1.
            values[name] = [aggregate(known) if len(known) else -1.0 for _, known in candidates]
        answers = [final_answer(example) for example, _ in candidates]
        votes = Counter(answers)
        values["majority"] = [votes[answer] for answer in answers]
        for name, candidate_values in values.items():
            is_best = np.array(candidate_values) == max(candidate_values)
            accuracies[name].append(right[is_best].mean())
        accuracies["random"].append(right.mean())
        accuracies["oracle"].append(right.max())

    result = {}
    for name, accuracies_of_problems in accuracies.items():
        by_problem = np.array(accuracies_of_problems)
        drawn = [by_problem[sample].mean() for sample in bootstrap_samples(len(by_problem))]
        result[name] = (float(by_problem.mean()), interval_95(drawn))
    return result
