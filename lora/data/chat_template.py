"""A chat as its template writes it, and which of its characters the assistant said.

Templates differ in what they strip, drop, reorder and add, so where the assistant's text went is
not guessed from the result: the text is wrapped in two private-use characters, the chat is rendered
once with the tokenizer's own template, and what stands between the two is the assistant's. Taking
them out again must give the plain render, or it is an error.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
import json
import re
import signal
import threading

from jinja2 import TemplateError

from lora.common.errors import UserError

# For tokenizers that bring no template. Where <|im_end|> is not one of their tokens, the end token
# they know ends a turn.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + 'TURN_END\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Seconds for one chat; a template is a program that came with somebody's tokenizer
LONGEST_RENDER = 10.0
MOST_ADDED = 2**20  # characters a template may write beside ten times what it is given
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which data sets keep it


@dataclass(slots=True)
class Piece:
    """A stretch of text that is tokenised by itself."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)  # characters that are targets
    literal: bool = False  # a special token written in it is mere text
    label: float | None = None  # of the step that ends with it


@contextmanager
def time_limit(seconds):
    """Raises TimeoutError in the block once it has taken so long; in the main thread, the only one
    that can be told.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def use_chatml(tokenizer):
    """Give a tokenizer without a chat template ChatML, and say so. Raises UserError."""
    if not tokenizer.chat_template:
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if not end:
            raise UserError(
                f"{tokenizer.name_or_path}: no chat template and no end token, so no turn can be ended."
            )
        tokenizer.chat_template = CHATML.replace("TURN_END", end)
        print(f"the tokenizer has no chat template: using ChatML, with {end} at the end of a turn")


def chat_pieces(where, messages, tools, tokenizer):
    """The chat as pieces, whose spans are what the assistant says and what ends its turns. Raises
    UserError.

    Together they are the template's own render, but for an end token where the template ends the
    last turn with none.
    """
    chat = Chat(where, messages, tools, tokenizer)
    ending, straight = turn_habits(tokenizer, tokenizer.chat_template)
    spans = [chat.with_ending(span, ending) for span in chat.assistant_spans(ending, straight)]
    text, (start, end) = chat.text, spans[-1]
    if (
        tokenizer.eos_token
        and chat.messages[-1]["role"] == "assistant"
        and not chat.specials.search(text, start)
    ):
        text = text[:end] + tokenizer.eos_token
        spans[-1] = (start, len(text))
    return chat.split(text, spans)


def prompt_pieces(where, messages, tools, tokenizer):
    """The chat up to where the assistant is to speak, as pieces."""
    chat = Chat(where, messages, tools, tokenizer)
    return chat.split(chat.render(chat.messages, add_generation_prompt=True), [])


@lru_cache(maxsize=8)
def turn_habits(tokenizer, template):
    """(what ends every assistant turn alike, or "", whether a generation prompt leads straight to
    the answer).
    """
    say = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        chat = Chat("a chat of two turns", say + say, None, tokenizer)
        (start, first), (_, last) = chat.marked_spans([1, 3])
        prompt = chat.render(say[:1], add_generation_prompt=True)
    except (UserError, TypeError):  # it refuses such a chat, or moves the marks
        return "", False
    units = re.compile(f"{chat.specials.pattern}|.", re.DOTALL)
    common = []
    for one, other in zip(units.findall(chat.text, first), units.findall(chat.text, last)):
        if one != other:
            break
        common.append(one)
    return "".join(common).rstrip(), chat.text.startswith(prompt) and not chat.text[
        len(prompt) : start
    ].strip()


class Chat:
    """A chat, rendered. In `text`, special tokens that somebody wrote stand as one private-use
    character each.
    """

    def __init__(self, where, messages, tools, tokenizer):
        self.where, self.tokenizer = where, tokenizer
        special = sorted(
            (t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
            key=len,
            reverse=True,
        )
        self.specials = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        written = json.dumps([messages, tools], ensure_ascii=False)
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in written)
        self.begin, self.end = next(free), next(free)
        self.literals = defaultdict(lambda: next(free))  # special token -> what stands for it
        self.messages, self.tools = self.without_specials(messages), self.without_specials(tools)
        self.text = self.render(self.messages)
        for special, mark in self.literals.items():
            if f"\\u{ord(mark):x}" in self.text:
                raise self.error(
                    f"the chat template of {tokenizer.name_or_path} escapes what stands for {special}"
                )

    def without_specials(self, value):
        """`value` with a character for every special token, in all texts of its lists and dicts."""
        if isinstance(value, str):
            return self.specials.sub(lambda match: self.literals[match[0]], value)
        if isinstance(value, dict):
            return {key: self.without_specials(part) for key, part in value.items()}
        return [self.without_specials(part) for part in value] if isinstance(value, list) else value

    def render(self, messages, add_generation_prompt=False):
        name = self.tokenizer.name_or_path
        try:
            with time_limit(LONGEST_RENDER):
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=self.tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise self.error(f"the chat template of {name} refuses it: {error}") from None
        except (TimeoutError, MemoryError) as error:
            raise self.error(
                f"the chat template of {name} does not come to an end ({type(error).__name__})"
            ) from None
        if len(text) > MOST_ADDED + 10 * len(str(messages)):
            raise self.error(f"the chat template of {name} makes {len(text):,} characters of it")
        return text

    def error(self, problem):
        return UserError(f"{self.where}: {' '.join(problem.split())}.")

    def assistant_spans(self, ending, straight):
        """(start, end) in `text` of what the assistant says, for each of its turns. Raises
        UserError.
        """
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        plain = [
            i for i in turns if not self.reasoning(i) and not self.messages[i].get("tool_calls")
        ]
        spans = dict(zip(plain, self.marked_spans(plain) or []))
        for i in turns:
            if i not in plain:
                spans[i] = self.prompted_span(i, ending, straight) or self.answer_span(i)
            if not spans.get(i):
                name = self.tokenizer.name_or_path
                raise self.error(
                    f"message {i + 1}: where the chat template of {name} writes it cannot be told"
                )
        return [spans[i] for i in turns]

    def reasoning(self, i):
        """What message i says before its answer: in its content, up to </think>, or under a key of
        its own.
        """
        inside, _, _ = self.messages[i]["content"].rpartition("</think>")
        apart = (
            text
            for text in map(self.messages[i].get, REASONING)
            if isinstance(text, str) and text.strip()
        )
        return inside.replace("<think>", "").strip() or next(apart, "")

    def answer(self, i):
        return self.messages[i]["content"].rpartition("</think>")[2].strip()

    def marked_spans(self, turns):
        """(start, end) of what these messages say, by the marks around it; None if the template
        moves the marks.

        A template that strips contents must find the blanks outside of the marks, so they stand
        there at second try.
        """
        answers = [self.answer(i) for i in turns]
        for texts in ([self.messages[i]["content"] for i in turns], answers):
            marked = list(self.messages)
            for i, text in zip(turns, texts):
                content = marked[i]["content"]
                start = content.rfind(text)
                before, after = content[:start], content[start + len(text) :]
                marked[i] = marked[i] | {"content": f"{before}{self.begin}{text}{self.end}{after}"}
            parts = re.split(
                f"({self.begin}[^{self.begin}{self.end}]*{self.end})", self.render(marked)
            )
            ends = list(
                accumulate(len(part) - 2 * (number % 2) for number, part in enumerate(parts))
            )
            spans = list(zip(ends[0::2], ends[1::2]))
            unmarked = "".join(parts).replace(self.begin, "").replace(self.end, "")
            if unmarked == self.text and [self.text[a:b].strip() for a, b in spans] == answers:
                return spans
        return None

    def prompted_span(self, i, ending, straight):
        """(start, end) of turn i, from the end of its generation prompt to the first ending; None
        if that is not it.

        For turns of which the template writes more than the content (tool calls, reasoning).
        """
        calls = self.messages[i].get("tool_calls") or []
        prompt = self.render(self.messages[:i], add_generation_prompt=True)
        # Or the template knows no generation prompt
        prompts = straight or prompt != self.render(self.messages[:i])
        if not prompts or not self.text.startswith(prompt) or (calls and not ending):
            return None
        if ending:
            end = self.text.find(ending, len(prompt))
        else:
            match = self.specials.search(self.text, len(prompt))
            end = match.start() if match else len(self.text.rstrip())
        said = self.text[len(prompt) : end]
        names = [(call.get("function") or call).get("name", "") for call in calls]
        whole = end >= 0 and all(part in said for part in (self.answer(i), *names))
        return (len(prompt), end) if whole and self.ends_before(i + 1, len(prompt), end) else None

    def ends_before(self, i, start, end):
        """Whether the stretch of `text` ends before message i, if there is one, begins."""
        for later in range(i, len(self.messages)):
            spans, content = self.marked_spans([later]), self.messages[later]["content"].strip()
            if spans:
                return end <= spans[0][0]
            if content and content in self.text[start:end]:
                return False
        return True

    def answer_span(self, i):
        """(start, end) of turn i where the template has dropped its reasoning, and nothing else;
        else None.
        """
        dropped = not self.messages[i].get("tool_calls") and self.reasoning(i) not in self.text
        return (self.marked_spans([i]) or [None])[0] if dropped else None

    def with_ending(self, span, ending):
        """The span with what ends its turn: `ending`, else the special token that follows, if any
        does.
        """
        start, end = span
        if ending and self.text.startswith(ending, end):
            return start, end + len(ending)
        match = re.compile(rf"\s*(?:{self.specials.pattern})").match(self.text, end)
        return start, match.end() if match else end

    def split(self, text, spans):
        """`text` as pieces, with every special token that somebody wrote in a literal piece of its
        own.
        """
        if not self.literals:
            return [Piece(text, spans)]
        written = {mark: special for special, mark in self.literals.items()}
        pieces, place = [], 0
        for part in re.split(f"([{''.join(written)}])", text):
            if part:
                inside = [(max(a, place), min(b, place + len(part))) for a, b in spans]
                inside = [(a - place, b - place) for a, b in inside if a < b]
                if part in written:
                    inside = [(0, len(written[part]))] if inside else []
                pieces.append(Piece(written.get(part, part), inside, literal=part in written))
            place += len(part)
        return pieces
