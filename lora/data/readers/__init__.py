"""Readers turn the rows of files into examples: one small file per format.

They use the standard library only, because they run before torch is loaded. A reader has

    TASK        "lm" or "score"
    FORMS       sets of keys; it reads a row that has all keys of one of them
    OPTIONAL    the other keys that it reads, where a row has them; None: any may be one
    examples    yields the examples of a row, or the reason why it is left out. REVEAL's reader
                yields pieces of evidence, which `reveal.chains` joins into examples

A row of our own formats may have a "weight", a number from 0 on, by which its loss is multiplied.
Any row may have a "category", a text or an integer, by which eval.py takes means as well.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from types import ModuleType

from lora.common.errors import UserError
from lora.common.printable_text import print_on_rank_zero
from lora.config.schema import DataConfig
from lora.data import arithmetic, files
from lora.data.examples import BLANK, MESSAGE_KEYS, Example, is_blank, read_category
from lora.data.readers import chat, pairs, questions, steps, text

# Where a row has the keys of several forms, the first of these readers reads it. Those of published
# sets come after them, and are imported when none of these fits.
READERS = (chat, questions, steps, pairs, text)
EMPTY = (None, "", [], {})
MAX_BLANK = 0.01  # of the rows of a file


def read(paths: list[str], task: str, data: DataConfig | None = None) -> list[Example]:
    """Read the examples of files and of arithmetic:SPLIT:COUNT. Raises UserError.

    The task is "lm" for texts and chats, and "score" for steps with labels.
    """
    return list(iterate(enumerate(paths), task, data or DataConfig()))


def iterate(
    paths: Iterable[tuple[int, str]],
    task: str,
    data: DataConfig,
    limit: int | None = None,
    notes: bool = True,
) -> Iterator[Example]:
    """Yield the examples of numbered paths; the number becomes their dataset_id. Raises UserError.

    Args:
        limit: number of examples after which nothing more is read.
        notes: whether it is printed how many rows of a file are left out, and which keys.
    """
    total = 0
    for dataset_id, path in paths:
        if total == limit:
            return
        room = None if limit is None else limit - total
        examples: Iterator[Example]
        if path.startswith("arithmetic:"):
            examples = islice(arithmetic.read(path, task), room)
        else:
            examples = read_file(path, task, data, room, notes)
        before = total
        for example in examples:
            if total == limit:  # the last row had more examples than were wanted
                continue
            example.dataset_id = dataset_id
            example.steps = example.steps[: data.max_steps_per_example]
            example.labels = example.labels[: data.max_steps_per_example]
            total += 1
            yield example
        if total == before:
            raise UserError(f"{path}: no examples; expected at least one.")


def read_file(
    path: str, task: str, data: DataConfig, limit: int | None = None, notes: bool = True
) -> Iterator[Example]:
    """Yield the examples of a file, and print how many rows are left out, and why.

    Raises UserError for all bad rows at once, after the last example. No row is read after the
    one that completes `limit` examples.
    """
    bad_rows: list[UserError] = []
    evidence: list[dict] = []
    not_read: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    columns_found: set[str] = set()
    first_blank = ""
    num_rows = num_examples = 0
    for where, row in files.read_rows(path, bad_rows):
        num_rows += 1
        sources: dict[str, str] = {}
        if data.columns:
            from lora.data.readers.columns import with_columns

            row, sources = with_columns(row, data.columns)
            columns_found.update(sources)
        try:
            reader = reader_for(where, row, task, sources)
            unread = keys_not_read(reader, row)
            not_read.update(key for key in unread if key not in sources.values())
            results = list(reader.examples(where, row, data))
        except UserError as error:
            bad_rows.append(error)
            continue
        if BLANK in results:
            first_blank = first_blank or where
        for result in results:
            if isinstance(result, Example):
                num_examples += 1
                result.category = read_category(row)
                not_read.update(keys_of_messages_not_read(result))
                yield result
            elif isinstance(result, str):
                left_out[result] += 1
            else:  # a row of REVEAL
                evidence.append({**result, "category": read_category(row)})
        if limit is not None and num_examples >= limit:
            break
    files.raise_bad_rows(path, bad_rows)
    if evidence:
        from lora.data.readers.published import reveal

        for result in reveal.chains(evidence, data):
            if isinstance(result, str):
                left_out[result] += 1
            else:
                yield result
    if notes:
        absent = []
        for ours, theirs in data.columns.items():
            if ours not in columns_found:
                absent.append(f"--columns {ours}={theirs}")
        print_notes(path, num_rows, absent, left_out, not_read)
    was_read_whole = limit is None or num_examples < limit
    if was_read_whole and left_out[BLANK] > MAX_BLANK * num_rows:
        share = f"{left_out[BLANK]} of {num_rows} rows have a blank message"
        raise UserError(f"{first_blank}: {share}; expected at most 1%. Remove them.")


def print_notes(
    path: str, num_rows: int, absent: list[str], left_out: Counter[str], not_read: Counter[str]
) -> None:
    """Print which --columns no row has, why rows are left out, and which keys are not read."""
    for column in absent:
        print_on_rank_zero(f"note: {path}: {column}: none of its {num_rows:,} rows has it")
    if left_out:
        reasons = [f"{count} rows ({reason})" for reason, count in left_out.most_common()]
        print_on_rank_zero(f"note: {path}: left out: {', '.join(reasons)}")
    if not_read:
        keys = []
        for key, count in not_read.most_common():
            keys.append(f"{key or 'a column without a name'} ({count:,} rows)")
        print_on_rank_zero(f"note: {path}: keys not read: {', '.join(keys)}")


def keys_not_read(reader: ModuleType, row: dict) -> list[str]:
    """Return the keys of a row that have a value and that its reader does not look at."""
    if reader.OPTIONAL is None:
        return []
    read_keys = form_of(reader, row) | reader.OPTIONAL
    if read_category(row):
        read_keys.add("category")
    return [key for key in row if key not in read_keys and row[key] not in EMPTY]


def keys_of_messages_not_read(example: Example) -> set[str]:
    """Return the other keys of a chat's messages that have a value, as messages.KEY."""
    keys: set[str] = set()
    for message in example.messages:
        keys.update(key for key in message.keys() - {*MESSAGE_KEYS} if message[key] not in EMPTY)
    return {f"messages.{key}, unless the base's chat template reads it" for key in keys}


