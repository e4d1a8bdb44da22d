"""The training and the held-out examples that a configuration names."""

from dataclasses import replace
import hashlib

from lora.common.errors import UserError
from lora.data.readers import read


def read_data(config):
    """(training examples, held-out examples) that a configuration names. Raises UserError."""
    data, task = config.data, config.model.task
    training = read(data.train_paths, task, data)[: data.max_samples]
    for example in training:
        if example.terms:
            raise UserError(
                f"{example.where}: {example.terms}; name it in eval_data, or set use_reveal and reveal_path."
            )
    if data.eval_data:
        return training, read(data.eval_paths, task, data)
    training, held_out = split_by_prompt(training, data.eval_fraction)
    return training, held_out + read(data.only_evaluated, task, data, len(data.train_paths))


def split_by_prompt(examples, fraction):
    """(training, held-out) examples; those that share a prompt (or a whole text) stay together, so
    nothing leaks.

    Of a single document the end is held out.
    """
    subjects = {example.subject for example in examples}
    if len(subjects) == 1 and examples[0].text:
        one = examples[0]
        cut = int(len(one.text) * (1 - fraction))
        return [replace(one, text=one.text[:cut])], [replace(one, text=one.text[cut:])]
    ordered = sorted(subjects, key=lambda subject: hashlib.sha256(subject.encode()).digest())
    held_out = set(ordered[: max(1, round(fraction * len(ordered)))])
    if held_out == subjects:
        raise UserError(
            f"{examples[0].where}: all rows have the same prompt, so none can be held out; add --eval_data."
        )
    return [e for e in examples if e.subject not in held_out], [
        e for e in examples if e.subject in held_out
    ]
