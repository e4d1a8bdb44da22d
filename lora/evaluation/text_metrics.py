"""Questions with the answers that were hoped for, and how well generated answers agree with them.

Every measure is a number 0..1 for each answer it applies to; the result for a file is their mean.

    exact_answer       the answer is the reference, blanks around it aside
    exact_match        the number after the last "####" is the reference's (where the reference has one)
    rouge1, 2, L       F1 of shared words, pairs of words, longest common subsequence (rouge_score; letters a-z only)
    refusal_rate       the answer matches `refusal_pattern`
    refusal_accuracy   ... exactly if the reference does
    citation_rate      the answer holds a match of `citation_pattern` (where the reference does)
    citation_accuracy  ... and the same set of them as the reference
    json_validity      the answer is a JSON object with all of `json_keys`
"""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
import json
import re

from lora.common.errors import UserError
from lora.data.readers import read


@dataclass(slots=True)
class Question:
    """A chat up to where the assistant is to speak, and what it said there in the data."""

    where: str
    messages: list[dict]
    tools: list[dict] | None
    reference: str


def last_question(example):
    """The Question for the last answer of a chat."""
    last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
    return Question(
        example.where, example.messages[:last], example.tools, example.messages[last]["content"]
    )


def read_questions(path):
    """The Questions of a file of chats in any form that training knows; each asks for its last
    answer. Raises UserError.
    """
    questions = []
    for example in read([path], "lm"):
        if not example.messages:
            raise UserError(
                f"{example.where}: a text has no question and no answer; expected a chat."
            )
        questions.append(last_question(example))
        if not questions[-1].messages:
            raise UserError(
                f"{example.where}: the chat begins with its only answer; expected a question before it."
            )
        if not questions[-1].reference.strip():
            raise UserError(
                f"{example.where}: the last answer is a tool call without text, which nothing here can score."
            )
    return questions


def check_patterns(settings):
    """Raise UserError for a pattern of the [evaluation] table that is no regular expression."""
    for name in ("refusal_pattern", "citation_pattern"):
        try:
            re.compile(getattr(settings, name))
        except re.error as error:
            raise UserError(
                f"{name} = {getattr(settings, name)!r}: not a regular expression ({error})."
            ) from None


def rouge_scorer():
    """rouge_score's scorer, or None, and a note, where it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        print("note: no ROUGE without rouge_score: pip install 'plainlora[eval]'")
        return None
    return RougeScorer(["rouge1", "rouge2", "rougeL"])


def scores(answer, reference, settings, rouge):
    """{measure: 0..1} of one answer, for the measures that apply to it. `rouge`: `rouge_scorer()`."""
    result = {"exact_answer": answer.strip() == reference.strip()}
    number = final_number(reference)
    if number is not None:
        result["exact_match"] = final_number(answer) == number
    if rouge:
        result |= {name: score.fmeasure for name, score in rouge.score(reference, answer).items()}
    if settings.refusal_pattern:
        result["refusal_rate"] = refuses(answer, settings)
        result["refusal_accuracy"] = refuses(answer, settings) == refuses(reference, settings)
    expected = citations(reference, settings) if settings.citation_pattern else set()
    if expected:
        result["citation_rate"] = bool(citations(answer, settings))
        result["citation_accuracy"] = citations(answer, settings) == expected
    if settings.json_keys:
        result["json_validity"] = holds_keys(answer, settings.json_keys)
    return {name: float(value) for name, value in result.items()}


def passes(answer, reference, settings):
    """Whether an answer to a critical question will do: the same number; else a refusal where the
    reference refuses;

    else the reference's text stands in it, whatever its case and blanks, and not within a longer
    word or number.
    """
    number = final_number(reference)
    if number is not None:
        return final_number(answer) == number
    if refuses(reference, settings):
        return refuses(answer, settings)
    plain_answer, plain_reference = (
        " ".join(text.casefold().split()) for text in (answer, reference)
    )
    return bool(re.search(rf"(?<![a-z0-9]){re.escape(plain_reference)}(?![a-z0-9])", plain_answer))


def means(rows):
    """The mean of each measure over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()}


def final_number(text):
    """The number after the last "####", without "$", commas and blanks; None if there is none."""
    _, mark, after = text.rpartition("####")
    match = re.match(r"[-+$0-9., \t]*[0-9]", after) if mark else None
    try:
        return Decimal(re.sub(r"[$, \t]", "", match[0])) if match else None
    except InvalidOperation:  # "1.2.3"
        return None


def refuses(text, settings):
    return bool(settings.refusal_pattern and re.search(settings.refusal_pattern, text))


def citations(text, settings):
    return {match[0] for match in re.finditer(settings.citation_pattern, text)}


def holds_keys(text, keys):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() >= set(keys)
