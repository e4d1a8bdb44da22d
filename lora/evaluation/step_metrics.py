"""How well steps are judged, beside two scorers that understand nothing.

AUC, mse and accuracy look good already for a scorer that knows where in a chain errors tend to be,
so every figure stands next to that of one that knows each step's position and length only, and of
one that knows its words as well; and with an interval, from drawing the problems again.

A step is right where its label is at least 0.5, and judged right where its score is at least the
threshold. Steps without a label, or that did not fit into max_length (score NaN), are not measured,
by any of the three.
"""

from collections import defaultdict
from dataclasses import dataclass
import math

import numpy as np

from lora.common.errors import UserError
from lora.evaluation.calibration import expected_calibration_error
from lora.evaluation.statistics import draws_of, pearson, quantiles, ranks, spearman
from lora.evaluation.trivial_scorers import BASELINES, baseline_scores


def auc(scores, right):
    """How often a right step scores above a wrong one, [n] and [n] of bool; ties are half. NaN
    without one of each.
    """
    wins = ranks(scores)[right].sum() - right.sum() * (right.sum() + 1) / 2
    return (
        float(wins / (right.sum() * (~right).sum()))
        if right.any() and not right.all()
        else math.nan
    )


def f1(hits, false, missed):
    return 2 * hits / (2 * hits + false + missed) if hits else 0.0


def harmonic_mean(a, b):
    return 2 * a * b / (a + b) if a + b else 0.0


def measured(examples, scores):
    """(labels [n], scores [n]) of the steps that have both. scores: an array [steps] for each
    example.
    """
    pairs = [
        (la, s)
        for e, of in zip(examples, scores)
        for la, s in zip(e.labels, of)
        if la is not None and s == s
    ]
    return np.array(pairs, np.float64).reshape(-1, 2).T


@dataclass
class Judged:
    """The scores of one scorer on labelled chains."""

    threshold: float
    labels: np.ndarray  # [n] of all measured steps
    scores: np.ndarray  # [n]
    spans: list[np.ndarray]  # of each chain: its places among these
    wrong: np.ndarray  # [chains]: number of the first wrong step among the measured ones, -1: none
    said: np.ndarray  # [chains]: the same by the scores
    subjects: tuple[str]  # of each chain: its problem

    @classmethod
    def of(cls, examples, scores, threshold, source=None):
        """`scores`: an array [steps] for each example. source: of which set, None: of all."""
        chosen = [(e, of) for e, of in zip(examples, scores) if source in (None, e.dataset_id)]
        chains = [(e.prompt, *measured([e], [of])) for e, of in chosen]
        subjects, labels, scores = zip(*(chain for chain in chains if len(chain[1])))
        ends = np.cumsum([*map(len, labels)])
        return cls(
            threshold, np.concatenate(labels), np.concatenate(scores), np.split(np.arange(ends[-1]), ends[:-1]),
            np.array([first_below(of_chain, 0.5) for of_chain in labels]),
            np.array([first_below(of_chain, threshold) for of_chain in scores]), subjects,
        )  # fmt: skip

    def measures(self, chains=None):
        """All measures over the steps of some of the chains, by their places; None: of all."""
        chains = np.arange(len(self.spans)) if chains is None else chains
        steps = np.concatenate([self.spans[i] for i in chains])
        labels, scores, wrong, said = (
            self.labels[steps],
            self.scores[steps],
            self.wrong[chains],
            self.said[chains],
        )
        right, passed = labels >= 0.5, scores >= self.threshold
        hits, false, missed = (
            (right & passed).sum(),
            (~right & passed).sum(),
            (right & ~passed).sum(),
        )
        of_wrong = (said == wrong)[wrong >= 0].mean() if (wrong >= 0).any() else math.nan
        of_right = (said == wrong)[wrong < 0].mean() if (wrong < 0).any() else math.nan
        mse, variance = ((scores - labels) ** 2).mean(), labels.var()
        values = {
            "mse": mse,
            "mae": np.abs(scores - labels).mean(),
            "r2": 1 - mse / variance if variance else math.nan,
            "pearson": pearson(scores, labels),
            "spearman": spearman(scores, labels),
            "auc": auc(scores, right),
            "ece": expected_calibration_error(scores, labels),
            "f1": f1(hits, false, missed),
            "negative_f1": f1((~right & ~passed).sum(), missed, false),
            "first_error_accuracy": of_wrong,
            "no_error_accuracy": of_right,
            "processbench_f1": harmonic_mean(of_wrong, of_right),
        }
        return {name: float(value) for name, value in values.items()}


