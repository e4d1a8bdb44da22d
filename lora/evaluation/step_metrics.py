"""How well step scores agree with labels, beside two baselines that do not understand the steps.

A scorer that knows where in a chain errors tend to be already looks good. So every number stands
next to that of a baseline that knows a step's position and length, and of one that also knows its
words. A step is right where its label is at least 0.5. Steps that lack label or score are left out.
"""

from collections import defaultdict
from collections.abc import Sequence
import math

import numpy as np

from lora.common.errors import UserError
from lora.config.schema import EvaluationConfig
from lora.data.examples import Example
from lora.evaluation import statistics
from lora.evaluation.calibration import expected_calibration_error
from lora.evaluation.trivial_scorers import BASELINES, baseline_scores

Chains = Sequence[Example]
Scores = Sequence[np.ndarray]  # for each example the scores of its steps, [steps]
Measures = dict[str, float]
Intervals = dict[str, dict[str, list[float]]]  # {scorer: {measure: [low, high]}}


def auc(scores: np.ndarray, right: np.ndarray) -> float:
    """Return how often a right step has a higher score than a wrong one; ties count half.

    It is NaN where all or none are right. `scores` is [n], `right` is [n] of bool.
    """
    num_right, num_wrong = right.sum(), (~right).sum()
    if num_right == 0 or num_wrong == 0:
        return math.nan
    wins = statistics.ranks(scores)[right].sum() - num_right * (num_right + 1) / 2
    return float(wins / (num_right * num_wrong))


def f1(true_positives: int, num_errors: int) -> float:
    """Return the F1; NaN where there is nothing to find and nothing is found."""
    if true_positives == num_errors == 0:
        return math.nan
    return 2 * true_positives / (2 * true_positives + num_errors)


def harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def first_below(values: Sequence[float], threshold: float) -> int:
    """Return the index of the first value below the threshold, or -1."""
    for i, value in enumerate(values):
        if value < threshold:
            return i
    return -1


