"""Make chats from documents, whose answers quote or cite a passage, or refuse.

    python -m lora cite_or_refuse FILE... --output DIR [--templates FILE...] [--seed 42]

FILE: a text file, or rows with "text", and maybe "title" and "date"; each file or row is a
document. Every chat shows numbered passages, and has one of four categories:

    quotation   what follows the first words of a sentence, in its words
    reference   where these words stand
    refusal     one of these two, and the passage with the answer is not shown
    generic     a question about nothing in particular, which is refused

No language model writes anything here, so every answer is right. The texts around them are those of
cite_or_refuse.toml or another such file. Writes DIR/train.jsonl and DIR/test.jsonl.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
import hashlib
import json
import os
from pathlib import Path
import random
import re

from lora.common.atomic_files import atomic_folder
from lora.common.errors import UserError
from lora.common.toml_json import read_file
from lora.config.flags import Parser
from lora.data import files
from lora.data.examples import require_text

MAX_PASSAGES = 3  # of a question
SHARE_REFUSED = 0.3  # of the questions about a sentence
SHARE_GENERIC = 0.1  # generic questions, as a share of those about a sentence
MAX_PASSAGE_LENGTH = 300  # characters
MIN_WORDS = 8  # of a sentence that is asked for
MAX_CANDIDATES = 100  # passages drawn for a question, of which it shows some
DEFAULT_TEMPLATES = Path(__file__).with_suffix(".toml")
NEEDED = {"quotation_questions": "{opening}", "reference_questions": "{opening}"}
PLACEHOLDER = re.compile(r"\{(\w+)\}")

Templates = dict[str, list[str]]  # the texts of each key


@dataclass(frozen=True, slots=True)
class Document:
    sentences: tuple[str, ...]
    values: dict[str, str]  # where (file:line), title and date, where the row has them


@dataclass(slots=True)
class Passage:
    """Neighbouring sentences of a document."""

    document: Document
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
    templates = "TOML files of texts, one for each language; a chat is made with one of them"
    add("--templates", nargs="+", action="extend", metavar="FILE", help=templates)
    seed = "seed of the split and of the questions (default: 42)"
    add("--seed", type=int, default=42, metavar="N", help=seed)
    fraction = "share of the documents in test.jsonl (default: 0.1)"
    add("--eval_fraction", type=float, default=0.1, metavar="FRACTION", help=fraction)
    arguments = parser.parse_args(argv)
    arguments.output = os.path.expanduser(arguments.output)
    if Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output} exists; choose another folder.")
    share = arguments.eval_fraction
    if not 0 < share < 1:  # nor "nan"
        raise UserError(f"--eval_fraction {share}: expected a share between 0 and 1.")
    return arguments


def read_documents(paths: Iterable[str]) -> list[Document]:
    """Read every file or row as a document, each document once. Raises UserError."""
    documents: dict[tuple[str, ...], Document] = {}
    for path in paths:
        for where, row in files.read_rows(path):
            sentences = sentences_of(require_text(where, "text", row.get("text")))
            values = {"where": where}
            for name in ("title", "date"):
                if row.get(name):
                    values[name] = " ".join(str(row[name]).split())
            documents.setdefault(sentences, Document(sentences, values))
    return list(documents.values())


def read_templates(path: str | Path) -> Templates:
    """Read a file with the keys of cite_or_refuse.toml. Raises UserError."""
    templates, keys = read_file(path), read_file(DEFAULT_TEMPLATES)
    for key in [*keys, *templates]:
        texts = templates.get(key)
        if key not in keys or not isinstance(texts, list) or not texts:
            expected = f"expected a list of texts for each of {', '.join(keys)}"
            raise UserError(f"{path}: {key} = {texts!r}; {expected}.")
        for text in texts:
            if NEEDED.get(key, "") not in require_text(str(path), key, text):
                raise UserError(f"{path}: {key}: {text!r} lacks {NEEDED[key]}.")
    return templates


def draw(texts: Templates, key: str, values: dict[str, str], rng: random.Random) -> str:
    """Return one of the key's texts, with the values of its placeholders. Raises UserError."""
    text = rng.choice(texts[key])
    for name in PLACEHOLDER.findall(text):
        if name not in values:
            problem = f"no {name} for the template {text!r} ({key})"
            where = values.get("where", "--templates")
            raise UserError(f"{where}: {problem}; add it to the row, or change that text.")
    return PLACEHOLDER.sub(lambda match: values[match[1]], text)


def sentences_of(text: str) -> tuple[str, ...]:
    """Return the sentences of a text, with single spaces."""
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
        expected = "expected at least 4: two for training and two for the test"
        raise UserError(f"{len(documents)} documents; {expected}.")

    def order(document: Document) -> bytes:
        return hashlib.sha256(repr((seed, document.sentences)).encode()).digest()

    ordered = sorted(documents, key=order)
    num_test = min(max(2, round(fraction * len(ordered))), len(ordered) - 2)
    return ordered[num_test:], ordered[:num_test]


