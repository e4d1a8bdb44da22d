"""Calibration of step scores: does a score of 0.8 mean that 80 % of such steps are right?"""

import numpy as np

BINS = 10


def calibration(scores, labels):
    """[(mean score, mean label, count)] of the steps in each of BINS equal stretches of 0..1 that
    has any.
    """
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    chosen = [place == i for i in range(BINS) if (place == i).any()]
    return [(float(scores[c].mean()), float(labels[c].mean()), int(c.sum())) for c in chosen]


def expected_calibration_error(scores, labels):
    """The mean distance of the two means of `calibration`, weighted by the counts."""
    return sum(abs(said - true) * count for said, true, count in calibration(scores, labels)) / len(
        scores
    )


def reliability_picture(path, scores, labels):
    """Write a picture of how the labels [n] of steps were, against what the scores [n] said; the
    bars are the counts.
    """
    from matplotlib.figure import Figure

    said, true, counts = zip(*calibration(scores, labels))
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.bar(
        said,
        [count / len(scores) for count in counts],
        width=0.04,
        color="0.85",
        label="share of the steps",
    )
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.plot(said, true, marker="o", label=f"ECE {expected_calibration_error(scores, labels):.3f}")
    axes.set(xlabel="mean score", ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
