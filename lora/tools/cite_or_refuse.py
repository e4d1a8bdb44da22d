"""Your documents as questions whose answers quote and cite a passage, or refuse: chats to train and
to test on.

    python -m lora cite_or_refuse CORPUS... --output DIR [--seed 42] [--eval_fraction 0.1]

CORPUS: text files, or rows with "text"; each file or row is a document. A question shows numbered
passages and the first words of a sentence, and the answer is the rest of that sentence with the
passage's number. In a share of the questions the passage with the answer is not shown, and the
answer is REFUSAL. The other passages are of other documents on the same side of the split. No
language model writes anything here, so every answer is right; it teaches to look up, to cite and to
refuse, not to paraphrase. Writes DIR/train.jsonl and DIR/test.jsonl.
"""

from dataclasses import dataclass
import hashlib
import json
from pathlib import Path
import random
import re

from lora.common.atomic_files import atomic_folder
from lora.common.errors import UserError
from lora.config.flags import Parser
from lora.data import files
from lora.data.examples import string

INSTRUCTION = "Answer from the numbered sources only. Quote them and cite the number. If they do not say it, say so."
REFUSAL = "The sources do not say."
QUESTION = 'What follows "{opening}" in the sources?'
SHOWN = 3  # passages, at most
SHARE_REFUSED = 0.3  # of the questions
PASSAGE = 300  # characters a passage may have
WORDS = 8  # that a sentence must have to be asked for
TRIED = 100  # passages, drawn for a question, of which those of other documents may be shown


@dataclass(slots=True)
class Sentence:
    """A sentence that can be asked for."""

    # The words shown in the question; on its side of the split they stand in this sentence only
    opening: str
    rest: str
    document: int
    passage: str


def read_arguments(argv):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "corpus", nargs="+", metavar="CORPUS", help="text files, or JSONL/JSON/CSV rows with text"
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="folder to write, which must not exist"
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="of the split and of what is drawn (default: 42)"
    )
    parser.add_argument(
        "--eval_fraction",
        type=float,
        default=0.1,
        help="share of the documents in test.jsonl (0.1)",
    )
    arguments = parser.parse_args(argv)
    if Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output} exists; choose another folder.")
    if not 0 < arguments.eval_fraction < 1:
        raise UserError(
            f"--eval_fraction {arguments.eval_fraction}: expected a share between 0 and 1."
        )
    return arguments


def read_documents(paths):
    """Every file or row as its sentences, each document once. Raises UserError."""
    texts = [
        string(where, "text", row.get("text")) for path in paths for where, row in files.rows(path)
    ]
    return list(dict.fromkeys(map(sentences_of, texts)))


def sentences_of(text):
    """The sentences of a text with single blanks; a blank line ends one too, so that a heading
    stands alone.
    """
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return tuple(
        sentence
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.!?]) ", paragraph)
        if sentence
    )


def split(documents, fraction, seed):
    """(training documents, test documents), two of each at least: the passages beside the right one
    are of another.
    """
    if len(documents) < 4:
        raise UserError(
            f"{len(documents)} documents; expected 4 at least, two for training and two for the test."
        )
    ordered = sorted(
        documents, key=lambda sentences: hashlib.sha256(repr((seed, sentences)).encode()).digest()
    )
    held_out = min(max(2, round(fraction * len(ordered))), len(ordered) - 2)
    return ordered[held_out:], ordered[:held_out]


def passages_of(document):
    """A document as passages [[sentence, ...], ...] of at most PASSAGE characters; a longer
    sentence is left out.
    """
    passages = []
    for sentence in document:
        if len(sentence) > PASSAGE:
            continue
        if not passages or len(" ".join([*passages[-1], sentence])) > PASSAGE:
            passages.append([])
        passages[-1].append(sentence)
    return passages


def askable(documents):
    """([(number of its document, passage)], [the Sentences that can be asked for])."""
    everything = "\n".join(" ".join(document) for document in documents)
    passages, sentences = [], []
    for number, document in enumerate(documents):
        for passage in passages_of(document):
            passages.append((number, " ".join(passage)))
            for sentence in passage:
                words = sentence.split(" ")
                half = len(words) // 2
                opening, rest = " ".join(words[:half]), " ".join(words[half:])
                # The question quotes it, and brackets cite
                plain = not re.search(r'["“”\[\]]', sentence)
                if len(words) >= WORDS and plain and everything.count(opening) == 1:
                    sentences.append(Sentence(opening, rest, *passages[-1]))
    return passages, sentences


def make_rows(documents, rng):
    """A chat for every sentence that can be asked for, in random order."""
    passages, sentences = askable(documents)
    rng.shuffle(sentences)
    refused = round(SHARE_REFUSED * len(sentences))
    rows = []
    for place, sentence in enumerate(sentences):
        refuses = place < refused
        tried = rng.sample(passages, min(len(passages), TRIED))
        others = [
            passage
            for number, passage in tried
            if number != sentence.document and sentence.rest not in passage
        ]
        sources = others[: SHOWN if refuses else SHOWN - 1]
        if not refuses:
            sources.insert(rng.randrange(len(sources) + 1), sentence.passage)
        numbered = "\n".join(f"[{number}] {source}" for number, source in enumerate(sources, 1))
        answer = REFUSAL if refuses else f"{sentence.rest} [{sources.index(sentence.passage) + 1}]"
        question = f"{numbered}\n\n{QUESTION.format(opening=sentence.opening)}"
        turns = (("system", INSTRUCTION), ("user", question), ("assistant", answer))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    rng.shuffle(rows)
    return rows


def main(argv):
    arguments = read_arguments(argv)
    sides = split(read_documents(arguments.corpus), arguments.eval_fraction, arguments.seed)
    final = Path(arguments.output)
    with atomic_folder(final) as temporary:
        for name, documents in zip(("train", "test"), sides):
            rng = random.Random(f"cite or refuse {arguments.seed} {name}")
            rows = make_rows(documents, rng)
            if not rows:
                raise UserError(
                    f"{arguments.corpus[0]}: no sentence of {WORDS} words or more for {name}.jsonl."
                )
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            refused = sum(row["messages"][-1]["content"] == REFUSAL for row in rows)
            count = (
                f"{len(documents)} documents, {len(rows)} questions, {refused} without their answer"
            )
            print(f"{final / name}.jsonl: {count}")
