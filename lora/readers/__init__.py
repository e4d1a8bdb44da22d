"""Readers turn files into examples: one small file per format, standard library only (they run before torch loads).

A row of our own formats may have a "weight", a number from 0 on, by which its loss is multiplied.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
import hashlib
from itertools import groupby
import json

from lora.config import DataConfig
from lora.errors import UserError


@dataclass(slots=True)
class Example:
    """One row of somebody's data: a text, a chat, or a prompt with steps and a label for each of them."""

    where: str  # file:line, for messages
    text: str = ""
    messages: list[dict] = field(default_factory=list)  # {"role", "content", ...}
    tools: list[dict] | None = None  # what the chat's template is told of tools
    prompt: str = ""
    steps: list[str] = field(default_factory=list)
    labels: list[float | None] = field(default_factory=list)  # 0..1, or None: no label for this step
    outcome: bool | None = None  # whether the solution's answer is right, where that is known
    weight: float = 1.0  # multiplies the loss of its targets
    terms: str = ""  # why it may not be trained on
    source: int = 0  # which of the paths it was read from

    @property
    def subject(self):
        """What rows must share to belong to the same side of a split: a document, or all before a user is answered."""
        if self.messages:
            roles = [message["role"] for message in self.messages]
            asked = roles.index("user") if "user" in roles else len(roles)
            return json.dumps(self.messages[: roles.index("assistant", asked) if "assistant" in roles[asked:] else None])
        return self.prompt or self.text


def read(paths, task, data=None, first_source=0):
    """The examples of several files for `task` ("lm": texts and chats, "score": steps with labels). Raises UserError.

    `data` is the [data] table of a configuration, which says how some files are read.
    """
    data, examples = data or DataConfig(), []
    for source, path in enumerate(paths, first_source):
        before = len(examples)
        for example in examples_of(path, task, data):
            example.source = source
            examples.append(example)
        if len(examples) == before:
            raise UserError(f"{path}: 0 examples; expected one at least.")
    return examples


def examples_of(path, task, data):
    """Yield the examples of one path, and say how many of its rows are left out, and why."""
    from lora.readers import arithmetic, chat, eobqa, eqasc, files, first_error, math_shepherd, outcomes, pairs, prm800k
    from lora.readers import prmbench, questions, reveal, steps, text

    readers = (chat, questions, steps, pairs, text, prm800k, math_shepherd, first_error)
    readers += (prmbench, eqasc, eobqa, reveal, outcomes)
    if path.startswith("arithmetic:"):
        yield from arithmetic.read(path, task)
        return
    bad, left_out, longest = [], Counter(), data.max_steps_per_example
    for reader, rows in groupby(files.rows(path, bad), lambda pair: reader_for(*pair, task=task, readers=readers, bad=bad)):
        more = reader is not None
        while more:
            try:
                for example in reader.examples(rows, data):
                    if isinstance(example, str):  # why a row is left out
                        left_out[example] += 1
                    else:
                        example.steps, example.labels = example.steps[:longest], example.labels[:longest]
                        yield example
                more = False
            except UserError as error:  # of one row; the rows after it are read as well, so that all bad ones are named
                bad.append(error)
    files.refuse(path, bad)
    if left_out:
        print(f"note: {path}: left out: {', '.join(f'{count} rows ({why})' for why, count in left_out.most_common())}")


def reader_for(where, row, task, readers, bad):
    """The one of `readers` whose form has the keys of the row; None, and the reason added to `bad`, where there is none."""
    fitting = [r for r in readers if any(form <= row.keys() for form in r.FORMS)]
    reader = next((r for r in fitting if r.TASK == task), None)
    if reader is None and fitting:
        found = f"keys {', '.join(row)} in a run of --task {task}"
        bad.append(UserError(f"{where}: {found}; add --task {fitting[0].TASK}, or take other rows."))
    elif reader is None:
        known = "; ".join(", ".join(sorted(form)) for r in readers for form in r.FORMS if r.TASK == task)
        bad.append(UserError(f"{where}: keys found: {', '.join(map(str, row))}; expected one of: {known}."))
    return reader


def read_data(config):
    """(training examples, held-out examples) that a configuration names. Raises UserError."""
    data, task = config.data, config.model.task
    training = read(data.train_paths, task, data)[: data.max_samples]
    for example in training:
        if example.terms:
            raise UserError(f"{example.where}: {example.terms}; name it in eval_data, or set use_reveal and reveal_path.")
    if data.eval_data:
        return training, read(data.eval_paths, task, data)
    training, held_out = split_by_prompt(training, data.eval_fraction)
    return training, held_out + read(data.only_evaluated, task, data, len(data.train_paths))


def split_by_prompt(examples, fraction):
    """(training, held-out) examples; those that share a prompt (or a whole text) stay together, so nothing leaks.

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
        raise UserError(f"{examples[0].where}: all rows have the same prompt, so none can be held out; add --eval_data.")
    return [e for e in examples if e.subject not in held_out], [e for e in examples if e.subject in held_out]


def string(where, name, value):
    """`value` if it is a text that a tokenizer can read."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} is {str(value)[:40]!r}; expected a text that is not empty.")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: {name} holds half of a surrogate pair, which is no character; take it out.")
    return value


def weight(where, row):
    """What the row's "weight" says, by which its loss is multiplied; 1 where it has none."""
    value = row.get("weight", 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise UserError(f"{where}: weight {value!r}; expected a number from 0 on.")
    return float(value)


def label(where, value, label_max):
    """A label as a share of `label_max`, or None for null."""
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= label_max:
        raise UserError(f"{where}: label {value!r}; expected 0..{label_max:g}, true, false or null (see --label_max).")
    return float(value) / (1.0 if isinstance(value, bool) else label_max)
