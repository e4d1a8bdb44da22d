"""Readers turn files into examples: one small file per format, standard library only (they run before torch loads)."""

from dataclasses import dataclass, field
import hashlib

from lora.errors import UserError


@dataclass(slots=True)
class Example:
    """One row of somebody's data: either a text, or a prompt with steps and a label for each of them."""

    where: str  # file:line, for messages
    text: str = ""
    prompt: str = ""
    steps: list[str] = field(default_factory=list)
    labels: list[float | None] = field(default_factory=list)  # 0..1, or None: no label for this step

    @property
    def subject(self):
        """What rows must share to belong to the same side of a split."""
        return self.prompt or self.text


def read(paths, task, label_max=1.0):
    """The examples of several files for `task` ("lm": texts, "score": steps with labels). Raises UserError."""
    from lora.readers import arithmetic, files, pairs, steps, text

    examples = []
    for path in paths:
        before = len(examples)
        if path.startswith("arithmetic:"):
            examples += arithmetic.read(path, task)
        else:
            for where, row in files.rows(path):
                fitting = [r for r in (steps, pairs, text) if r.KEYS <= row.keys() or r.OTHER_KEYS <= row.keys()]
                reader = next((r for r in fitting if (r is text) == (task == "lm")), None)
                if reader is None and fitting:
                    needed = "score" if task == "lm" else "lm"
                    raise UserError(f"{where}: keys {', '.join(row)} are for --task {needed}, and the task is {task}.")
                if reader is None:
                    known = "; ".join(", ".join(sorted(r.KEYS)) for r in (steps, pairs, text))
                    raise UserError(f"{where}: keys found: {', '.join(map(str, row))}; expected one of: {known}.")
                examples.append(reader.example(where, row, label_max))
        if len(examples) == before:
            raise UserError(f"{path}: 0 examples.")
    return examples


def read_data(config):
    """(training examples, held-out examples) that a configuration names. Raises UserError."""
    data, task = config.data, config.model.task
    training = read(data.train_data, task, data.label_max)[: data.max_samples]
    if data.eval_data:
        return training, read(data.eval_data, task, data.label_max)
    return split_by_prompt(training, data.eval_fraction)


def split_by_prompt(examples, fraction):
    """(training, held-out) examples; those that share a prompt (or a whole text) stay together, so nothing leaks."""
    texts = {example.subject for example in examples}
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = set(ordered[: max(1, round(fraction * len(ordered)))])
    if held_out == texts:
        raise UserError(f"{examples[0].where}: too few different prompts ({len(texts)}) to hold some out; add --eval_data.")
    return (
        [e for e in examples if e.subject not in held_out],
        [e for e in examples if e.subject in held_out],
    )


def string(where, name, value):
    """`value` if it is a text that a tokenizer can read."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} is {str(value)[:40]!r}; expected a text that is not empty.")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: {name} holds half of a surrogate pair, which is not a character.")
    return value


def label(where, value, label_max):
    """A label as a share of `label_max`, or None for null."""
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= label_max:
        raise UserError(f"{where}: label {value!r}; expected 0..{label_max:g}, true, false or null (see --label_max).")
    return float(value) / (1.0 if isinstance(value, bool) else label_max)
