"""Statistics that the evaluation of scores and the comparison of runs share."""

from collections.abc import Iterator, Sequence
import math

import numpy as np


def varies(values: np.ndarray) -> bool:
    """Return whether there are two values; the variance of equal ones may be rounded above 0."""
    return bool(np.ptp(values) > 0)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Return the linear correlation of two arrays [n]; NaN where one of them does not vary."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (varies(a) and varies(b)):
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of the ranks of two arrays [n]."""
    return pearson(ranks(a), ranks(b))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of values, from 1 on; equal values share the mean of their ranks."""
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def bootstrap_samples(count: int, draws: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the indices of samples of the bootstrap, drawn with replacement, each [count].

    There are none of a single value: all would be alike, and say that nothing is left to chance.
    """
    if count < 2:
        return
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.integers(count, size=count)


def interval_95(values: Sequence[float]) -> list[float]:
    """Return [low, high], between which 95 % of the values lie; NaN where none is finite."""
    if not np.isfinite(values).any():
        return [math.nan, math.nan]
    low, high = np.nanquantile(values, (0.025, 0.975))
    return [float(low), float(high)]
