"""How well generated answers agree with reference answers.

Every measure is a number 0..1 for each answer it applies to; the result for a file is their mean.

    exact_answer       the answer is the reference, ignoring leading and trailing whitespace
    exact_match        the number after the last "####" is that of the reference, where it has one
    rouge1, 2, L       F1 of shared words, of pairs of words, of the longest common subsequence
                       (rouge_score; a Chinese or Japanese character is a word)
    refusal_rate       the answer matches `refusal_pattern`
    refusal_accuracy   ... exactly if the reference does
    citation_rate      the answer holds a match of `citation_pattern`, where the reference does
    citation_accuracy  ... and the same set of them as the reference
    citation_precision the share of the answer's citations that the reference has, where the answer
                       has one: 0 for one that is invented where a refusal was due
    json_validity      the answer is a JSON object with all of `json_keys`, maybe fenced by ```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
import json
import re
from typing import Any
import unicodedata

from lora.common.errors import UserError
from lora.config.schema import DataConfig, EvaluationConfig
from lora.data.examples import Example
from lora.data.readers import read

Measures = dict[str, float]
# A letter or digit of a script with blanks between its words: Latin, Greek, Cyrillic, Armenian or
# Georgian. Other scripts, such as Chinese, are in the ranges that are left out.
LETTER = r"[^\W_\u0590-\u109f\u1100-\u1dff\u2e80-\U0010ffff]"
IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # and kana
ROUGE_WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W_{IDEOGRAPHS}]+")
# A number has blanks or commas only before groups of three digits. Another number, or a sign, after
# it makes it a list, a fraction, a power or a sum.
NUMBER = re.compile(
    r"[$ \t]*[-+\u2212]?[$ \t]*"
    r"(?>[0-9]{1,3}(?:[, \t\u00a0\u202f][0-9]{3}(?![0-9]))+|[0-9]*)(?>(?:\.[0-9]+)?)"
    r"(?![eE \t\u00a0\u202f.,$/^*\u00d7+\u2212-]*[0-9])"
)
FENCE = re.compile(r"```(?:json)?(.*)```", re.DOTALL | re.IGNORECASE)  # of Markdown


@dataclass(slots=True)
class Question:
    """A chat up to the assistant's last answer, and that answer."""

    where: str  # file:line, for messages
    messages: list[dict]
    tools: list[dict] | None
    reference: str
    category: str


def last_question(example: Example) -> Question:
    messages = example.messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    reference = messages[last]["content"]
    return Question(example.where, messages[:last], example.tools, reference, example.category)


def read_questions(path: str, data: DataConfig | None = None) -> list[Question]:
    """Read chats in any form of training; each asks for its last answer. Raises UserError."""
    questions = []
    for example in read([path], "lm", data):
        where = example.where
        if not example.messages:
            raise UserError(f"{where}: a text has no question and no answer; expected a chat.")
        question = last_question(example)
        if not question.messages:
            only_answer = "the chat begins with its only answer"
            raise UserError(f"{where}: {only_answer}; expected a question before it.")
        is_call = bool(example.messages[len(question.messages)].get("tool_calls"))
        if is_call or not without_reasoning(question.reference).strip():
            tool_call = "the last answer is a tool call, or has no text"
            raise UserError(f"{where}: {tool_call}, which nothing here can score.")
        questions.append(question)
    return questions


def check_settings(settings: EvaluationConfig) -> None:
    """Raise UserError for settings by which no answer could be measured as it is meant."""
    if settings.top_p < 1 and settings.temperature == 0:
        greedy = "is for sampling, and temperature 0 does not sample"
        raise UserError(f"top_p = {settings.top_p:g} {greedy}; add --temperature 0.7, say.")
    for name in settings.json_keys:
        if "," in name:
            raise UserError(f"json_keys {name}: expected keys with a space between them.")
    for name in ("refusal_pattern", "citation_pattern"):
        pattern = getattr(settings, name)
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{name} = {pattern!r}: not a regular expression ({error}).") from None


