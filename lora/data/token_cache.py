"""Token store: a data set is tokenised once, and every later run maps the arrays from disk.

    <cache>/<hash of the data, the settings and the code of lora/data/>/<hash of the tokenizer and its template>/

So an entry is never stale, and any of them may be deleted at any time. Of several processes that
start at once one tokenises, and the others wait for it.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
import fcntl
import json
from pathlib import Path
import tempfile

import numpy as np
from tqdm import tqdm

from lora.common.atomic_files import atomic_folder
from lora.common.errors import UserError
from lora.data.batches import ARRAYS, Rows, is_target
from lora.data.chat_template import use_chatml
from lora.data.raw_data import digest
from lora.data.tokenise import tokenise

CHUNK = 1000  # examples that the tokenizer's threads share at a time


def load_or_tokenise(source, task):
    """(training Rows, held-out Rows, facts) of a Source for a Task. facts: what `tokenise_examples` says of
    each part, and

    "overlap", the number of prompts or texts that are in both, "repeated", of training examples
    that are there before, and "chats", whether there are any.
    """
    config, tokenizer = source.config, task.tokenizer
    settings = (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
    )
    key = digest(settings, task.causal)
    with locked(source.folder) as folder:
        if not (folder / key).is_dir():
            write(source, task, folder, key)
        facts = json.loads((folder / key / "facts.json").read_text())
        parts = [
            Rows(*(np.load(folder / key / f"{part}_{n}.npy", mmap_mode="r") for n in ARRAYS))
            for part in ("train", "eval")
        ]
    if facts["chats"]:
        use_chatml(tokenizer)
    largest, room = (
        max(facts[part]["largest_token"] for part in ("train", "eval")),
        task.model.get_input_embeddings(),
    )
    if largest >= room.num_embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"base_model {config.model.base_model}: its tokenizer writes {token!r} as {largest}, and its embeddings have "
            f"{room.num_embeddings} rows; they do not belong together, or tokens were added without their rows."
        )
    return *parts, facts


@contextmanager
def locked(folder):
    """`folder`, made if need be, while no other process has it; a temporary one where it cannot be
    made.

    What is mapped from a temporary folder stays readable when the folder is gone.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "w"))
        except OSError as error:
            print(
                f"note: {folder}: {error.strerror}; tokenised data is not kept (set PLAINLORA_CACHE)"
            )
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plainlora_")))
            lock = stack.enter_context(open(folder / "lock", "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def write(source, task, folder, key):
    examples = source.examples()
    facts = {"chats": any(example.messages for part in examples for example in part)}
    facts["repeated"] = len(examples[0]) - len(
        {str(replace(example, where="", dataset_id=0)) for example in examples[0]}
    )
    facts["overlap"] = len(
        set.intersection(*({example.subject for example in part} for part in examples))
    )
    with atomic_folder(folder / key) as temporary:
        for name, part in zip(("train", "eval"), examples):
            rows, facts[name] = tokenise_examples(part, task, source.config, name)
            for array in ARRAYS:
                np.save(temporary / f"{name}_{array}.npy", getattr(rows, array))
        (temporary / "facts.json").write_text(json.dumps(facts))


def tokenise_examples(examples, task, config, name):
    """(Rows, what is to be said of them) of examples. Raises UserError where no row has a target."""
    max_length, kind, tokenizer = config.data.max_length, config.model.task, task.tokenizer
    if any(example.messages for example in examples):
        use_chatml(tokenizer)
    facts = {"examples": len(examples), "cut": 0, "without_target": 0}

    def rows():
        with tqdm(
            total=len(examples),
            desc=f"tokenising {name}",
            unit="example",
            disable=None,
            leave=False,
        ) as bar:
            for start in range(0, len(examples), CHUNK):
                chunk = examples[start : start + CHUNK]
                for example, rendered in zip(
                    chunk, tokenise(chunk, tokenizer, kind, config.data, task.causal)
                ):
                    facts["cut"] += rendered.cut
                    facts["without_target"] += not rendered.rows
                    yield from ((row, example.dataset_id) for row in rendered.rows)
                bar.update(len(chunk))

    table = Rows.from_rows(rows(), kind)
    if not len(table):
        raise UserError(
            f"{examples[0].where}: no {name} example has a target within max_length = {max_length}; raise it, or see what "
            "becomes of the rows: python -m lora render FILE."
        )
    targets = table.targets[is_target(table.targets)]
    facts |= {"rows": len(table), "tokens": len(table.tokens), "targets": len(targets)}
    facts["largest_token"] = int(table.tokens.max())
    facts["lengths"] = np.quantile(
        np.diff(table.offsets), (0.5, 0.95, 1.0), method="higher"
    ).tolist()
    if kind == "score":
        facts["label_mean"] = targets.mean().item()
        facts["label_shares"] = [(targets == 0).mean().item(), (targets == 1).mean().item()]
        facts["labels_left_out"] = sum(
            label is not None for e in examples for label in e.labels
        ) - len(targets)
    return table, facts
