"""Make chats from documents, whose answers quote and cite a passage or refuse.

    python -m lora cite_or_refuse FILE... --output DIR [--seed 42] [--eval_fraction 0.1]

FILE: a text file, or rows with "text"; each file or row is a document. A question shows numbered
passages and the first words of a sentence, and the answer is the rest of that sentence with the
passage's number. In a share of the questions the passage with the answer is not shown, and the
answer is REFUSAL. No language model writes anything here, so every answer is right; it teaches to
look up, to cite and to refuse, not to paraphrase. Writes DIR/train.jsonl and DIR/test.jsonl.
"""

import argparse
from collections.abc import Iterable, Sequence
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

INSTRUCTION = (
    "Answer from the numbered sources only. Quote them and cite the number. "
    "If they do not say it, say so."
)
REFUSAL = "The sources do not say."
QUESTION = 'What follows "{opening}" in the sources?'
MAX_PASSAGES = 3  # of a question
SHARE_REFUSED = 0.3  # of the questions
MAX_PASSAGE_LENGTH = 300  # characters
MIN_WORDS = 8  # of a sentence that is asked for
MAX_CANDIDATES = 100  # passages drawn for a question, of which it shows some

Document = tuple[str, ...]  # its sentences


@dataclass(slots=True)
class Passage:
    """Neighbouring sentences of a document."""

    document: int  # index of the document
    sentences: list[str]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


Question = tuple[str, str, Passage]  # opening and rest of a sentence, and where it stands


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("corpus", nargs="+", metavar="FILE", help="text files, or JSONL, JSON or CSV with a text")
    add("--output", metavar="DIR", required=True, help="folder to write, which must not exist")
    seed = "seed of the split and of the questions (default: 42)"
    add("--seed", type=int, default=42, metavar="N", help=seed)
    fraction = "share of the documents in test.jsonl (default: 0.1)"
    add("--eval_fraction", type=float, default=0.1, metavar="FRACTION", help=fraction)
    arguments = parser.parse_args(argv)
    if Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output} exists; choose another folder.")
    share = arguments.eval_fraction
    if share <= 0 or share >= 1:
        raise UserError(f"--eval_fraction {share}: expected a share between 0 and 1.")
    return arguments


def read_documents(paths: Iterable[str]) -> list[Document]:
    """Read every file or row as a document, each document once. Raises UserError."""
    documents = {}  # a set that keeps the order
    for path in paths:
        for where, row in files.read_rows(path):
            documents[sentences_of(string(where, "text", row.get("text")))] = None
    return list(documents)


def sentences_of(text: str) -> Document:
    """Return the sentences of a text, with single blanks."""
    sentences = []
    # A blank line ends a sentence too, so that a heading stands alone.
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        sentences += re.split(r"(?<=[.!?]) ", joined)
    return tuple(sentence for sentence in sentences if sentence)


def split(
    documents: list[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Return the training documents and the test documents, at least two of each."""
    if len(documents) < 4:  # a question shows passages of other documents beside the right one
        expected = "expected 4 at least, two for training and two for the test"
        raise UserError(f"{len(documents)} documents; {expected}.")

    def order(document: Document) -> bytes:
        return hashlib.sha256(repr((seed, document)).encode()).digest()

    ordered = sorted(documents, key=order)
    num_test = min(max(2, round(fraction * len(ordered))), len(ordered) - 2)
    return ordered[num_test:], ordered[:num_test]


def passages_of(documents: list[Document]) -> list[Passage]:
    """Divide documents into passages; a sentence too long for a passage is left out."""
    passages = []
    for i, document in enumerate(documents):
        passage = Passage(i, [])
        for sentence in document:
            if len(sentence) > MAX_PASSAGE_LENGTH:
                continue
            if len(" ".join([*passage.sentences, sentence])) > MAX_PASSAGE_LENGTH:
                passages.append(passage)
                passage = Passage(i, [])
            passage.sentences.append(sentence)
        if passage.sentences:
            passages.append(passage)
    return passages


def questions_of(passages: list[Passage], documents: list[Document]) -> list[Question]:
    """Return the sentences with an opening that no other sentence of the documents has."""
    everything = "\n".join(" ".join(document) for document in documents)
    questions = []
    for passage in passages:
        for sentence in passage.sentences:
            words = sentence.split(" ")
            half = len(words) // 2
            opening, rest = " ".join(words[:half]), " ".join(words[half:])
            # The question puts it into quotation marks, and brackets are for citations.
            has_marks = re.search(r'["“”\[\]]', sentence)
            if len(words) >= MIN_WORDS and not has_marks and everything.count(opening) == 1:
                questions.append((opening, rest, passage))
    return questions


def make_chats(documents: list[Document], rng: random.Random) -> list[dict]:
    """Return a chat for every question, in random order."""
    passages = passages_of(documents)
    questions = questions_of(passages, documents)
    rng.shuffle(questions)
    num_refused = round(SHARE_REFUSED * len(questions))
    chats = []
    for i, (opening, rest, own_passage) in enumerate(questions):
        candidates = rng.sample(passages, min(len(passages), MAX_CANDIDATES))
        sources = []
        for passage in candidates:
            is_other = passage.document != own_passage.document
            if is_other and rest not in passage.text:
                sources.append(passage.text)
        if i < num_refused:
            sources = sources[:MAX_PASSAGES]
            answer = REFUSAL
        else:
            sources = sources[: MAX_PASSAGES - 1]
            place = rng.randrange(len(sources) + 1)
            sources.insert(place, own_passage.text)
            answer = f"{rest} [{place + 1}]"
        lines = [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
        lines += ["", QUESTION.format(opening=opening)]
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": "\n".join(lines)},
            {"role": "assistant", "content": answer},
        ]
        chats.append({"messages": messages})
    rng.shuffle(chats)
    return chats


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    documents = read_documents(arguments.corpus)
    train, test = split(documents, arguments.eval_fraction, arguments.seed)
    final = Path(arguments.output)
    with atomic_folder(final) as temporary:
        for name, documents in (("train", train), ("test", test)):
            chats = make_chats(documents, random.Random(f"cite or refuse {arguments.seed} {name}"))
            if not chats:
                missing = f"no sentence of {MIN_WORDS} words or more for {name}.jsonl"
                raise UserError(f"{arguments.corpus[0]}: {missing}.")
            lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats]
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            refused = sum(chat["messages"][-1]["content"] == REFUSAL for chat in chats)
            counts = f"{len(documents)} documents, {len(chats)} questions"
            print(f"{final / name}.jsonl: {counts}, {refused} without their answer")
