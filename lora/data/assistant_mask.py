"""Which characters of a rendered chat the assistant said: these are the targets.

Templates strip, drop, reorder and add, so the assistant's text is not searched for in the render.
Instead it is put between two private-use characters and the chat is rendered once more. Without
these marks this render must be the plain one, or it is an error.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
import re

from transformers import PreTrainedTokenizerBase as Tokenizer

from lora.common.errors import UserError
from lora.data.chat_template import Chat, Piece, Span
from lora.data.examples import Example


@dataclass(frozen=True)
class TurnFormat:
    """How a template writes the assistant's turns."""

    ending: str | None = ""  # the text that ends every turn; "": none is known; None: they differ
    prompt_leads_to_answer: bool = False  # only whitespace parts an answer from its prompt
    prompt: str | None = None  # the generation prompt; "": the template has none
    answers_follow_prompt: bool = True  # False: no answer stands after its generation prompt
    last_ending: str = ""  # the special token after the last turn


def chat_pieces(example: Example, tokenizer: Tokenizer) -> tuple[list[Piece], Counter[str]]:
    """Render a chat, with spans for what the assistant says and what ends its turns.

    The pieces together are the template's own render. Only where the template ends the last turn
    without any special token, an end token is added. Raises UserError.

    Returns:
        The pieces, and what `unprinted_parts` counts.
    """
    chat = Chat(example.where, example.messages, example.tools, tokenizer)
    turn_format = turn_format_of(tokenizer, tokenizer.chat_template)
    turns = chat.assistant_turns()
    spans = [with_ending(chat, span, turn_format) for span in assistant_spans(chat, turn_format)]
    text = chat.text
    start, end = spans[-1]
    ends_with_assistant = chat.messages[-1]["role"] == "assistant"
    if ends_with_assistant and tokenizer.eos_token and not chat.specials.search(text, start):
        if text[end:].strip():
            raise chat.error(f"the template writes {text[end:].strip()[:40]!r} after the last turn")
        text = text[:end] + tokenizer.eos_token
        spans[-1] = (start, len(text))

    weighted_spans = []
    for i, (start, end) in zip(turns, spans):
        weight = example.message_weights[i] if example.message_weights else 1.0
        if weight > 0:
            weighted_spans.append((start, end, weight))
    return chat.split(text, weighted_spans), unprinted_parts(chat, spans)


def unprinted_parts(chat: Chat, spans: list[Span]) -> Counter[str]:
    """Count what the template does not print of a chat: {"tools": 1, "developer messages": 2}.

    `spans` are those of the answers, which may repeat what another message says.
    """
    parts: Counter[str] = Counter()
    if chat.tools and chat.renders_the_same(chat.messages, tools=[]):
        parts["tools"] += 1
    between_answers = chat.text
    for start, end in reversed(spans):
        between_answers = between_answers[:start] + between_answers[end:]
    for i, message in enumerate(chat.messages):
        role, content = message["role"], message["content"].strip()
        if role == "assistant":
            parts["reasoning"] += chat.reasoning(i) not in chat.text
        elif content not in between_answers and chat.drops_content(i):
            parts[f"{role} messages"] += 1
    return +parts  # without zeros


@lru_cache(maxsize=8)
def turn_format_of(tokenizer: Tokenizer, template: str) -> TurnFormat:
    """Learn from a chat of two turns how the tokenizer's template writes them.

    `template` is tokenizer.chat_template, a part of the cache's key because it may be replaced.
    """
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        chat = Chat("a chat of two turns", turn + turn, None, tokenizer)
        spans = marked_spans(chat, [1, 3])
        prompts = [
            chat.render(before, add_generation_prompt=True)
            for before in (turn[:1], turn + turn[:1])
        ]
        without_prompt = chat.render(turn[:1])
    except UserError:  # the template refuses such a chat
        spans = []
    if not spans:
        return TurnFormat()

    (_, first_end), (_, last_end) = spans
    ending = common_ending(chat, first_end, last_end)
    prompt_leads_to_answer = True
    for prompt, (start, _) in zip(prompts, spans):
        between = chat.text[len(prompt) : start]
        if not chat.text.startswith(prompt) or between.strip():
            prompt_leads_to_answer = False
    behind_last = re.compile(rf"\s*(?:{chat.specials.pattern})").match(chat.text, last_end)
    return TurnFormat(
        ending and ending.rstrip(),
        prompt_leads_to_answer,
        prompts[0].removeprefix(without_prompt),
        answers_follow_prompt=any(chat.text.startswith(prompt) for prompt in prompts),
        last_ending=behind_last[0].strip() if behind_last else "",
    )


def common_ending(chat: Chat, first_end: int, last_end: int) -> str | None:
    """Return the text that ends both of two turns, "" where none is known; None if they differ.

    The turns end at these characters of `chat.text`, the last one after the first.
    """
    token_or_character = re.compile(f"{chat.specials.pattern}|.", re.DOTALL)
    after_first = token_or_character.findall(chat.text, first_end)
    after_last = token_or_character.findall(chat.text, last_end)
    ending = ""
    for unit, unit_after_last in zip(after_first, after_last):
        if unit != unit_after_last:
            break
        ending += unit
    specials = rf"(?:{chat.specials.pattern})+"
    match = re.compile(rf"(?:(?!{specials}).)*{specials}", re.DOTALL).match(ending)
    if match:
        return match[0]  # without what follows a turn
    if ending.strip() and chat.text[last_end + len(ending) :].strip():
        return None
    return ending