def labelled_steps(examples: Chains, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels [n] and the scores [n] of the steps that have both."""
    labels, scores_of_labelled = [], []
    for example, example_scores in zip(examples, scores):
        for label, score in zip(example.labels, example_scores):
            if label is not None and not math.isnan(score):
                labels.append(label)
                scores_of_labelled.append(score)
    return np.array(labels, np.float64), np.array(scores_of_labelled, np.float64)


class ScoredChains:
    """One scorer's scores for chains with labelled steps, of one data set or (None) of all."""

    def __init__(
        self, examples: Chains, scores: Scores, threshold: float, dataset_id: int | None = None
    ) -> None:
        self.threshold = threshold
        self.problems: list[str] = []  # of each chain
        self.labels: list[np.ndarray] = []  # of each chain, [steps]
        self.scores: list[np.ndarray] = []
        # The index of each chain's first wrong step, by the labels and by the scores; -1: none. If
        # a chain is cut (at max_length) before its scores find an error, the scorer has not judged
        # all of it. It is then neither right nor located: its predicted error, -2, equals no label.
        first_errors, predicted_errors = [], []
        for example, chain_scores in zip(examples, scores):
            labels, labelled_scores = labelled_steps([example], [chain_scores])
            all_labels = [label for label in example.labels if label is not None]
            if all_labels and dataset_id in (None, example.dataset_id):
                self.problems.append(example.prompt)
                self.labels.append(labels)
                self.scores.append(labelled_scores)
                first_errors.append(first_below(all_labels, 0.5))
                predicted = first_below(labelled_scores, threshold)
                is_cut = len(labels) < len(all_labels)
                predicted_errors.append(-2 if is_cut and predicted == -1 else predicted)
        self.first_errors = np.array(first_errors)
        self.predicted_errors = np.array(predicted_errors)

    def measures(self, chains: np.ndarray | None = None) -> Measures:
        """Compute all measures over the steps of some chains, by their indices; None: of all."""
        if chains is None:
            chains = np.arange(len(self.labels))
        labels = np.concatenate([self.labels[i] for i in chains])
        scores = np.concatenate([self.scores[i] for i in chains])
        right = labels >= 0.5
        predicted_right = scores >= self.threshold
        num_errors = (right != predicted_right).sum()
        has_error = self.first_errors[chains] >= 0
        located = self.predicted_errors[chains] == self.first_errors[chains]
        first_error_accuracy = located[has_error].mean() if has_error.any() else math.nan
        no_error_accuracy = located[~has_error].mean() if (~has_error).any() else math.nan

        mse = ((scores - labels) ** 2).mean()
        values = {
            "mse": mse,
            "mae": np.abs(scores - labels).mean(),
            "r2": 1 - mse / labels.var() if statistics.varies(labels) else math.nan,
            "pearson": statistics.pearson(scores, labels),
            "spearman": statistics.spearman(scores, labels),
            "auc": auc(scores, right),
            "ece": expected_calibration_error(scores, labels),
            "f1": f1((right & predicted_right).sum(), num_errors),
            "negative_f1": f1((~right & ~predicted_right).sum(), num_errors),
            "first_error_accuracy": first_error_accuracy,
            "no_error_accuracy": no_error_accuracy,
            "processbench_f1": harmonic_mean(first_error_accuracy, no_error_accuracy),
        }
        return {name: float(value) for name, value in values.items()}


def best_threshold(examples: Chains, scores: Scores, dataset_id: int | None = None) -> float:
    """Return the threshold from 0.02 to 0.98 with the best ProcessBench F1."""

    def processbench_f1(threshold: float) -> float:
        chains = ScoredChains(examples, scores, threshold, dataset_id)
        return chains.measures()["processbench_f1"]

    return max((i / 50 for i in range(1, 50)), key=processbench_f1)


def intervals(scorers: dict[str, ScoredChains], draws: int) -> tuple[Intervals, Intervals]:
    """Bootstrap the measures over problems: chains of one problem are drawn together.

    The scorers have the same chains and are measured on the same draws, so differences are paired.
    One problem alone has no intervals: they are NaN.

    Returns:
        The 95 % intervals of each scorer, and of the first scorer minus each other one.
    """
    first, *others = scorers
    chains_of_problem = defaultdict(list)
    for i, problem in enumerate(scorers[first].problems):
        chains_of_problem[problem].append(i)
    groups = list(chains_of_problem.values())

    samples: dict[str, list[Measures]] = {name: [] for name in scorers}
    for drawn in statistics.bootstrap_samples(len(groups), draws):
        chains = np.concatenate([groups[i] for i in drawn])
        if not any(len(scorers[first].labels[i]) for i in chains):
            continue  # no step of these chains has a score
        for name, scored in scorers.items():
            samples[name].append(scored.measures(chains))

    scorer_intervals: Intervals = {name: {} for name in scorers}
    difference_intervals: Intervals = {name: {} for name in others}
    for measure in scorers[first].measures():
        values_of_first = np.array([sample[measure] for sample in samples[first]])
        for name in scorers:
            values = np.array([sample[measure] for sample in samples[name]])
            scorer_intervals[name][measure] = statistics.interval_95(values)
            if name in others:
                differences = values_of_first - values
                difference_intervals[name][measure] = statistics.interval_95(differences)
    return scorer_intervals, difference_intervals


def with_baselines(examples: Chains, scores: Scores) -> dict[str, Scores]:
    """Return the scores, and the baselines' scores for the same steps, see `baseline_scores`."""
    scores_of_scorer = {"scores": scores}
    for name, features in BASELINES.items():
        pairs = zip(scores, baseline_scores(features, examples))
        scores_of_scorer[name] = [np.where(np.isnan(own), np.nan, other) for own, other in pairs]
    return scores_of_scorer


def report(
    examples: Chains,
    scores_of_scorer: dict[str, Scores],
    settings: EvaluationConfig,
    dataset_ids: dict[str, int],
    draws: int = 1000,
) -> dict[str, dict]:
    """Measure scorers on the same steps, and the first one against the others. Raises UserError.

    `dataset_ids` is {name of a set: its id} where there are several sets, otherwise empty. Each set
    gets a "NAME/processbench_f1"; their mean is "mean_processbench_f1".

    Returns:
        "thresholds": {scorer: number}, "measures": {scorer: {measure: value}}, "intervals": the
        same with [low, high], and "differences": {baseline: {measure: [low, high]}}, the interval
        of the first scorer's measure less the baseline's.
    """
    tuned_on = settings.tune_threshold_on
    if tuned_on and tuned_on not in dataset_ids:
        available = ", ".join(dataset_ids) or "only one set with labels"
        raise UserError(f"tune_threshold_on {tuned_on}: no such set; there is {available}.")
    thresholds, measures, scorers = {}, {}, {}
    for name, scores in scores_of_scorer.items():
        threshold = settings.threshold
        if tuned_on:
            threshold = best_threshold(examples, scores, dataset_ids[tuned_on])
        thresholds[name] = threshold
        scorers[name] = ScoredChains(examples, scores, threshold)
        measures[name] = scorers[name].measures()
        if dataset_ids:
            f1_of_sets = []
            for set_name, dataset_id in dataset_ids.items():
                scored = ScoredChains(examples, scores, threshold, dataset_id)
                set_f1 = scored.measures()["processbench_f1"]
                if set_name == tuned_on and np.isnan(set_f1):
                    needs = "it needs chains with an error and chains without one"
                    raise UserError(f"tune_threshold_on {tuned_on}: {needs}.")
                f1_of_sets.append(set_f1)
                measures[name][f"{set_name}/processbench_f1"] = set_f1
            measures[name]["mean_processbench_f1"] = float(np.mean(f1_of_sets))
    result: dict[str, dict] = {"thresholds": thresholds, "measures": measures}
    result["intervals"], result["differences"] = intervals(scorers, draws)
    return result