def rouge_scorer() -> Any:
    """Return the scorer of rouge_score; None, and print a note, where it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        print("note: no ROUGE without rouge_score: pip install 'plainlora[eval]'")
        return None
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=RougeTokenizer())


class RougeTokenizer:
    """Words as rouge_score's own tokenizer finds them, but not of the letters a-z alone."""

    def tokenize(self, text: str) -> list[str]:
        return ROUGE_WORD.findall(text.lower())


def score_answer(answer: str, reference: str, settings: EvaluationConfig, rouge: Any) -> Measures:
    """Return the measures that apply to an answer. `rouge` is what `rouge_scorer` returned."""
    answer, reference = without_reasoning(answer), without_reasoning(reference)
    measures: Measures = {"exact_answer": answer.strip() == reference.strip()}
    number = final_number(reference)
    if number is not None:
        measures["exact_match"] = final_number(answer) == number
    if rouge:
        for name, score in rouge.score(reference, answer).items():
            measures[name] = score.fmeasure
    if settings.refusal_pattern:
        refused = refuses(answer, settings)
        measures["refusal_rate"] = refused
        measures["refusal_accuracy"] = refused == refuses(reference, settings)
    if settings.citation_pattern:
        expected, cited = citations(reference, settings), citations(answer, settings)
        if expected:
            measures["citation_rate"] = bool(cited)
            measures["citation_accuracy"] = cited == expected
        if cited:
            measures["citation_precision"] = len(cited & expected) / len(cited)
    if settings.json_keys:
        measures["json_validity"] = has_json_keys(answer, settings.json_keys)
    return {name: float(value) for name, value in measures.items()}


def without_reasoning(text: str) -> str:
    """Return what follows a block of reasoning, which Qwen3 writes even where it is empty.

    Reasoning that did not come to its end has no answer: "".
    """
    _, _, answer = text.rpartition("</think>")
    answer = answer.lstrip()
    return "" if answer.startswith("<think>") else answer


def passes(answer: str, reference: str, settings: EvaluationConfig) -> bool:
    """Return whether an answer to a critical question is acceptable.

    It must have the reference's number, or refuse where the reference refuses, or else contain the
    reference (ignoring case and whitespace), and not as a part of a longer word or number.
    """
    answer, reference = without_reasoning(answer), without_reasoning(reference)
    number = final_number(reference)
    if number is not None:
        return final_number(answer) == number
    if refuses(reference, settings):
        return refuses(answer, settings)
    before = rf"(?<!{LETTER})(?<![0-9][.,])(?<![-\u2212](?=[0-9]))"
    pattern = rf"{before}{re.escape(plain(reference))}(?!{LETTER}|[.,][0-9])"
    return bool(re.search(pattern, plain(answer)))


def plain(text: str) -> str:
    """Return a text in one case, one form of accents, and with single blanks."""
    return unicodedata.normalize("NFC", " ".join(text.casefold().split()))


def mean_scores(rows: Sequence[Measures]) -> Measures:
    """Return the mean of each measure over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(name_values) / len(name_values) for name, name_values in values.items()}


def final_number(text: str) -> Decimal | None:
    """Return the number after the last "####", without "$", commas and spaces; None without one.

    None too for a fraction, a power or several numbers.
    """
    _, mark, after = text.rpartition("####")
    match = NUMBER.match(after)
    if not mark or not match:
        return None
    try:
        return Decimal(re.sub(r"[$,\s]", "", match[0]).replace("\u2212", "-"))
    except InvalidOperation:  # no digit
        return None


def refuses(text: str, settings: EvaluationConfig) -> bool:
    return bool(settings.refusal_pattern and re.search(settings.refusal_pattern, text))


def citations(text: str, settings: EvaluationConfig) -> set[str]:
    return {match[0] for match in re.finditer(settings.citation_pattern, text)}


def has_json_keys(text: str, keys: list[str]) -> bool:
    fenced = FENCE.fullmatch(text.strip())

    def refuse(name: str) -> None:  # NaN and Infinity, which Python reads and JSON does not have
        raise ValueError(name)

    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(keys) <= value.keys()
