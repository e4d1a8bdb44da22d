"""Measures of agreement between scores and labels, beside those that every evaluation of the loop prints."""

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