def assistant_spans(chat: Chat, turn_format: TurnFormat) -> list[Span]:
    """Return the span of each of the assistant's turns in `chat.text`. Raises UserError."""
    turns = chat.assistant_turns()
    plain_turns = [i for i in turns if not chat.reasoning(i) and not chat.tool_calls(i)]
    marked = dict(zip(plain_turns, marked_spans(chat, plain_turns)))
    spans = []
    for i in turns:
        span = None
        if i in marked:
            span = plain_span(chat, i, marked[i], turn_format)
        elif i not in plain_turns:
            span = prompted_span(chat, i, turn_format) or answer_span(chat, i)
        if span is None:
            raise chat.error(f"message {i + 1}: cannot tell where {chat.template} writes it")
        spans.append(span)
    return spans


def plain_span(chat: Chat, i: int, marked: Span, turn_format: TurnFormat) -> Span | None:
    """Return turn i, which has no calls and no reasoning, from the span that marks gave.

    None where the chat has an empty reasoning there, and the span is the answer without it.
    """
    start, end = from_prompt(chat, i, marked, turn_format)
    has_empty_reasoning = chat.messages[i]["content"].strip() != chat.answer(i)
    is_answer_alone = chat.text[start:end].strip() == chat.answer(i)
    if has_empty_reasoning and is_answer_alone and not chat.drops_reasoning(i):
        return None
    return start, end


def marked_spans(chat: Chat, turns: list[int]) -> list[Span]:
    """Return the spans of these messages, by marks around them; none if the marks are moved.

    A template that strips contents must find the whitespace outside of the marks. So at the second
    attempt the marks stand around the stripped answers.
    """
    if not turns:
        return []
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
        if unmarked == chat.text and in_spans == [text.strip() for text in texts]:
            return spans
    return []


def spans_between_marks(text: str, begin: str, end: str) -> list[Span]:
    """Return what stands between pairs of marks, counted in the text without these pairs."""
    spans = []
    for match in re.finditer(f"{begin}[^{begin}{end}]*{end}", text):
        marks_before = 2 * len(spans)
        spans.append((match.start() - marks_before, match.end() - marks_before - 2))
    return spans


def from_prompt(chat: Chat, i: int, span: Span, turn_format: TurnFormat) -> Span:
    """Let turn i begin at the end of its generation prompt, where that leads up to it.

    The model must write what stands between prompt and answer, such as the name of gpt-oss's
    channel. It need not write what the prompt already holds, such as <think>.
    """
    start, end = span
    if turn_format.prompt is not None and chat.text.endswith(turn_format.prompt, 0, start):
        return span  # as nearly always; rendering takes time
    earlier = chat.messages[:i]
    prompt = chat.render(earlier, add_generation_prompt=True)
    has_prompt = prompt != chat.render(earlier) and chat.text.startswith(prompt)
    if has_prompt and len(prompt) <= end:
        return len(prompt), end
    return span


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
    answer_end = end_of_answer(chat, i, start)
    if answer_end < 0 or not (turn_format.ending or chat.answer(i)):
        return None
    if turn_format.ending:
        end = chat.text.find(turn_format.ending, answer_end)
    else:
        # Where the first special token follows the answer: special tokens may stand between
        # reasoning and answer, as those of gpt-oss's channels.
        match = chat.specials.search(chat.text, answer_end)
        end = match.start() if match else len(chat.text.rstrip())
    if end < 0:
        return None

    expected = [chat.answer(i)]
    for call in calls:
        function = call.get("function") or call
        expected.append(function.get("name", ""))
    written = chat.text[start:end]
    is_complete = written.strip() and all(part in written for part in expected)
    if is_complete and ends_before(chat, i + 1, (start, end)):
        return start, end
    return None


def end_of_answer(chat: Chat, i: int, start: int) -> int:
    """Return where the answer of turn i ends, which is at `start` if it is empty; -1 if unknown."""
    if not chat.answer(i):
        return start
    spans = marked_spans(chat, [i])
    return spans[0][1] if spans and spans[0][1] >= start else -1


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
    if chat.tool_calls(i) or not chat.drops_reasoning(i):
        return None
    spans = marked_spans(chat, [i])
    return spans[0] if spans else None


def with_ending(chat: Chat, span: Span, turn_format: TurnFormat) -> Span:
    """Extend a span by what ends its turn: the format's ending, or a special token that follows.

    Raises UserError where the format has an ending and neither is there: a model that does not
    learn to end its turn does not stop.
    """
    start, end = span
    ending = turn_format.ending
    if ending and chat.text.startswith(ending, end):
        return start, end + len(ending)
    match = re.compile(rf"\s*(?:{chat.specials.pattern})").match(chat.text, end)
    is_other_end = match and turn_format.last_ending not in ("", match[0].strip())
    if ending == "" and is_other_end:
        return start, end  # gpt-oss ends its earlier turns with <|end|>, which is no stop token
    if ending != "" and not match:
        usual = repr(ending) if ending else "the same"
        raise chat.error(
            f"{chat.template} does not end a turn with {usual} here as it does elsewhere"
        )
    return start, match.end() if match else end
