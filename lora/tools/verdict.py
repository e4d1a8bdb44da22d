"""Which of two runs is better, and how sure that is.

Two runs are compared at their best steps, on the validation examples that both were evaluated on:
a 95 % bootstrap interval of the difference of their losses. That says which of two models is
better, not which of two settings, because another seed gives another model. Where runs differ in
nothing but their seed, their spread is included in the interval.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
import json
import math
import statistics

from lora.tools.finished_run import FinishedRun

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def interval(
    losses: Sequence[float], counts: Sequence[int], draws: int = 2000, seed: int = 0
) -> tuple[float, list[float]]:
    """Return the mean loss of the targets, and its 95 % interval [low, high].

    `losses` [examples], or differences of two runs' losses, are summed over the targets of each
    example, whose numbers are `counts` [examples].
    """
    import numpy as np  # see FinishedRun.example_losses

    from lora.evaluation.statistics import bootstrap_samples, interval_95

    sums, targets = np.asarray(losses, np.float64), np.asarray(counts, np.float64)
    samples = bootstrap_samples(len(sums), draws, seed)
    drawn = [sums[sample].sum() / targets[sample].sum() for sample in samples]
    return sums.sum() / targets.sum(), interval_95(drawn)


def spread_of_seeds(runs: Iterable[FinishedRun]) -> tuple[float, int]:
    """Return the standard deviation of the best loss over seeds, and its degrees of freedom.

    Both are 0 where no two runs differ in nothing but their seed.
    """
    losses_of_setting: dict[str, dict[int, float]] = defaultdict(dict)  # {seed: loss}
    for run in runs:
        if run.has_ended and run.best_step is not None:
            setting = json.dumps([{**run.settings, "seed": None}, run.data], sort_keys=True)
            losses_of_setting[setting][run.settings["seed"]] = run.best_loss
    freedom, squares = 0, 0.0
    for losses in losses_of_setting.values():
        freedom += len(losses) - 1
        squares += len(losses) * statistics.pvariance(losses.values())
    if freedom == 0:
        return 0.0, 0
    return math.sqrt(squares / freedom), freedom


def verdict(run: FinishedRun, other: FinishedRun, spread: tuple[float, int]) -> str:
    """Return a line: the loss of `run` minus that of `other`, and what follows from it."""
    title = f"{run.name} minus {other.name}:"
    if loss_name(run) != loss_name(other):
        return f"{title} cannot tell: their losses are not on one scale"
    run_losses = run.example_losses(run.best_step)
    other_losses = other.example_losses(other.best_step)
    shared = [key for key in run_losses if key in other_losses]
    if not shared:
        causes = "(do data, tokenizer, layout or max_length differ?)"
        return f"{title} cannot tell: they share no validation examples of the same tokens {causes}"
    differences = [run_losses[key][0] - other_losses[key][0] for key in shared]
    counts = [run_losses[key][1] for key in shared]
    difference, (low, high) = interval(differences, counts)
    note = "as models; to compare their settings, train more seeds"
    deviation, freedom = spread
    if freedom > 0:
        # The difference of two seeds has twice the variance of one. Chance from the seeds and
        # chance from the examples are independent, so their variances are added.
        chance = STUDENT[min(freedom, len(STUDENT)) - 1] * deviation * math.sqrt(2)
        low = difference - math.hypot(difference - low, chance)
        high = difference + math.hypot(high - difference, chance)
        note = f"standard deviation over seeds {deviation:.5f}"
    if high < 0:
        decision = "better"
    elif low > 0:
        decision = "worse"
    else:
        decision = "cannot tell"
    measured = f"{difference:+.5f} [{low:+.5f}, {high:+.5f}] over {len(shared)} examples"
    return f"{title} {measured}: {decision} ({note})"


def loss_name(run: FinishedRun) -> str:
    """Return what the loss of a run is; losses of different names are not on one scale."""
    return run.settings["score_loss"] if run.settings["task"] == "score" else "cross entropy"
