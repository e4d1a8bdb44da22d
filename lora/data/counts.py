"""Counts of tokenised examples, summed shard by shard, and the line that describes them."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lora.common.errors import UserError
from lora.config.schema import Config


@dataclass
class Counts:
    """Sums over the examples of a part of the data."""

    where: str = ""  # of the first example
    examples: int = 0
    cut: int = 0
    without_target: int = 0
    unprinted: Counter[str] = field(default_factory=Counter)  # by the chat template
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    weighted_targets: int = 0  # whose weight is not 0
    largest_token: int = -1
    labels: int = 0  # in the examples, also where no target was made of them
    target_sum: float = 0.0  # of scores, 0 for a language model
    zeros: int = 0  # scores that are 0
    ones: int = 0  # scores that are 1

    def __post_init__(self) -> None:
        self.unprinted = Counter(self.unprinted)  # JSON has a dict

    def add(self, other: "Counts") -> None:
        for name, value in vars(other).items():
            if name not in ("where", "largest_token"):
                setattr(self, name, getattr(self, name) + value)
        self.where = self.where or other.where
        self.largest_token = max(self.largest_token, other.largest_token)


def part_facts(counts: Counts, seq_lens: np.ndarray, part: str, config: Config) -> dict:
    """Return the facts for `describe_data`. Raises UserError where nothing would be learned."""
    if counts.rows == 0 and config.model.task == "score" and counts.labels == 0:
        mend = "a step scorer learns from labels, so give some steps one"
        raise UserError(f"{counts.where}: no {part} example has a step with a label; {mend}.")
    if counts.rows == 0:
        raise UserError(
            f"{counts.where}: no {part} example has a target within max_length = "
            f"{config.data.max_length}; raise it, or see what becomes of the rows: "
            "python -m lora render FILE."
        )
    if counts.weighted_targets == 0 and part != "eval":  # an evaluation reads no weights
        raise UserError(f"{counts.where}: every {part} example has weight 0; give some more.")
    lengths = np.quantile(seq_lens, (0.5, 0.95, 1.0), method="higher").tolist()
    facts = {**vars(counts), "lengths": lengths}
    del facts["where"]  # a path
    return facts


def describe_data(name: str, facts: dict) -> str:
    """Return a line about a part of the data. `facts` is what `part_facts` returns."""
    counts = f"{facts['examples']} examples in {facts['rows']} sequences"
    median, most, longest = facts["lengths"]
    parts = [
        f"{name}: {counts}, {facts['tokens']} tokens, {facts['targets']} targets",
        f"lengths: median {median}, 95th percentile {most}, maximum {longest}",
    ]
    if facts["labels"]:  # of a scorer; there is a target, or `part_facts` would have refused
        mean = facts["target_sum"] / facts["targets"]
        zeros = facts["zeros"] / facts["targets"]
        ones = facts["ones"] / facts["targets"]
        parts.append(f"labels: mean {mean:.3f}, {zeros:.1%} are 0, {ones:.1%} are 1")
    fates = {"cut": "cut off at max_length", "without_target": "left out, without a target"}
    for key, fate in fates.items():
        if facts[key]:
            share = f"{facts[key] / facts['examples']:.1%}"
            parts.append(f"{facts[key]} examples ({share}) {fate}")
    if facts["unprinted"]:
        unprinted = [f"{what} ({count})" for what, count in facts["unprinted"].items()]
        parts.append(f"left out, as the chat template does not print it: {', '.join(unprinted)}")
    labels_left_out = facts["labels"] - facts["targets"]
    if labels_left_out > 0:  # a language model has targets without labels
        steps = f"{labels_left_out} labelled steps"
        parts.append(f"{steps} left out, because they do not fit max_length")
    return "; ".join(parts)
