"""Measures of agreement between scores and labels, beside those that every evaluation of the loop
prints.
"""

import math

import numpy as np


def pearson(a, b):
    """Linear correlation of two arrays [n]; NaN where one of them does not vary."""
    a, b = (x - x.mean() for x in (np.asarray(a, np.float64), np.asarray(b, np.float64)))
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm else float("nan")


def spearman(a, b):
    """Correlation of the ranks of two arrays [n]; equal values share the mean of their ranks."""
    return pearson(ranks(a), ranks(b))


def ranks(values):
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def draws_of(count, draws=1000, seed=0):
    """Yields, so many times, the indices [count] of a sample drawn with replacement: the
    bootstrap's.
    """
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.integers(count, size=count)


def quantiles(values):
    """[low, high] between which 95 % of the values lie; NaN where none is finite."""
    return (
        [float(end) for end in np.nanquantile(values, (0.025, 0.975))]
        if np.isfinite(values).any()
        else [math.nan] * 2
    )
