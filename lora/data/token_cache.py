"""Token cache: a data set is tokenised once, and every later run maps the arrays from disk.

    <cache>/<hash of the data, the settings and the code of lora/data/>/<hash of the tokenizer>/

So an entry is never stale, and may be deleted at any time. If several processes start at once, one
tokenises and the others wait. It writes shard by shard, so the next run continues an interrupted
one. Arrays are mapped and used at once, while a thread compares them with their hashes in
facts.json. A run that finds a changed array ends before its first checkpoint.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
import json
import multiprocessing
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
from lora.common.operating_system import usable_cores
from lora.config.schema import Config
from lora.data.array_check import ArrayCheck
from lora.data.batches import Rows, array_types, is_target
from lora.data.chat_template import use_chatml
from lora.data.counts import Counts, part_facts
from lora.data.entry_writer import ARRAYS, NAMES, PARTS, Arrays, EntryWriter
from lora.data.examples import Example
from lora.data.raw_data import RawData, digest
from lora.data.split import AssignedExample
from lora.data.tokenise import Row, tokenise

CHUNK = 1000  # examples that the tokenizer's threads share at a time
MANY_SHARDS = 16  # from here on, the time to start processes is little


def load_or_tokenise(raw_data: RawData, task) -> tuple[Rows, Rows, dict]:
    """Return the training rows, the held-out rows and facts about them, for a Task.

    The facts are those of `Split`, under "train" and "eval" those of `part_facts`, and "sha256",
    the hashes of the arrays.
    """
    tokenizer = task.tokenizer
    written = tokenizer.backend_tokenizer.to_str()
    settings = (written, tokenizer.chat_template, tokenizer.special_tokens_map)
    max_length = raw_data.config.data.max_length
    with locked(raw_data.folder) as folder:
        entry = folder / digest(settings, max_length, task.causal)
        if entry.is_dir():
            try:
                train, held_out, facts = read_entry(entry, raw_data.config.model.task)
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                print(f"note: {entry}: damaged ({error}); the data are tokenised again")
                shutil.rmtree(entry)
        if not entry.is_dir():
            write_entry(entry, raw_data, tokenizer, task.causal)
            train, held_out, facts = read_entry(entry, raw_data.config.model.task)
    if facts["chats"]:
        use_chatml(tokenizer)
    largest_token = max(facts["train"]["largest_token"], facts["eval"]["largest_token"])
    num_embeddings = task.model.get_input_embeddings().num_embeddings
    if largest_token >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(largest_token)
        raise UserError(
            f"base_model {raw_data.config.model.base_model}: its tokenizer writes {token!r} as "
            f"{largest_token}, and its embeddings have {num_embeddings} rows; they do not belong "
            "together, or tokens were added without their rows."
        )
    return train, held_out, facts


def read_entry(entry: Path, task: str) -> tuple[Rows, Rows, dict]:
    """Map the arrays of an entry, and begin to check them. Raises ValueError where one is wrong."""
    facts = json.loads((entry / "facts.json").read_bytes())
    check = ArrayCheck()
    tables = []
    for part in PARTS:
        num_rows, num_tokens = facts[part]["rows"], facts[part]["tokens"]
        arrays = {}
        for name, dtype in array_types(task).items():
            arrays[name] = np.memmap(entry / f"{part}_{name}.bin", dtype, "r")
            expected = {"offsets": num_rows + 1, "dataset_ids": num_rows}.get(name, num_tokens)
            if len(arrays[name]) != expected:
                raise ValueError(f"{part}_{name} has another length than facts.json says")
        tables.append(Rows(**arrays, check=check))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one process of a machine is enough
        check.start(entry, {name: facts["sha256"][name] for name in NAMES})
    return tables[0], tables[1], facts


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


def write_entry(entry: Path, raw_data: RawData, tokenizer: Tokenizer, causal: bool) -> None:
    """Tokenise the data of a run, shard by shard, and write it to the folder `entry`.

    An interrupted call leaves finished shards in a temporary folder, which the next one continues.
    """
    config, split = raw_data.config, raw_data.split_data()
    if split.facts["chats"]:
        use_chatml(tokenizer)
    tokenise_one = partial(tokenise_shard, tokenizer=tokenizer, causal=causal, config=config)
    with atomic_folder(entry, resumable=True) as folder, closing(EntryWriter(folder)) as writer:
        total = len(split.shard_sizes)
        shards = islice(split.shards(), writer.num_shards, None)
        results: Iterator[dict]
        # A worker of multiprocessing.Pool is a daemon, which may not start processes.
        is_daemon = multiprocessing.current_process().daemon
        if is_daemon or total - writer.num_shards < MANY_SHARDS:
            results = map(tokenise_one, shards)
        else:
            from lora.data.processes import in_processes

            results = in_processes(tokenise_one, shards, usable_cores())
        done = writer.num_shards
        bar = tqdm(results, "tokenising", total, leave=False, disable=None, initial=done)
        for result in bar:
            writer.append(result)
        facts: dict = dict(split.facts)
        for part in PARTS:
            seq_lens = writer.seq_lens(part)
            facts[part] = part_facts(writer.counts[part], seq_lens, part, config)
        facts["sha256"] = writer.hashes()
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def tokenise_shard(
    shard: list[AssignedExample], tokenizer: Tokenizer, causal: bool, config: Config
) -> dict[str, tuple[Arrays, Counts]]:
    """Return the rows of a shard, and what is counted of them, for each of PARTS."""
    results = {}
    for part in PARTS:
        examples = [example for is_held_out, example in shard if is_held_out == (part == "eval")]
        rows, counts = tokenise_chunks([examples], tokenizer, causal, config)
        results[part] = ({name: getattr(rows, name) for name in ARRAYS}, counts)
    return results


def tokenise_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, causal: bool, config: Config, part: str
) -> tuple[Rows, dict]:
    """Return the rows of examples, and the facts for `describe_data`. Raises UserError."""
    if any(example.messages for example in examples):
        use_chatml(tokenizer)

    starts = range(0, len(examples), CHUNK)
    bar = tqdm(starts, f"tokenising {part}", unit_scale=CHUNK, disable=None, leave=False)
    chunks = (examples[start : start + CHUNK] for start in bar)
    rows, counts = tokenise_chunks(chunks, tokenizer, causal, config)
    return rows, part_facts(counts, np.diff(rows.offsets), part, config)


def tokenise_chunks(
    chunks: Iterable[Sequence[Example]], tokenizer: Tokenizer, causal: bool, config: Config
) -> tuple[Rows, Counts]:
    """Tokenise examples a chunk at a time, so that only the flat arrays hold all of them."""
    task = config.model.task
    counts = Counts()

    def tokenised_rows() -> Iterator[tuple[Row, int]]:
        for chunk in chunks:
            results = tokenise(chunk, tokenizer, task, config.data, causal)
            for example, result in zip(chunk, results):
                counts.where = counts.where or example.where
                counts.examples += 1
                counts.cut += result.cut
                counts.without_target += not result.rows
                counts.unprinted += result.unprinted
                counts.labels += len(example.labels) - example.labels.count(None)
                for row in result.rows:
                    yield row, example.dataset_id

    # This counts the examples, too, while their rows are read: there is no list of all rows.
    table = Rows.from_rows(tokenised_rows(), task)
    has_target = is_target(table.targets)
    targets = table.targets[has_target]
    counts.rows = len(table)
    counts.tokens = len(table.tokens)
    counts.targets = len(targets)
    counts.weighted_targets = int(np.count_nonzero(table.loss_weights[has_target]))
    counts.largest_token = int(table.tokens.max(initial=-1))
    if task == "score":
        counts.target_sum = targets.sum(dtype=np.float64).item()
        counts.zeros = int((targets == 0).sum())
        counts.ones = int((targets == 1).sum())
    return table, counts
