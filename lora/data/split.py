"""Which examples a run trains on and which it holds out, decided by hashes of their prompts.

The data is read twice, so that it may be larger than the memory: first it is checked, and hashes of
each example are kept; then the examples are read again, shard by shard.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
import hashlib
from itertools import islice

from lora.common.errors import UserError
from lora.config.schema import Config
from lora.data.examples import Example
from lora.data.readers import iterate

WITHOUT_BAR = 1000  # examples, too few to need a progress bar
SHARD_SIZE = 2**19  # characters of the examples that are tokenised together
KEPT_SIZE = 2**23  # characters of a data set that is kept in memory, and so read once
# Whether it is held out, and an example or a part of one
AssignedExample = tuple[bool, Example]


class Split:
    """The training and the held-out examples of a configuration, in shards.

    Equal prompts or texts have equal hashes, of 64 bits. Of a million different ones, any two have
    the same hash with a probability of 3 in 10^8.
    """

    def __init__(self, config: Config) -> None:
        """Read and check the data. Raises UserError."""
        self.config = config
        self.documents: set[int] = set()  # indices of texts of which only the end is held out
        kept: list[AssignedExample] = []
        total_size = 0
        subjects, contents = array("Q"), array("Q")
        sizes, text_sizes, dataset_ids = array("q"), array("q"), array("i")
        in_held_out_file = bytearray()
        has_chats = False
        for assigned in with_bar(read_assigned(config)):
            is_held_out, example = assigned
            content = str(replace(example, where="", dataset_id=0, category=""))
            subjects.append(hash64(example.subject))
            contents.append(hash64(content))
            sizes.append(len(content))
            text_sizes.append(len(example.text))
            dataset_ids.append(example.dataset_id)
            in_held_out_file.append(is_held_out)
            has_chats = has_chats or bool(example.messages)
            total_size += len(content)
            kept.append(assigned)
            if total_size > KEPT_SIZE:
                kept.clear()

        self.kept = kept if total_size <= KEPT_SIZE else None
        self.shard_sizes = shard_sizes(sizes)
        # Imported when all rows are checked: numpy takes as long as to report a mistake in them.
        from lora.data.hold_out import choose_held_out, count_subjects

        self.is_held_out: Sequence[int] = in_held_out_file  # [examples]
        if not config.data.eval_data:
            self.is_held_out, self.documents = choose_held_out(
                subjects, in_held_out_file, dataset_ids, text_sizes, config.data.eval_fraction
            )
            if not self.documents and sum(self.is_held_out) == sum(in_held_out_file):
                path = config.data.train_paths[0]
                problem = "only one prompt or text, so none can be held out; add --eval_data"
                raise UserError(f"{path}: {problem}.")
        self.facts = {"chats": has_chats, **count_subjects(subjects, contents, self.is_held_out)}
        self.facts["held_out_subjects"] += len(self.documents)

    def shards(self) -> Iterator[list[AssignedExample]]:
        """Yield the examples again, shard by shard."""
        assigned = read_assigned(self.config, notes=False) if self.kept is None else self.kept
        numbered = enumerate(assigned)
        for size in self.shard_sizes:
            shard = []
            for i, (_, example) in islice(numbered, size):
                if i in self.documents:
                    end = int(len(example.text) * (1 - self.config.data.eval_fraction))
                    shard.append((False, replace(example, text=example.text[:end])))
                    shard.append((True, replace(example, text=example.text[end:])))
                else:
                    shard.append((bool(self.is_held_out[i]), example))
            yield shard

    def examples(self, held_out: bool) -> Iterator[Example]:
        """Yield the held-out examples, or those to train on."""
        for shard in self.shards():
            for is_held_out, example in shard:
                if is_held_out == held_out:
                    yield example


def read_assigned(config: Config, notes: bool = True) -> Iterator[AssignedExample]:
    """Yield the examples of the training files, then those of files that are held out as a whole.

    `notes` are those of `iterate`. Raises UserError.
    """
    data, task = config.data, config.model.task
    paths = enumerate(data.train_paths)
    for example in iterate(paths, task, data, data.max_samples, notes):
        if example.terms:
            advice = "name it in eval_data, or set use_reveal and reveal_path"
            raise UserError(f"{example.where}: {example.terms}; {advice}.")
        yield False, example
    # A dataset_id is a position in `eval_paths`, which begin with the training files, if they too
    # are evaluated on.
    first_id = 0 if data.eval_data else len(data.train_paths)
    paths = enumerate(data.held_out_paths, first_id)
    for example in iterate(paths, task, data, notes=notes):
        yield True, example


def with_bar(pairs: Iterator[AssignedExample]) -> Iterator[AssignedExample]:
    """Yield the pairs, with a progress bar where they are many."""
    yield from islice(pairs, WITHOUT_BAR)
    # Imported here: importing it takes as long as reporting a mistake in the first of them.
    from tqdm import tqdm

    bar = tqdm(
        pairs, "reading", unit=" examples", delay=3, disable=None, leave=False, initial=WITHOUT_BAR
    )
    yield from bar


def shard_sizes(sizes: Sequence[int]) -> list[int]:
    """Return the number of examples in each shard, for the characters of each example."""
    counts = []
    count = size = 0
    for example_size in sizes:
        count += 1
        size += example_size
        if size >= SHARD_SIZE:
            counts.append(count)
            count = size = 0
    if count:
        counts.append(count)
    return counts


def hash64(text: str) -> int:
    """Return the first 64 bits of a text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
