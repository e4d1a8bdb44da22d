"""Scorers that understand nothing: what position and length, or a bag of words, tell about a step."""

import hashlib
import math
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F

FOLDS = 5


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
    return [
        [
            torch.tensor([zlib.crc32(name.encode()) % SIZE for name in names])
            for names in features(e)
        ]
        for e in examples
    ]


def fit(chains):
    """Weights [SIZE, 1] of a logistic regression of the labels on the features of the steps: (bags,
    example) pairs.
    """
    pairs = [
        (bag, label)
        for bags, e in chains
        for bag, label in zip(bags, e.labels)
        if label is not None
    ]
    weights = torch.zeros(SIZE, 1)
    if not pairs:
        return weights
    flat, targets = (
        torch.cat([bag for bag, _ in pairs]),
        torch.tensor([label for _, label in pairs]),
    )
    offsets = torch.tensor([0, *(len(bag) for bag, _ in pairs[:-1])]).cumsum(0)
    optimizer = torch.optim.LBFGS(
        [weights.requires_grad_()], max_iter=60, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        logits = F.embedding_bag(flat, weights, offsets, mode="sum")[:, 0]
        total = F.binary_cross_entropy_with_logits(
            logits, targets
        ) + 2 * weights.square().sum() / len(targets)
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach()


def baseline_scores(features, examples, fitted_on=None):
    """An array [steps] for each example: of a regression on the examples `fitted_on`.

    By default it is fitted on the examples themselves, for each fifth of the problems on the other
    four.
    """
    chains = list(zip(bags_of(features, examples), examples))
    if fitted_on:
        folds, weights = [0] * len(chains), {0: fit(zip(bags_of(features, fitted_on), fitted_on))}
    else:
        folds = [hashlib.sha256(e.prompt.encode()).digest()[0] % FOLDS for e in examples]
        weights = {
            fold: fit([chain for chain, own in zip(chains, folds) if own != fold])
            for fold in {*folds}
        }
    said = lambda bags, of: np.array([torch.sigmoid(of[bag].sum()).item() for bag in bags])
    return [said(bags, weights[fold]) for (bags, _), fold in zip(chains, folds)]
