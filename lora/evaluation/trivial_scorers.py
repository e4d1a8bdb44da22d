"""Baselines of step scorers: logistic regressions on position and length, or on a bag of words."""

from collections.abc import Callable, Iterator, Sequence
import math
import re
import zlib

import numpy as np
import torch
from torch import Tensor
import torch.nn.functional as F

from lora.data.examples import Example

FOLDS = 5
NUM_WEIGHTS = 2**18  # features are hashed into this many weights
Features = Callable[[Example], Iterator[list[str]]]  # for each step the names of its features


def position_features(example: Example) -> Iterator[list[str]]:
    count = len(example.steps)
    for i, step in enumerate(example.steps):
        yield [
            f"at {min(i, 40)}",
            f"of {min(count, 40)}",
            f"share {10 * i // count}",
            f"to end {min(count - i, 10)}",
            f"length {int(2 * math.log2(len(step)))}",
        ]


def word_features(example: Example) -> Iterator[list[str]]:
    """Yield the position features, and the words, numbers, signs and pairs of neighbours."""
    for step, position_names in zip(example.steps, position_features(example)):
        words = re.findall(r"[a-z]+|\d+|\S", step.lower())
        pairs = [" ".join(pair) for pair in zip(words, words[1:])]
        # Sorted, because the order of a set of strings differs between two processes, and the order
        # of the features decides the last bits of their sums.
        yield position_names + sorted({*words, *pairs})


BASELINES = {"position and length": position_features, "bag of words": word_features}


def hash_features(features: Features, example: Example) -> list[Tensor]:
    """Return for each step the indices of the weights of its features."""
    step_bags = []
    for names in features(example):
        indices = [zlib.crc32(name.encode()) % NUM_WEIGHTS for name in names]
        step_bags.append(torch.tensor(indices))
    return step_bags


def fit_weights(hashed: Sequence[list[Tensor]], examples: Sequence[Example]) -> Tensor:
    """Return the weights, [NUM_WEIGHTS, 1], of a logistic regression of the steps' labels."""
    bags, labels = [], []
    for step_bags, example in zip(hashed, examples):
        for bag, label in zip(step_bags, example.labels):
            if label is not None:
                bags.append(bag)
                labels.append(label)
    weights = torch.zeros(NUM_WEIGHTS, 1)
    if not bags:
        return weights
    flat, targets = torch.cat(bags), torch.tensor(labels)
    offsets = torch.tensor([0, *(len(bag) for bag in bags[:-1])]).cumsum(0)
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = F.embedding_bag(flat, weights, offsets, mode="sum")[:, 0]
        penalty = 2 * weights.square().sum() / len(targets)
        total = F.binary_cross_entropy_with_logits(logits, targets) + penalty
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach()


def baseline_scores(features: Features, examples: Sequence[Example]) -> list[np.ndarray]:
    """Score the steps of each fifth of the problems by a regression on the other four fifths."""
    hashed = [hash_features(features, example) for example in examples]
    # Not by a hash of the problem: hashes decide what is held out, so those of an evaluation may
    # all begin alike.
    problems = dict.fromkeys(example.prompt for example in examples)
    fold_of_problem = {problem: i % FOLDS for i, problem in enumerate(problems)}
    folds = [fold_of_problem[example.prompt] for example in examples]
    weights_of_fold = {}
    for fold in set(folds):
        others = [i for i, fold_of_example in enumerate(folds) if fold_of_example != fold]
        other_examples = [examples[i] for i in others]
        weights_of_fold[fold] = fit_weights([hashed[i] for i in others], other_examples)
    return [
        predict_steps(step_bags, weights_of_fold[fold]) for step_bags, fold in zip(hashed, folds)
    ]


def predict_steps(step_bags: list[Tensor], weights: Tensor) -> np.ndarray:
    return np.array([torch.sigmoid(weights[bag].sum()).item() for bag in step_bags])