def passages_of(documents: list[Document]) -> list[Passage]:
    """Divide documents into passages; a sentence too long for a passage is left out."""
    passages = []
    for document in documents:
        passage = Passage(document, [])
        for sentence in document.sentences:
            if len(sentence) > MAX_PASSAGE_LENGTH:
                continue
            if len(" ".join([*passage.sentences, sentence])) > MAX_PASSAGE_LENGTH:
                passages.append(passage)
                passage = Passage(document, [])
            passage.sentences.append(sentence)
        if passage.sentences:
            passages.append(passage)
    return passages


def questions_of(passages: list[Passage], documents: list[Document]) -> list[Question]:
    """Return the sentences with an opening that no other sentence of the documents has."""
    everything = "\n".join(" ".join(document.sentences) for document in documents)
    questions = []
    for passage in passages:
        for sentence in passage.sentences:
            words = sentence.split(" ")
            half = len(words) // 2
            opening, rest = " ".join(words[:half]), " ".join(words[half:])
            # The question puts it into quotation marks, and brackets are for citations.
            has_marks = re.search(r'["“”„«»\[\]]', sentence)
            if len(words) >= MIN_WORDS and not has_marks and everything.count(opening) == 1:
                questions.append((opening, rest, passage))
    return questions


def make_chats(
    documents: list[Document], templates: list[Templates], rng: random.Random
) -> list[dict]:
    """Return chats in random order: one for every question about a sentence, and generic ones."""
    passages = passages_of(documents)
    questions = questions_of(passages, documents)
    rng.shuffle(questions)
    num_refused = round(SHARE_REFUSED * len(questions))
    chats = []
    for i, (opening, rest, own_passage) in enumerate(questions):
        texts = rng.choice(templates)
        category = rng.choice(("quotation", "reference"))
        values = {"opening": opening, "rest": rest, "sentence": f"{opening} {rest}"}
        values.update(own_passage.document.values)
        question = draw(texts, f"{category}_questions", values, rng)
        shown = []
        for passage in rng.sample(passages, min(len(passages), MAX_CANDIDATES)):
            is_other = passage.document is not own_passage.document
            if is_other and rest not in passage.text:
                shown.append(passage)
        if i < num_refused:
            category = "refusal"
            shown = shown[:MAX_PASSAGES]
        else:
            shown = shown[: MAX_PASSAGES - 1]
            place = rng.randrange(len(shown) + 1)
            shown.insert(place, own_passage)
            values["number"] = str(place + 1)
        answer = draw(texts, f"{category}_answers", values, rng)
        chats.append(make_chat(texts, shown, question, answer, rng) | {"category": category})

    for _ in range(round(SHARE_GENERIC * len(questions))):
        texts = rng.choice(templates)
        shown = rng.sample(passages, min(len(passages), MAX_PASSAGES))
        question = draw(texts, "generic_questions", {}, rng)
        answer = draw(texts, "generic_answers", {}, rng)
        chats.append(make_chat(texts, shown, question, answer, rng) | {"category": "generic"})
    rng.shuffle(chats)
    return chats


def make_chat(
    texts: Templates, shown: list[Passage], question: str, answer: str, rng: random.Random
) -> dict:
    lines = []
    for number, passage in enumerate(shown, 1):
        values = {**passage.document.values, "number": str(number), "text": passage.text}
        lines.append(draw(texts, "sources", values, rng))
    lines += ["", question]
    messages = [
        {"role": "system", "content": draw(texts, "instructions", {}, rng)},
        {"role": "user", "content": "\n".join(lines)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages}


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv)
    templates = [read_templates(path) for path in arguments.templates or [DEFAULT_TEMPLATES]]
    documents = read_documents(arguments.corpus)
    train, test = split(documents, arguments.eval_fraction, arguments.seed)
    final = Path(arguments.output)
    with atomic_folder(final) as temporary:
        for name, part in (("train", train), ("test", test)):
            rng = random.Random(f"cite or refuse {arguments.seed} {name}")
            chats = make_chats(part, templates, rng)
            if not chats:
                missing = f"no sentence of {MIN_WORDS} words or more for {name}.jsonl"
                raise UserError(f"{arguments.corpus[0]}: {missing}.")
            lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats]
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts = sorted(Counter(chat["category"] for chat in chats).items())
            listed = ", ".join(f"{count} {category}" for category, count in counts)
            total = f"{len(part)} documents, {len(chats)} questions"
            print(f"{final / name}.jsonl: {total} ({listed})")