def best_threshold(examples, scores, source=None):
    """The threshold of 0.02 to 0.98 with the best ProcessBench F1; the arguments are those of
    Judged.of.
    """
    thresholds = [i / 50 for i in range(1, 50)]
    return max(
        thresholds,
        key=lambda t: Judged.of(examples, scores, t, source).measures()["processbench_f1"],
    )


def intervals(scorers, draws):
    """({name: {measure: [low, high]}}, the same of the first scorer less each other one): 95 %,
    problems drawn anew.

    scorers: {name: Judged} on the same chains. The draws are the same for all, so the differences
    are paired.
    """
    first, *others = scorers
    of_subject = defaultdict(list)
    for i, subject in enumerate(scorers[first].subjects):
        of_subject[subject].append(i)
    groups, found = list(of_subject.values()), defaultdict(list)
    for drawn in draws_of(len(groups), draws):
        chains = np.concatenate([groups[i] for i in drawn])
        for name, judged in scorers.items():
            found[name].append(judged.measures(chains))
    ends = {
        name: {m: quantiles([draw[m] for draw in of_name]) for m in of_name[0]}
        for name, of_name in found.items()
    }
    differences = {
        other: {
            m: quantiles([a[m] - b[m] for a, b in zip(found[first], found[other])])
            for m in found[first][0]
        }
        for other in others
    }
    return ends, differences


def report(examples, scores, settings, names, fitted_on=None, draws=1000):
    """What is to be said of scores (an array [steps] for each example), with the two baselines
    beside them.

    {"thresholds": {scorer: number}, "measures": {scorer: {measure: value}}, "intervals": the same
    with [low, high], "differences": {baseline: {measure: [low, high]}}}, which are the scores' less
    the baseline's. settings: the [evaluation] table. names: {name of a set: its source}, where
    there are several: then each has a "NAME/processbench_f1", and their mean is the
    "mean_processbench_f1". Raises UserError.
    """
    tuned = settings.tune_threshold_on
    if tuned and tuned not in names:
        raise UserError(
            f"tune_threshold_on {tuned}: no such set; there is {', '.join(names) or 'one set only'}."
        )
    scored = {"scores": scores} | {
        name: baseline_scores(of, examples, fitted_on) for name, of in BASELINES.items()
    }
    result, judged = {"thresholds": {}, "measures": {}}, {}
    for name, of_name in scored.items():
        of_name = [
            np.where(np.isnan(ours), math.nan, of_chain) for ours, of_chain in zip(scores, of_name)
        ]
        threshold = best_threshold(examples, of_name, names[tuned]) if tuned else settings.threshold
        judged[name], result["thresholds"][name] = (
            Judged.of(examples, of_name, threshold),
            threshold,
        )
        measures = judged[name].measures()
        if len(names) > 1:
            of_sets = {
                of: Judged.of(examples, of_name, threshold, source) for of, source in names.items()
            }
            parts = {
                f"{of}/processbench_f1": one.measures()["processbench_f1"]
                for of, one in of_sets.items()
            }
            measures |= parts | {"mean_processbench_f1": float(np.mean(list(parts.values())))}
        result["measures"][name] = measures
    result["intervals"], result["differences"] = intervals(judged, draws)
    return result


def first_below(values, threshold):
    """The index of the first value under the threshold, or -1."""
    return next((i for i, value in enumerate(values) if value < threshold), -1)