def form_of(reader: ModuleType, row: dict) -> set[str]:
    """Return the keys by which a reader reads a row; empty, where it does not."""
    forms = [form for form in reader.FORMS if form <= row.keys()]
    for form in forms:  # data sets that were joined have blank columns of each other
        if not any(is_blank(row[key]) for key in form):
            return form
    return forms[0] if forms else set()


def readers_that_fit(row: dict, readers: tuple[ModuleType, ...]) -> list[ModuleType]:
    return [reader for reader in readers if form_of(reader, row)]


def preference(reader: ModuleType, row: dict, renamed: Collection[str]) -> tuple[bool, bool]:
    """Return a key by which readers are sorted: blank forms last, forms of --columns first."""
    form = form_of(reader, row)
    is_all_blank = all(is_blank(row[key]) for key in form)
    return is_all_blank, form.isdisjoint(renamed)


def reader_for(where: str, row: dict, task: str, renamed: Collection[str] = ()) -> ModuleType:
    """Return the first reader of `task` with a form whose keys the row has. Raises UserError.

    Forms with a key of `renamed`, which --columns gives the row, come first.
    """
    views = [row]
    if task == "score":
        # Data sets that were joined have null columns of each other, so keys with a value come
        # first. A chat keeps them: an answer that is null is a blank one.
        views = [{key: value for key, value in row.items() if value is not None}, row]
    for view in views:
        fitting = readers_that_fit(view, READERS)
        if all(reader.TASK != task for reader in fitting):
            from lora.data.readers.published import PUBLISHED

            fitting += readers_that_fit(view, PUBLISHED)
        task_readers = [reader for reader in fitting if reader.TASK == task]
        if task_readers:
            # Of equal ones min() takes the first.
            return min(task_readers, key=lambda reader: preference(reader, row, renamed))
    if fitting:
        keys = f"keys {', '.join(row)} in a run of --task {task}"
        raise UserError(f"{where}: {keys}; add --task {fitting[-1].TASK}, or take other rows.")
    from lora.data.readers.advice import why_not_read

    forms: list[set[str]] = []
    for reader in (*READERS, *PUBLISHED):
        if reader.TASK == task:
            forms += reader.FORMS
    raise UserError(f"{where}: {why_not_read(row, forms, task)}")
