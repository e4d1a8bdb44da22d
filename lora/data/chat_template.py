"""A chat as the tokenizer's template writes it, in pieces that are tokenised by themselves."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from lora.common.errors import UserError
from lora.common.operating_system import time_limit
from lora.data.examples import REASONING_KEYS

# For tokenizers that bring no template
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + 'TURN_END\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Seconds for one chat, because a template is a program that came with somebody's tokenizer
RENDER_TIMEOUT = 10.0
MAX_ADDED = 2**20  # characters that a template may write beyond ten times its input
PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]  # characters that nobody should write
Span = tuple[int, int]  # from the first character to the one after the last
WeightedSpan = tuple[int, int, float]  # a span, and the factor of its targets' losses


@dataclass(slots=True)
class Piece:
    """A stretch of text that is tokenised by itself."""

    text: str
    spans: list[WeightedSpan] = field(default_factory=list)  # characters that are targets
    literal: bool = False  # special tokens in it are plain text


def use_chatml(tokenizer: Tokenizer) -> None:
    """Give a tokenizer without a chat template ChatML, and print so. Raises UserError."""
    if tokenizer.chat_template:
        return
    end = tokenizer.eos_token
    if "<|im_end|>" in tokenizer.get_vocab():
        end = "<|im_end|>"
    if not end:
        problem = "no chat template and no end token, so no turn can be ended"
        raise UserError(f"{tokenizer.name_or_path}: {problem}.")
    # A base that begins its texts with BOS begins its chats so, too.
    bos = "{{ bos_token }}" if bos_tokens(tokenizer) else ""
    tokenizer.chat_template = bos + CHATML.replace("TURN_END", end)
    print(f"the tokenizer has no chat template: using ChatML, with {end} at the end of a turn")


def bos_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return [BOS] where the tokenizer begins its texts with one, else []."""
    tokens = tokenizer("").input_ids
    return tokens[:1] if tokens and tokens[0] == tokenizer.bos_token_id else []


