"""The training and the held-out examples that a configuration names."""

from dataclasses import replace
import hashlib

from lora.common.errors import UserError
from lora.config.schema import Config
from lora.data.examples import Example
from lora.data.readers import read


def read_data(config: Config) -> tuple[list[Example], list[Example]]:
    """Read the training and the held-out examples of a configuration. Raises UserError."""
    data, task = config.data, config.model.task
    training = read(data.train_paths, task, data)[: data.max_samples]
    for example in training:
        if example.terms:
            advice = "name it in eval_data, or set use_reveal and reveal_path"
            raise UserError(f"{example.where}: {example.terms}; {advice}.")
    if data.eval_data:
        return training, read(data.eval_paths, task, data)
    training, held_out = split_by_prompt(training, data.eval_fraction)
    return training, held_out + read(data.only_evaluated, task, data, len(data.train_paths))


def split_by_prompt(
    examples: list[Example], fraction: float
) -> tuple[list[Example], list[Example]]:
    """Return training and held-out examples. Those that share a prompt or a text stay together.

    The order of the prompts' hashes decides. Of a single document the end is held out.
    """
    subjects = {example.subject for example in examples}
    if len(subjects) == 1 and examples[0].text:
        document = examples[0]
        end = int(len(document.text) * (1 - fraction))
        beginning = replace(document, text=document.text[:end])
        return [beginning], [replace(document, text=document.text[end:])]
    ordered = sorted(subjects, key=lambda subject: hashlib.sha256(subject.encode()).digest())
    held_out = set(ordered[: max(1, round(fraction * len(ordered)))])
    if held_out == subjects:
        problem = "all rows have the same prompt, so none can be held out; add --eval_data"
        raise UserError(f"{examples[0].where}: {problem}.")
    training = [example for example in examples if example.subject not in held_out]
    return training, [example for example in examples if example.subject in held_out]
