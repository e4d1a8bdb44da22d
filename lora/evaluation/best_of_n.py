"""Best-of-N: choosing one of several solutions by the scores of their steps."""

from collections import Counter, defaultdict
import re

import numpy as np

from lora.evaluation.statistics import draws_of, quantiles

AGGREGATES = {"min": np.min, "product": np.prod, "last": lambda scores: scores[-1], "mean": np.mean}


def final_answer(example):
    """The last number of the last step, or its text: what a majority is of."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", example.steps[-1].replace(",", ""))
    return float(numbers[-1]) if numbers else example.steps[-1].strip().lower()


def best_of_n(examples, scores):
    """{"min", "product", "last", "mean", "random", "majority", "oracle": (share of right answers,
    [low, high])}.

    Of the solutions of each problem the one with the best score is taken; problems with one
    solution are left out, and steps that did not fit are, too. Ties share what they are worth.
    """
    groups = defaultdict(list)
    for example, of_steps in zip(examples, scores):
        if example.outcome is not None:
            groups[example.prompt].append((example, of_steps[of_steps == of_steps]))
    worth = defaultdict(list)
    for candidates in groups.values():
        if len(candidates) < 2:
            continue
        right = np.array([example.outcome for example, _ in candidates])
        votes = Counter(final_answer(example) for example, _ in candidates)
        rankings = {
            name: [of(s) if len(s) else -1.0 for _, s in candidates]
            for name, of in AGGREGATES.items()
        }
        rankings["majority"] = [votes[final_answer(example)] for example, _ in candidates]
        for name, values in rankings.items():
            worth[name].append(right[np.array(values) == max(values)].mean())
        worth["random"].append(right.mean())
        worth["oracle"].append(right.max())
    result = {}
    for name, values in worth.items():
        drawn = [np.array(values)[indices].mean() for indices in draws_of(len(values))]
        result[name] = (float(np.mean(values)), quantiles(drawn))
    return result
