"""How well steps are judged, beside two scorers that understand nothing.

AUC, mse and accuracy look good already for a scorer that knows where in a chain errors tend to be, so every figure stands
next to that of one that knows each step's position and length only, and of one that knows its words as well; and with
an interval, from drawing the problems again.

A step is right where its label is at least 0.5, and judged right where its score is at least the threshold. Steps
without a label, or that did not fit into max_length (score NaN), are not measured, by any of the three.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
import hashlib
import math
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from lora.errors import UserError
from lora.metrics import draws_of, first_below, pearson, quantiles, ranks, spearman

BINS = 10
FOLDS = 5
AGGREGATES = {"min": np.min, "product": np.prod, "last": lambda scores: scores[-1], "mean": np.mean}


def auc(scores, right):
    """How often a right step scores above a wrong one, [n] and [n] of bool; ties are half. NaN without one of each."""
    wins = ranks(scores)[right].sum() - right.sum() * (right.sum() + 1) / 2
    return float(wins / (right.sum() * (~right).sum())) if right.any() and not right.all() else math.nan


def calibration(scores, labels):
    """[(mean score, mean label, count)] of the steps in each of BINS equal stretches of 0..1 that has any."""
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    chosen = [place == i for i in range(BINS) if (place == i).any()]
    return [(float(scores[c].mean()), float(labels[c].mean()), int(c.sum())) for c in chosen]


def expected_calibration_error(scores, labels):
    """The mean distance of the two means of `calibration`, weighted by the counts."""
    return sum(abs(said - true) * count for said, true, count in calibration(scores, labels)) / len(scores)


def f1(hits, false, missed):
    return 2 * hits / (2 * hits + false + missed) if hits else 0.0


def harmonic_mean(a, b):
    return 2 * a * b / (a + b) if a + b else 0.0


def measured(examples, scores):
    """(labels [n], scores [n]) of the steps that have both. scores: an array [steps] for each example."""
    pairs = [(la, s) for e, of in zip(examples, scores) for la, s in zip(e.labels, of) if la is not None and s == s]
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
        chosen = [(e, of) for e, of in zip(examples, scores) if source in (None, e.source)]
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
        labels, scores, wrong, said = self.labels[steps], self.scores[steps], self.wrong[chains], self.said[chains]
        right, passed = labels >= 0.5, scores >= self.threshold
        hits, false, missed = (right & passed).sum(), (~right & passed).sum(), (right & ~passed).sum()
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
    """The threshold of 0.02 to 0.98 with the best ProcessBench F1; the arguments are those of Judged.of."""
    thresholds = [i / 50 for i in range(1, 50)]
    return max(thresholds, key=lambda t: Judged.of(examples, scores, t, source).measures()["processbench_f1"])


def intervals(scorers, draws):
    """({name: {measure: [low, high]}}, the same of the first scorer less each other one): 95 %, problems drawn anew.

    scorers: {name: Judged} on the same chains. The draws are the same for all, so the differences are paired.
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
    ends = {name: {m: quantiles([draw[m] for draw in of_name]) for m in of_name[0]} for name, of_name in found.items()}
    differences = {
        other: {m: quantiles([a[m] - b[m] for a, b in zip(found[first], found[other])]) for m in found[first][0]}
        for other in others
    }
    return ends, differences


# ------------------------------------------------------------------------------------------------------- baselines


def place_features(example):
    """For each step, names of what is known of its place and length."""
    count = len(example.steps)
    for i, step in enumerate(example.steps):
        yield [f"at {min(i, 40)}", f"of {min(count, 40)}", f"share {10 * i // count}", f"to end {min(count - i, 10)}",
               f"length {int(2 * math.log2(len(step)))}"]  # fmt: skip


def word_features(example):
    """The same, with the step's words, numbers and signs, and the pairs of neighbours."""
    for step, place in zip(example.steps, place_features(example)):
        words = re.findall(r"[a-z]+|\d+|\S", step.lower())
        yield [*place, *{*words, *map(" ".join, zip(words, words[1:]))}]


BASELINES = {"position and length": place_features, "bag of words": word_features}
SIZE = 2**18  # features are hashed into so many weights


def bags_of(features, examples):
    """The hashed features of each step: a list of tensors for each example."""
    return [[torch.tensor([zlib.crc32(name.encode()) % SIZE for name in names]) for names in features(e)] for e in examples]


