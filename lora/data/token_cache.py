"""Token cache: a data set is tokenised once, and every later run maps the arrays from disk.

    <cache>/<hash of the data, the settings and the code of lora/data/>/<hash of the tokenizer>/

So an entry is never stale, and any of them may be deleted at any time. Of several processes that
start at once one tokenises. Arrays are mapped and used at once, and meanwhile compared with their
hashes in facts.json; a run that finds one changed ends before its first checkpoint.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
import json
import os
from pathlib import Path
import shutil
import tempfile

from filelock import FileLock
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora.common.atomic_files import atomic_folder
from lora.common.errors import UserError
from lora.config.schema import Config
from lora.data.array_check import ArrayCheck, array_sha256
from lora.data.batches import ARRAYS, Rows, is_target
from lora.data.chat_template import use_chatml
from lora.data.examples import Example
from lora.data.raw_data import RawData, digest
from lora.data.tokenise import Row, TokenisedExample, tokenise

PARTS = ("train", "eval")
CHUNK = 1000  # examples that the tokenizer's threads share at a time


def load_or_tokenise(source: RawData, task) -> tuple[Rows, Rows, dict]:
    """Return the training rows, the held-out rows and the facts of `write_entry`, for a Task."""
    tokenizer = task.tokenizer
    written = tokenizer.backend_tokenizer.to_str()
    settings = (written, tokenizer.chat_template, tokenizer.special_tokens_map)
    max_length = source.config.data.max_length  # "auto" in the folder's name, and a number by now
    with locked(source.folder) as folder:
        entry = folder / digest(settings, max_length, task.causal)
        if entry.is_dir():
            try:
                train, held_out, facts = read_entry(entry)
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                print(f"note: {entry}: damaged ({error}); the data are tokenised again")
                shutil.rmtree(entry)
        if not entry.is_dir():
            write_entry(entry, source, tokenizer, task.causal)
            train, held_out, facts = read_entry(entry)
    if facts["chats"]:
        use_chatml(tokenizer)
    largest_token = max(facts["train"]["largest_token"], facts["eval"]["largest_token"])
    num_embeddings = task.model.get_input_embeddings().num_embeddings
    if largest_token >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(largest_token)
        raise UserError(
            f"base_model {source.config.model.base_model}: its tokenizer writes {token!r} as "
            f"{largest_token}, and its embeddings have {num_embeddings} rows; they do not belong "
            "together, or tokens were added without their rows."
        )
    return train, held_out, facts


def read_entry(entry: Path) -> tuple[Rows, Rows, dict]:
    """Map the arrays of an entry, and begin to check them. Raises ValueError where one is wrong."""
    facts = json.loads((entry / "facts.json").read_bytes())
    arrays = {}
    for part in PARTS:
        for name in ARRAYS:
            arrays[f"{part}_{name}"] = np.load(entry / f"{part}_{name}.npy", mmap_mode="r")
        num_rows, num_tokens = facts[part]["rows"], facts[part]["tokens"]
        for name in ARRAYS:
            expected = {"offsets": num_rows + 1, "dataset_ids": num_rows}.get(name, num_tokens)
            if arrays[f"{part}_{name}"].shape != (expected,):
                raise ValueError(f"{part}_{name} has another length than facts.json says")
    sums = {name: facts["sha256"][name] for name in arrays}
    check = ArrayCheck()
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one process of a machine is enough
        check.start(entry, arrays, sums)
    rows = []
    for part in PARTS:
        of_part = {name: arrays[f"{part}_{name}"] for name in ARRAYS}
        rows.append(Rows(**of_part, check=check))
    return rows[0], rows[1], facts


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Make `folder`, or a temporary one where that is impossible, and lock it for this process."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "lock"))
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
            print(f"note: {problem}; tokenised data is not kept (set PLAINLORA_CACHE)")
            # What is mapped from a temporary folder stays readable when the folder is gone.
            temporary = tempfile.TemporaryDirectory(prefix="plainlora_", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(temporary))
        yield folder


def write_entry(entry: Path, source: RawData, tokenizer: Tokenizer, causal: bool) -> None:
    """Tokenise the data of a run and write it to the folder `entry`."""
    training, held_out = source.examples()
    distinct = {str(replace(example, where="", dataset_id=0, category="")) for example in training}
    subjects = {example.subject for example in training}
    facts: dict = {
        "chats": any(example.messages for example in [*training, *held_out]),
        "repeated": len(training) - len(distinct),  # the same as an earlier training example
        "overlap": len(subjects & {example.subject for example in held_out}),  # in both parts
    }
    facts["sha256"] = {}
    with atomic_folder(entry) as temporary:
        for part, examples in zip(PARTS, (training, held_out)):
            rows, facts[part] = tokenise_examples(examples, tokenizer, causal, source.config, part)
            for name in ARRAYS:
                array = getattr(rows, name)
                facts["sha256"][f"{part}_{name}"] = array_sha256(array)
                save_array(temporary / f"{part}_{name}.npy", array)
        (temporary / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as numpy.save does, which does not always say that a disk is full."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def tokenise_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, causal: bool, config: Config, part: str
) -> tuple[Rows, dict]:
    """Return the rows of examples, and the facts for `describe_data`. Raises UserError."""
    if any(example.messages for example in examples):
        use_chatml(tokenizer)
    facts: dict = dict.fromkeys(("cut", "without_target", "unprinted_reasoning"), 0)
    facts["examples"] = len(examples)

    def rows() -> Iterator[tuple[Row, int]]:
        for example, result in tokenise_in_chunks(examples, tokenizer, causal, config, part):
            facts["cut"] += result.cut
            facts["without_target"] += not result.rows
            facts["unprinted_reasoning"] += result.unprinted_reasoning
            for row in result.rows:
                yield row, example.dataset_id

    table = Rows.from_rows(rows(), config.model.task)
    if len(table) == 0:
        raise UserError(
            f"{examples[0].where}: no {part} example has a target within max_length = "
            f"{config.data.max_length}; raise it, or see what becomes of the rows: "
            "python -m lora render FILE."
        )

    has_target = is_target(table.targets)
    if not table.loss_weights[has_target].any():
        raise UserError(f"{examples[0].where}: every {part} example has weight 0; give some more.")
    targets = table.targets[has_target]
    lengths = np.quantile(np.diff(table.offsets), (0.5, 0.95, 1.0), method="higher")
    facts["rows"] = len(table)
    facts["tokens"] = len(table.tokens)
    facts["targets"] = len(targets)
    facts["largest_token"] = int(table.tokens.max())
    facts["lengths"] = lengths.tolist()
    if config.model.task == "score":
        facts["label_mean"] = targets.mean().item()
        facts["label_shares"] = [(targets == 0).mean().item(), (targets == 1).mean().item()]
        num_labels = sum(len(e.labels) - e.labels.count(None) for e in examples)
        facts["labels_left_out"] = num_labels - len(targets)
    return table, facts


def tokenise_in_chunks(
    examples: Sequence[Example], tokenizer: Tokenizer, causal: bool, config: Config, part: str
) -> Iterator[tuple[Example, TokenisedExample]]:
    """Tokenise examples a chunk at a time, so that only the flat arrays hold all of them."""
    description = f"tokenising {part}"
    count = len(examples)
    with tqdm(total=count, desc=description, unit="example", disable=None, leave=False) as bar:
        for start in range(0, count, CHUNK):
            chunk = examples[start : start + CHUNK]
            results = tokenise(chunk, tokenizer, config.model.task, config.data, causal)
            yield from zip(chunk, results)
            bar.update(len(chunk))