class Chat:
    """A chat and its render, `text`.

    A special token that somebody wrote in a message must stay plain text. So in `messages`, `tools`
    and `text` a private-use character stands in for it, until `split` puts it back.
    """

    def __init__(self, where: str, messages: list[dict], tools: list | None, tokenizer: Tokenizer):
        self.where = where  # file:line
        self.tokenizer = tokenizer
        self.template = f"the chat template of {tokenizer.name_or_path}"  # for messages
        added_tokens = tokenizer.added_tokens_decoder.values()
        special_tokens = [token.content for token in added_tokens if token.special]
        special_tokens.sort(key=len, reverse=True)  # the longest that matches
        pattern = "|".join(re.escape(token) for token in special_tokens)
        self.specials = re.compile(pattern or "(?!)")  # (?!) matches nothing

        written = json.dumps([messages, tools], ensure_ascii=False)
        unused = self.unused_characters(written)
        self.begin_mark = next(unused)
        self.end_mark = next(unused)
        # special token -> character; a lookup of a new token takes the next unused character
        self.stand_ins = defaultdict(lambda: next(unused))

        self.tools = self.without_specials(tools)
        if any(message.get("tool_calls") for message in messages):
            from lora.data.tool_calls import with_printable_arguments

            messages = with_printable_arguments(self, messages)
        self.messages = self.with_stand_ins(messages)
        self.text = self.render(self.messages)
        if self.stand_ins:
            self.require_own_render(messages, tools)

    def with_stand_ins(self, messages: list[dict]) -> list[dict]:
        """Return messages without special tokens, but for the names of roles."""
        results = self.without_specials(messages)
        for result, message in zip(results, messages):
            result["role"] = message["role"]  # it may hold the text of an added token
        return results

    def unused_characters(self, written: str) -> Iterator[str]:
        """Yield the private-use characters that a text lacks. Raises UserError at their end."""
        for character in PRIVATE_USE:
            if character not in written:
                yield character
        raise self.error("it holds every character of U+E000..U+F8FF; remove some of them")

    def require_own_render(self, messages: list[dict], tools: list | None) -> None:
        """Raise UserError where the template's filters (length, upper, ...) see the stand-ins."""
        text = self.text
        for special, character in self.stand_ins.items():
            text = text.replace(character, special)
        if text != self.render(messages, tools=tools):
            written = " and ".join(self.stand_ins)
            raise self.error(
                f"{self.template} does more than print {written}, which the chat holds"
            )

    def assistant_turns(self) -> list[int]:
        """Return the indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def without_specials(self, value: Any) -> Any:
        """Replace special tokens by their stand-ins in all texts of lists and dicts."""
        if isinstance(value, str):
            return self.specials.sub(lambda match: self.stand_ins[match[0]], value)
        if isinstance(value, dict):
            return {key: self.without_specials(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.without_specials(part) for part in value]
        return value

    def render(
        self, messages: list[dict], add_generation_prompt: bool = False, tools: list | None = None
    ) -> str:
        """Render messages, with the chat's tools where no others are given."""
        try:
            with time_limit(RENDER_TIMEOUT):
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=self.tools if tools is None else tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
        except (TimeoutError, MemoryError) as error:
            kind = type(error).__name__
            raise self.error(f"{self.template} does not come to an end ({kind})") from None
        except Exception as error:  # it is a program, and may raise anything
            raise self.error(f"{self.template} refuses it: {error}") from None
        if len(text) > MAX_ADDED + 10 * len(str(messages)):
            raise self.error(f"{self.template} makes {len(text):,} characters of it")
        return text

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {' '.join(problem.split())}.")

    def answer(self, i: int) -> str:
        """Return what message i says after its reasoning."""
        return self.messages[i]["content"].rpartition("</think>")[2].strip()

    def reasoning(self, i: int) -> str:
        """Return what message i says up to </think>, or under a key for its reasoning."""
        before = self.messages[i]["content"].rpartition("</think>")[0]
        in_content = before.replace("<think>", "").strip()
        if in_content:
            return in_content
        for key in REASONING_KEYS:
            text = self.messages[i].get(key)
            if isinstance(text, str) and text.strip():
                return text.strip()
        return ""

    def drops_reasoning(self, i: int) -> bool:
        """Return whether the render is the same without the reasoning of message i."""
        message = {k: v for k, v in self.messages[i].items() if k not in REASONING_KEYS}
        after_reasoning = message["content"].rpartition("</think>")[2]
        for answer in (after_reasoning, after_reasoning.strip()):
            without = [*self.messages]
            without[i] = {**message, "content": answer}
            if self.renders_the_same(without):
                return True
        return False

    def drops_content(self, i: int) -> bool:
        """Return whether the render is the same with another content of message i."""
        changed = [*self.messages]
        changed[i] = {**changed[i], "content": changed[i]["content"] + self.begin_mark}
        return self.renders_the_same(changed)

    def renders_the_same(self, messages: list[dict], tools: list | None = None) -> bool:
        """Return whether changed messages or tools make the chat's text; a refusal makes none."""
        try:
            return self.render(messages, tools=tools) == self.text
        except UserError:
            return False

    def tool_calls(self, i: int) -> list[dict]:
        return self.messages[i].get("tool_calls") or []

    def split(self, text: str, spans: list[WeightedSpan]) -> list[Piece]:
        """Split `text` so that each special token that somebody wrote is a literal piece."""
        if not self.stand_ins:
            return [Piece(text, spans)]
        special_of = {character: special for special, character in self.stand_ins.items()}
        pieces = []
        start = 0
        for part in re.split(f"([{''.join(special_of)}])", text):
            end = start + len(part)
            inside = []
            for span_start, span_end, weight in spans:
                first = max(span_start, start)
                last = min(span_end, end)
                if first < last:
                    inside.append((first - start, last - start, weight))
            if part in special_of:
                special = special_of[part]
                inside = [(0, len(special), weight) for _, _, weight in inside]
                pieces.append(Piece(special, inside, literal=True))
            elif part:
                pieces.append(Piece(part, inside))
            start = end
        return pieces
