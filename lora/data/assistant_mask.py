"""Which characters of a rendered chat the assistant said: these are the targets.

Templates strip, drop, reorder and add, so the assistant's text is not searched for in the render.
Instead it is put between two private-use characters and the chat is rendered once more. Without
these marks this render must be the plain one, or it is an error.
"""

from dataclasses import dataclass
from functools import lru_cache
import re

from transformers import PreTrainedTokenizerBase as Tokenizer

from lora.common.errors import UserError
from lora.data.chat_template import Chat, Piece, Span


@dataclass(frozen=True)
class TurnFormat:
    """How a template writes the assistant's turns."""

    ending: str = ""  # what ends all of them alike, if anything does
    prompt_leads_to_answer: bool = False  # the generation prompt is all that precedes an answer


def chat_pieces(
    where: str, messages: list[dict], tools: list | None, tokenizer: Tokenizer
) -> list[Piece]:
    """Render a chat, with spans for what the assistant says and what ends its turns.

    The pieces together are the template's own render. Only where the template ends the last turn
    without any special token, an end token is added. Raises UserError.
    """
    chat = Chat(where, messages, tools, tokenizer)
    turn_format = turn_format_of(tokenizer, tokenizer.chat_template)
    turns = assistant_spans(chat, turn_format)
    spans = [with_ending(chat, span, turn_format.ending) for span in turns]
    text = chat.text
    start, end = spans[-1]
    ends_with_assistant = chat.messages[-1]["role"] == "assistant"
    if ends_with_assistant and tokenizer.eos_token and not chat.specials.search(text, start):
        text = text[:end] + tokenizer.eos_token
        spans[-1] = (start, len(text))
    return chat.split(text, spans)


@lru_cache(maxsize=8)
def turn_format_of(tokenizer: Tokenizer, template: str) -> TurnFormat:
    """Learn from a chat of two turns how the tokenizer's template writes them."""
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        chat = Chat("a chat of two turns", turn + turn, None, tokenizer)
        spans = marked_spans(chat, [1, 3])
        prompt = chat.render(turn[:1], add_generation_prompt=True)
    except UserError:  # the template refuses such a chat
        spans = None
    if spans is None:
        return TurnFormat()

    (first_start, first_end), (_, last_end) = spans
    token_or_character = re.compile(f"{chat.specials.pattern}|.", re.DOTALL)
    after_first = token_or_character.findall(chat.text, first_end)
    after_last = token_or_character.findall(chat.text, last_end)
    ending = ""
    for unit, unit_after_last in zip(after_first, after_last):
        if unit != unit_after_last:
            break
        ending += unit
    between = chat.text[len(prompt) : first_start]
    prompt_leads_to_answer = chat.text.startswith(prompt) and not between.strip()
    return TurnFormat(ending.rstrip(), prompt_leads_to_answer)


def assistant_spans(chat: Chat, turn_format: TurnFormat) -> list[Span]:
    """Return the span of each of the assistant's turns in `chat.text`. Raises UserError."""
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    plain_turns = [i for i in turns if not chat.reasoning(i) and not chat.tool_calls(i)]
    plain_spans = marked_spans(chat, plain_turns) or []
    span_of_turn = dict(zip(plain_turns, plain_spans))
    for i in turns:
        if i not in plain_turns:
            span_of_turn[i] = prompted_span(chat, i, turn_format) or answer_span(chat, i)
        if span_of_turn.get(i) is None:
            template = f"the chat template of {chat.tokenizer.name_or_path}"
            raise chat.error(f"message {i + 1}: where {template} writes it cannot be told")
    return [span_of_turn[i] for i in turns]


def marked_spans(chat: Chat, turns: list[int]) -> list[Span] | None:
    """Return the spans of these messages, by marks around them; None if the marks are moved.

    A template that strips contents must find the blanks outside of the marks. So at the second
    attempt the marks stand around the stripped answers.
    """
    contents = [chat.messages[i]["content"] for i in turns]
    answers = [chat.answer(i) for i in turns]
    for texts in (contents, answers):
        marked = list(chat.messages)
        for i, text in zip(turns, texts):
            content = chat.messages[i]["content"]
            start = content.rfind(text)
            before, after = content[:start], content[start + len(text) :]
            content = f"{before}{chat.begin_mark}{text}{chat.end_mark}{after}"
            marked[i] = {**chat.messages[i], "content": content}
        rendered = chat.render(marked)
        spans = spans_between_marks(rendered, chat.begin_mark, chat.end_mark)
        unmarked = rendered.replace(chat.begin_mark, "").replace(chat.end_mark, "")
        in_spans = [chat.text[start:end].strip() for start, end in spans]
        if unmarked == chat.text and in_spans == answers:
            return spans
    return None


def spans_between_marks(text: str, begin: str, end: str) -> list[Span]:
    """Return what stands between pairs of marks, counted in the text without these pairs."""
    spans = []
    for match in re.finditer(f"{begin}[^{begin}{end}]*{end}", text):
        marks_before = 2 * len(spans)
        spans.append((match.start() - marks_before, match.end() - marks_before - 2))
    return spans


def prompted_span(chat: Chat, i: int, turn_format: TurnFormat) -> Span | None:
    """Return turn i from the end of its generation prompt to its ending, or None if that is not it.

    For turns of which the template writes more than the content: tool calls, reasoning.
    """
    earlier = chat.messages[:i]
    calls = chat.tool_calls(i)
    prompt = chat.render(earlier, add_generation_prompt=True)
    if not turn_format.prompt_leads_to_answer and prompt == chat.render(earlier):
        return None  # the template knows no generation prompt
    if not chat.text.startswith(prompt) or (calls and not turn_format.ending):
        return None

    start = len(prompt)
    if turn_format.ending:
        end = chat.text.find(turn_format.ending, start)
    else:
        match = chat.specials.search(chat.text, start)
        end = match.start() if match else len(chat.text.rstrip())
    if end < 0:
        return None

    expected = [chat.answer(i)]
    for call in calls:
        function = call.get("function") or call
        expected.append(function.get("name", ""))
    is_complete = all(part in chat.text[start:end] for part in expected)
    if is_complete and ends_before(chat, i + 1, (start, end)):
        return start, end
    return None


def ends_before(chat: Chat, i: int, span: Span) -> bool:
    """Return whether the span ends before message i begins, if there is one."""
    start, end = span
    for later in range(i, len(chat.messages)):
        spans = marked_spans(chat, [later])
        if spans:
            return end <= spans[0][0]
        content = chat.messages[later]["content"].strip()
        if content and content in chat.text[start:end]:
            return False
    return True


def answer_span(chat: Chat, i: int) -> Span | None:
    """Return the answer of turn i where the template drops its reasoning and nothing else."""
    if chat.tool_calls(i) or chat.reasoning(i) in chat.text:
        return None
    spans = marked_spans(chat, [i])
    return spans[0] if spans else None


def with_ending(chat: Chat, span: Span, ending: str) -> Span:
    """Extend a span by what ends its turn: `ending`, or else a special token that follows."""
    start, end = span
    if ending and chat.text.startswith(ending, end):
        return start, end + len(ending)
    match = re.compile(rf"\s*(?:{chat.specials.pattern})").match(chat.text, end)
    return start, match.end() if match else end
