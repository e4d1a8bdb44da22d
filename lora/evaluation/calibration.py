"""Calibration of step scores: does a score of 0.8 mean that 80 % of such steps are right?"""

from pathlib import Path

import numpy as np

from lora.common.atomic_files import atomic_file

BINS = 10


def calibration(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, int]]:
    """Return (mean score, mean label, count) of each of BINS equal parts of 0..1 that has steps."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    points = []
    for i in range(BINS):
        in_bin = bins == i
        if in_bin.any():
            mean_score, mean_label = float(scores[in_bin].mean()), float(labels[in_bin].mean())
            points.append((mean_score, mean_label, int(in_bin.sum())))
    return points


def expected_calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean distance of the two means of `calibration`, weighted by the counts."""
    points = calibration(scores, labels)
    return sum(abs(score - label) * count for score, label, count in points) / len(scores)


def save_reliability_diagram(path: str, scores: np.ndarray, labels: np.ndarray) -> None:
    """Draw mean labels over mean scores, and bars for the share of the steps in each bin."""
    from matplotlib.figure import Figure

    mean_scores, mean_labels, counts = zip(*calibration(scores, labels))
    shares = [count / len(scores) for count in counts]
    error = expected_calibration_error(scores, labels)
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.bar(mean_scores, shares, width=0.04, color="0.85", label="share of the steps")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.plot(mean_scores, mean_labels, marker="o", label=f"ECE {error:.3f}")
    axes.set(xlabel="mean score", ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    kind = Path(path).suffix[1:].lower()
    if kind not in figure.canvas.get_supported_filetypes():
        kind = "png"
    with atomic_file(Path(path)) as temporary:
        figure.savefig(temporary, format=kind, dpi=120, bbox_inches="tight")