def fit(chains):
    """Weights [SIZE, 1] of a logistic regression of the labels on the features of the steps: (bags, example) pairs."""
    pairs = [(bag, label) for bags, e in chains for bag, label in zip(bags, e.labels) if label is not None]
    weights = torch.zeros(SIZE, 1)
    if not pairs:
        return weights
    flat, targets = torch.cat([bag for bag, _ in pairs]), torch.tensor([label for _, label in pairs])
    offsets = torch.tensor([0, *(len(bag) for bag, _ in pairs[:-1])]).cumsum(0)
    optimizer = torch.optim.LBFGS([weights.requires_grad_()], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = F.embedding_bag(flat, weights, offsets, mode="sum")[:, 0]
        total = F.binary_cross_entropy_with_logits(logits, targets) + 2 * weights.square().sum() / len(targets)
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach()


def baseline_scores(features, examples, fitted_on=None):
    """An array [steps] for each example: of a regression on the examples `fitted_on`.

    By default it is fitted on the examples themselves, for each fifth of the problems on the other four.
    """
    chains = list(zip(bags_of(features, examples), examples))
    if fitted_on:
        folds, weights = [0] * len(chains), {0: fit(zip(bags_of(features, fitted_on), fitted_on))}
    else:
        folds = [hashlib.sha256(e.prompt.encode()).digest()[0] % FOLDS for e in examples]
        weights = {fold: fit([chain for chain, own in zip(chains, folds) if own != fold]) for fold in {*folds}}
    said = lambda bags, of: np.array([torch.sigmoid(of[bag].sum()).item() for bag in bags])
    return [said(bags, weights[fold]) for (bags, _), fold in zip(chains, folds)]


# ------------------------------------------------------------------------------------------------------- best of N


def final_answer(example):
    """The last number of the last step, or its text: what a majority is of."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", example.steps[-1].replace(",", ""))
    return float(numbers[-1]) if numbers else example.steps[-1].strip().lower()


def best_of_n(examples, scores):
    """{"min", "product", "last", "mean", "random", "majority", "oracle": (share of right answers, [low, high])}.

    Of the solutions of each problem the one with the best score is taken; problems with one solution are left out, and
    steps that did not fit are, too. Ties share what they are worth.
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
        rankings = {name: [of(s) if len(s) else -1.0 for _, s in candidates] for name, of in AGGREGATES.items()}
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


# ------------------------------------------------------------------------------------------------------- the report


def report(examples, scores, settings, names, fitted_on=None, draws=1000):
    """What is to be said of scores (an array [steps] for each example), with the two baselines beside them.

    {"thresholds": {scorer: number}, "measures": {scorer: {measure: value}}, "intervals": the same with [low, high],
    "differences": {baseline: {measure: [low, high]}}}, which are the scores' less the baseline's. settings: the
    [evaluation] table. names: {name of a set: its source}, where there are several: then each has a
    "NAME/processbench_f1", and their mean is the "mean_processbench_f1". Raises UserError.
    """
    tuned = settings.tune_threshold_on
    if tuned and tuned not in names:
        raise UserError(f"tune_threshold_on {tuned}: no such set; there is {', '.join(names) or 'one set only'}.")
    scored = {"scores": scores} | {name: baseline_scores(of, examples, fitted_on) for name, of in BASELINES.items()}
    result, judged = {"thresholds": {}, "measures": {}}, {}
    for name, of_name in scored.items():
        of_name = [np.where(np.isnan(ours), math.nan, of_chain) for ours, of_chain in zip(scores, of_name)]
        threshold = best_threshold(examples, of_name, names[tuned]) if tuned else settings.threshold
        judged[name], result["thresholds"][name] = Judged.of(examples, of_name, threshold), threshold
        measures = judged[name].measures()
        if len(names) > 1:
            of_sets = {of: Judged.of(examples, of_name, threshold, source) for of, source in names.items()}
            parts = {f"{of}/processbench_f1": one.measures()["processbench_f1"] for of, one in of_sets.items()}
            measures |= parts | {"mean_processbench_f1": float(np.mean(list(parts.values())))}
        result["measures"][name] = measures
    result["intervals"], result["differences"] = intervals(judged, draws)
    return result


def reliability_picture(path, scores, labels):
    """Write a picture of how the labels [n] of steps were, against what the scores [n] said; the bars are the counts."""
    from matplotlib.figure import Figure

    said, true, counts = zip(*calibration(scores, labels))
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.bar(said, [count / len(scores) for count in counts], width=0.04, color="0.85", label="share of the steps")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.plot(said, true, marker="o", label=f"ECE {expected_calibration_error(scores, labels):.3f}")
    axes.set(xlabel="mean score", ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
