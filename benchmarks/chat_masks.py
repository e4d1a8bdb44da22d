"""The targets of random chats, token by token, beside a second way of telling what they must be.

    python benchmarks/chat_masks.py            5,000 chats on trl's templates, 3,000 on hostile ones

The program is given rows as a user writes them. What must come out is worked out here from jinja2
alone. Every character of a message is replaced by a private character that stands for it and for
its message, and the chat is rendered once more: so each character of the render is known to be
that of a message, or the template's own. How a template ends its turns stands in ENDINGS, written
by hand. Then each token must be the template's render, and

    a target    where it has a character of the assistant's, or of what the template writes from
                the end of the generation prompt to the end of the turn
    none        everywhere else

with the weight of its message. Blanks that stand alone between the prompt and the answer may be
either. A chat is right, refused in one line, or wrong; results/chat_masks.md has the counts, and
every reason of a refusal with a sample.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
import contextlib
from dataclasses import dataclass, field
from datetime import datetime
import importlib.util
import io
import json
from pathlib import Path
import random
import re
import sys
import tempfile
from typing import Any
import unicodedata

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from benchmarks.hostile_templates import ENDINGS as HOSTILE_ENDINGS
from benchmarks.hostile_templates import TEMPLATES as HOSTILE
from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.readers import read
from lora.data.tokenise import tokenise

EOS = "<|endoftext|>"  # the tokenizer's
NO_TARGET = -100
WITHOUT_TEXT = ("idefics3", "llava_next", "smolvlm")  # they print lists of parts, and drop texts
# What ends a turn of the assistant, by the beginning of the template's name
ENDINGS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<turn|>"],
    "gemma4": ["<turn|>"],
    "gemma": ["<end_of_turn>"],
    "glm4moe": ["<|user|>", "<|observation|>", "<|assistant|>", "<|system|>"],  # whose turn is next
    "gptoss": ["<|return|>", "<|call|>"],  # at <|end|>, behind earlier turns, nothing stops
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>", "<|eom_id|>"],
    "muse_glimmer": ["<|eot|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|end|>"],
    "qwen": ["<|im_end|>"],
}
SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"]*[|｜]>|<\|\w+>|<\w+\|>|</?s>|<(?:start|end)_of_\w+>|\[/?INST\]"
)


# -------------------------------------------------------------------------------------- the chats


@dataclass
class Case:
    """A row of a data file, and what is known of it because it was made here."""

    row: dict
    messages: list[dict]  # what the template is given
    weights: list[float]  # of each message
    tools: list | None = None


WORDS = (
    "the ferry leaves at nine from old pier Bees make honey 42 3.14 8 naïve Straße ΑΒΓ 你好 世界 "
    "مرحبا 🙂 🇩🇪 e\u0301 x=y {{x}} {%if%} <b>bold</b> a_b 'it' \"so\" C:\\tmp # ** - \u00a0 \u2028"
).split(" ")
LOOKALIKES = (
    "<|im_end|>",
    "<|im_start|>assistant",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<turn|>",
    "<tool_call>",
    "[INST]",
    "<|im_end|",
)
BLANKS = (" ", "\n", "\n\n", "  ", "\t", "\r\n", "   \n")
TRANSFORMERS_ALIASES = hasattr(chat_template_utils, "_alias_reasoning_fields")  # from 5.24 on
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look for a thing.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "description": "what"}},
                "required": ["x"],
            },
        },
    }
]
SWITCHES = (  # of one message, and the weight that they mean
    ({"weight": 0}, 0.0),
    ({"train": False}, 0.0),
    ({"training": False}, 0.0),
    ({"loss_weight": 0.5}, 0.5),
    ({"weight": 2}, 2.0),
    ({"train": True, "weight": 0.25}, 0.25),
)


def sentence(draw: random.Random) -> str:
    """A text that is not blank."""
    if draw.random() < 0.1:
        return draw.choice(["8", "ok", "Yes.", "42", "a", "é"])
    parts = [draw.choice(WORDS) for _ in range(draw.randint(1, 12))]
    if draw.random() < 0.08:
        parts.insert(draw.randrange(len(parts) + 1), draw.choice(LOOKALIKES))
    text = draw.choice(["x", *"Ab1"]) + draw.choice([" ", ""]).join(parts[:1]) + " ".join(parts)
    if draw.random() < 0.15:
        text = text.replace(
            " ", draw.choice(["\n", "\r\n", "\n\n", "  ", "\t"]), draw.randint(1, 3)
        )
    if draw.random() < 0.08:
        text = draw.choice(BLANKS) + text
    if draw.random() < 0.08:
        text += draw.choice(BLANKS)
    return text


def random_chat(draw: random.Random) -> Case:
    with_calls = draw.random() < 0.12
    thinks = draw.choices(["no", "tags", "key", "empty"], [75, 11, 11, 3])[0]
    key = draw.choice(REASONING_KEYS)
    messages: list[dict] = []
    if draw.random() < 0.4:
        messages.append({"role": "system", "content": sentence(draw)})
    for _ in range(draw.randint(1, 5)):
        question = sentence(draw)
        messages.append({"role": "user", "content": question})
        if with_calls and draw.random() < 0.6:
            messages += call_and_result(draw)
        answer = sentence(draw)
        if draw.random() < 0.08:
            answer = question
        if draw.random() < 0.05 and len(messages) > 2:
            answer = messages[draw.randrange(len(messages))]["content"] or answer
        reply: dict[str, Any] = {"role": "assistant", "content": answer}
        if thinks == "tags" and draw.random() < 0.8:
            line = draw.choice(["\n", ""])
            reply["content"] = f"<think>{line}{sentence(draw)}{line}</think>{line}{line}{answer}"
        elif thinks == "key" and draw.random() < 0.8:
            reply[key] = answer if draw.random() < 0.1 else sentence(draw)
        elif thinks == "empty":
            reply["content"] = f"<think>\n\n</think>\n\n{draw.choice([answer, ''])}"
        messages.append(reply)
    if draw.random() < 0.05:
        messages.append({"role": "user", "content": sentence(draw)})

    weights = [1.0] * len(messages)
    switched = [dict(message) for message in messages]
    if draw.random() < 0.15:
        for i, message in enumerate(switched):
            if message["role"] == "assistant" and draw.random() < 0.5:
                switch, weights[i] = draw.choice(SWITCHES)
                message.update(switch)
    row: dict[str, Any] = {"messages": switched}
    if messages[0]["role"] == "system" and draw.random() < 0.1:
        row = {"system": messages[0]["content"], "messages": switched[1:]}
    tools = TOOLS if with_calls and draw.random() < 0.5 else None
    if tools:
        row["tools"] = tools
    return Case(row, messages, weights, tools)


def call_and_result(draw: random.Random) -> list[dict]:
    arguments = {"x": draw.choice(["y", "8", sentence(draw).strip()])}
    function = {"name": "look", "arguments": arguments}
    content = sentence(draw) if draw.random() < 0.2 else ""
    call: dict[str, Any] = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function"}],
    }
    call["tool_calls"][0]["function"] = function
    result = draw.choice(["8", "found", sentence(draw)])
    return [call, {"role": "tool", "name": "look", "content": result}]


# ---------------------------------------------------------------------------------- the templates


def refuse(message: str) -> None:
    raise TemplateError(message)


def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, in some templates, prints what stands in it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
)
ENVIRONMENT.filters["tojson"] = to_json
ENVIRONMENT.globals["raise_exception"] = refuse
ENVIRONMENT.globals["strftime_now"] = lambda form: datetime.now().strftime(form)


class Template:
    """A chat template as jinja2 renders it, and a tokenizer that has it."""

    def __init__(self, name: str, text: str, endings: list[str]):
        self.name = name
        self.endings = endings
        self.compiled = ENVIRONMENT.from_string(text)
        self.special = sorted({*SPECIAL.findall(text), *endings} - {EOS})
        self.tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny_base")
        self.special = [token for token in self.special if SPECIAL.fullmatch(token)]
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": self.special, "bos_token": "<s>"},
            replace_extra_special_tokens=False,
        )
        self.tokenizer.chat_template = text
        self.tokenizer.name_or_path = name.replace(" ", "_")
        self.bytes_of_token = bytes_of_tokens(self.tokenizer)

    def render(self, messages: list[dict], tools: list | None, prompt: bool = False) -> str | None:
        """Return the render, or None where the template refuses the chat."""
        messages = [aliased(message) for message in messages]
        words = {"bos_token": "<s>", "eos_token": EOS, "pad_token": EOS}
        try:
            return self.compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **words,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None


def aliased(message: dict) -> dict:
    """Return a message with its reasoning under the names under which transformers passes it on."""
    names = [name for name in REASONING_KEYS if message.get(name) is not None]
    if not names or not TRANSFORMERS_ALIASES:
        return message
    reasoning = message[names[0]]
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def bytes_of_tokens(tokenizer) -> dict[int, bytes]:
    """Return the bytes of each token of a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    result = {}
    for token, number in tokenizer.get_vocab().items():
        if token in added:
            result[number] = token.encode()
        else:
            result[number] = bytes(byte_of[character] for character in token)
    return result


def templates_of_trl() -> list[Template]:
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    templates = []
    for path in sorted(folder.glob("*.jinja")):
        if path.stem.endswith("_training") or path.stem in WITHOUT_TEXT:
            continue
        prefix = max((name for name in ENDINGS if path.stem.startswith(name)), key=len)
        templates.append(Template(path.stem, path.read_text(encoding="utf-8"), ENDINGS[prefix]))
    return templates


def hostile_templates() -> list[Template]:
    return [Template(name, HOSTILE[name], HOSTILE_ENDINGS.get(name, [])) for name in HOSTILE]


# ------------------------------------------------------------------------- whose is a character

FIRST_PRIVATE = 0xF0000  # plane 15, and letters of plane 2, which no message above has
FIRST_LETTER = 0x20000
KEPT = re.compile(r"(</?think>|</?tool_response>|[\"'\\])")  # templates look for them
NOBODY = -1


class Substitution:
    """Private characters in the place of those of messages."""

    def __init__(self, with_blanks: bool, with_calls: bool):
        self.with_blanks = with_blanks
        self.with_calls = with_calls
        self.private: dict[tuple[int, str], str] = {}  # (message, character) -> private one
        self.meaning: dict[str, tuple[int, str]] = {}

    def text(self, i: int, text: str) -> str:
        parts = KEPT.split(text)
        for place in range(0, len(parts), 2):
            parts[place] = "".join(self.character(i, character) for character in parts[place])
        return "".join(parts)

    def character(self, i: int, character: str) -> str:
        if character.isspace() and not self.with_blanks:
            return character
        if (i, character) not in self.private:
            # A letter for a letter: filters count words.
            first = FIRST_LETTER if character.isalnum() else FIRST_PRIVATE
            private = chr(first + len(self.private))
            self.private[i, character] = private
            self.meaning[private] = (i, character)
        return self.private[i, character]

    def message(self, i: int, message: dict) -> dict:
        changed = dict(message)
        for key in ("content", *REASONING_KEYS):
            if key in message:
                changed[key] = self.text(i, message[key])
        if self.with_calls and "tool_calls" in message:
            changed["tool_calls"] = [self.call(i, call) for call in message["tool_calls"]]
        return changed

    def call(self, i: int, call: dict) -> dict:
        arguments = call["function"]["arguments"]
        changed = {key: self.text(i, value) for key, value in arguments.items()}
        name = self.text(i, call["function"]["name"])
        return {**call, "function": {"name": name, "arguments": changed}}

    def owners(self, rendered: str) -> tuple[str, list[int]]:
        """Return the render with its characters put back, and the message of each of them."""
        characters, messages = [], []
        for character in rendered:
            i, original = self.meaning.get(character, (NOBODY, character))
            characters.append(original)
            messages.append(i)
        return "".join(characters), messages


def equal(restored: str, plain: str) -> bool:
    return restored == plain


def equal_but_for_case(restored: str, plain: str) -> bool:
    return restored.casefold() == plain.casefold()


def equally_long(restored: str, plain: str) -> bool:
    """Whether a filter has put some letters in the places of others."""
    return sum(map(str.__eq__, restored, plain)) > 0.8 * len(plain)


def replaced(text: str) -> bool:
    """Return whether `Substitution` always replaces a character of a text."""
    return any(part.strip() for part in KEPT.split(text)[::2])


def owners(template: Template, case: Case, plain: str) -> list[int] | None:
    """Return the message of each character of a render; None where that cannot be told.

    The finest substitution that changes nothing else counts: templates strip blanks, and print
    calls as JSON.
    """
    ways = ((True, True), (False, True), (True, False), (False, False))
    for roles in (("system", "user", "tool", "assistant"), ("assistant",)):
        for same in (equal, equal_but_for_case, equally_long):
            for with_blanks, with_calls in ways:
                substitution = Substitution(with_blanks, with_calls)
                changed = list(case.messages)
                for i, message in enumerate(case.messages):
                    if message["role"] in roles:
                        changed[i] = substitution.message(i, message)
                rendered = template.render(changed, case.tools)
                if rendered is None:
                    continue
                restored, messages = substitution.owners(rendered)
                if len(restored) == len(plain) and same(restored, plain):
                    return messages
    return None


# ------------------------------------------------------------------------------ what must come out

FREE = -1.0  # a character whose token may be a target or none


@dataclass
class Expected:
    """A render, and the weight of each of its characters: 0 is no target, FREE either."""

    plain: str
    weights: list[float]
    owners: list[int]
    ends: list[bool] = field(default_factory=list)  # whether each assistant's turn has an ending
    dropped: list[int] = field(default_factory=list)  # turns of which nothing is printed


def expected(template: Template, case: Case, plain: str) -> Expected | None:
    owner = owners(template, case, plain)
    if owner is None:
        return None
    result = Expected(plain, [0.0] * len(plain), owner)
    for place, i in enumerate(owner):
        if i != NOBODY and case.messages[i]["role"] == "assistant":
            result.weights[place] = case.weights[i]
    for i, message in enumerate(case.messages):
        if message["role"] == "assistant":
            add_turn(result, template, case, i)
    return result


def add_turn(result: Expected, template: Template, case: Case, i: int) -> None:
    """Write the weight of turn i where the template's own characters belong to it."""
    plain, owner = result.plain, result.owners
    places = [place for place, message in enumerate(owner) if message == i]
    prompt = template.render(case.messages[:i], case.tools, prompt=True)
    without = template.render(case.messages[:i], case.tools)
    is_led_to = prompt is not None and plain.startswith(prompt)
    has_prompt = is_led_to and prompt != without
    if not places:
        result.dropped.append(i)
        if not is_led_to:
            result.ends.append(False)
            free_between_neighbours(result, i)
            return
        first = last = len(prompt)
    else:
        first, last = places[0], places[-1] + 1
        # Tags and quotes at the ends of the content, which are not replaced
        content = case.messages[i]["content"]
        for length in range(len(content), 0, -1):
            if plain.endswith(content[:length], 0, first) and not replaced(content[:length]):
                owner[first - length : first] = [i] * length
                result.weights[first - length : first] = [case.weights[i]] * length
                places = [*range(first - length, first), *places]
                first -= length
                break

    # What is in the prompt is given to the model, even where the message begins with it.
    if has_prompt:
        for place in range(first, min(len(prompt), last)):
            result.weights[place] = 0.0
        places = [place for place in places if place >= len(prompt)]
        first = places[0] if places else max(first, min(len(prompt), last))

    # Blanks before the answer may belong to either where no generation prompt leads to it. So do
    # those of the answer itself: the template may have left out what stood before them.
    start = stop = first
    while start > 0 and owner[start - 1] == NOBODY and plain[start - 1].isspace():
        start -= 1
    while stop < last and owner[stop] == i and plain[stop].isspace():
        if has_prompt and stop >= len(prompt):
            break
        stop += 1
    free = range(start, stop)
    if is_led_to and len(prompt) <= first:
        between = range(len(prompt), first)
        if all(owner[place] == NOBODY for place in between):
            free = range(0) if has_prompt else range(len(prompt), stop)
            first = len(prompt) if has_prompt else first
    for place in free:
        result.weights[place] = FREE

    # The turn's end: the first ending that the template itself writes before another's words.
    following = last
    while following < len(plain) and owner[following] == NOBODY:
        following += 1
    end = None
    for ending in template.endings:
        found = plain.find(ending, last, following)
        if found >= 0 and (end is None or found < end[0]):
            end = (found, found + len(ending))
    result.ends.append(end is not None)
    for place in range(first, end[1] if end else last):
        if owner[place] == NOBODY:
            result.weights[place] = case.weights[i]
    if end is None:
        for place in range(last, following):
            result.weights[place] = FREE


def free_between_neighbours(result: Expected, i: int) -> None:
    """Leave open what the template writes between the messages around one that it drops."""
    before = [place for place, message in enumerate(result.owners) if NOBODY < message < i]
    after = [place for place, message in enumerate(result.owners) if message > i]
    for place in range(max(before, default=-1) + 1, min(after, default=len(result.plain))):
        if result.owners[place] == NOBODY:
            result.weights[place] = FREE


def composed(want: Expected) -> tuple[str, list[float], list[int]]:
    """Return a render as the tokenizer's normaliser (NFC) writes it, with what is known of it."""
    characters, weights, owner = [], [], []
    place = 0
    while place < len(want.plain):
        end = place + 1
        while end < len(want.plain) and unicodedata.combining(want.plain[end]):
            end += 1
        for character in unicodedata.normalize("NFC", want.plain[place:end]):
            characters.append(character)
            weights.append(want.weights[place])
            owner.append(want.owners[place])
        place = end
    return "".join(characters), weights, owner


def problems(template: Template, case: Case, want: Expected, row) -> list[str]:
    """Return what is wrong with a row of tokens and targets."""
    pieces = [template.bytes_of_token[token] for token in row.tokens]
    text = b"".join(pieces).decode(errors="replace")
    plain, weights, owner = composed(want)
    turns = [i for i, m in enumerate(case.messages) if m["role"] == "assistant"]
    if text != plain:
        # The end token that a last turn without an ending gets
        body = text.removesuffix(EOS)
        last = [place for place, message in enumerate(owner) if message == turns[-1]]
        behind = plain[last[-1] + 1 :] if last else ""
        has_special = any(token in behind for token in [*template.special, EOS])
        is_last = turns[-1] == len(case.messages) - 1
        if has_special or not is_last or plain.rstrip() != body.rstrip():
            return [f"the tokens are not the template's render: {text[-80:]!r}"]
        weights = weights[: len(body)] + [case.weights[-1]] * len(EOS)
        owner = owner[: len(body)] + [NOBODY] * len(EOS)
        plain = text
    elif turns[-1] == len(case.messages) - 1 and not want.ends[-1] and case.weights[-1]:
        return ["nothing ends the last turn"]

    found = []
    of_bytes = [place for place, c in enumerate(plain) for _ in c.encode()]
    special = set(template.tokenizer.all_special_ids)
    position = 0
    for number, (token, piece) in enumerate(zip(row.tokens, pieces)):
        places = sorted(set(of_bytes[position : position + len(piece)]))
        position += len(piece)
        if token in special and any(owner[place] != NOBODY for place in places):
            found.append(f"{piece!r}, which message {owner[places[0]] + 1} holds, became special")
        if number == 0:
            continue
        target, weight = row.targets[number - 1], row.target_weights[number - 1]
        if target not in (NO_TARGET, token):
            found.append(f"token {number} has another target")
        of_token = {weights[place] for place in places}
        wanted = of_token - {0.0, FREE}
        others = {owner[p] for p in places if owner[p] != NOBODY and weights[p] == 0}
        if wanted and others or len(wanted) > 1:
            continue  # a token of two messages, where the template writes nothing between them
        where = f"token {number} ({piece.decode(errors='replace')!r})"
        if wanted and (target == NO_TARGET or weight != wanted.pop()):
            found.append(f"{where} must be a target, and has weight {weight}")
        if of_token == {0.0} and target != NO_TARGET:
            found.append(f"{where} is a target, and must be none")
    return found


# ---------------------------------------------------------------------------------- the comparison


@dataclass
class Tally:
    """What became of the chats of one template."""

    right: int = 0
    not_rendered: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)  # reason, sample
    wrong: list[tuple[str, str]] = field(default_factory=list)
    undecided: list[tuple[str, str]] = field(default_factory=list)  # accepted, and not told here

    @property
    def rendered(self) -> int:
        return self.right + len(self.refused) + len(self.wrong) + len(self.undecided)


def outcome(template: Template, case: Case, folder: Path, tally: Tally) -> None:
    plain = template.render(case.messages, case.tools)
    if plain is None:
        tally.not_rendered += 1
        return
    want = expected(template, case, plain)
    sample = json.dumps(case.row, ensure_ascii=False)
    path = folder / "chat.jsonl"
    path.write_text(json.dumps(case.row) + "\n", encoding="utf-8")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            examples = read([str(path)], "lm")
        data = DataConfig(max_length=100_000)
        (result,) = tokenise(examples, template.tokenizer, "lm", data, True)
    except UserError as error:
        tally.refused.append((reason(str(error), case, want), sample))
        return
    if want is None:
        tally.undecided.append(("accepted, and the checker cannot tell", sample))
    elif not result.rows:
        if any(weight > 0 for weight in want.weights):
            tally.wrong.append(("no target at all", sample))
        else:
            tally.right += 1
    else:
        found = problems(template, case, want, result.rows[0])
        if found:
            tally.wrong.append((found[0], sample))
        else:
            tally.right += 1


def reason(error: str, case: Case, want: Expected | None) -> str:
    """Return an error without its place, with what the render shows of the turn that it names."""
    text = re.sub(r"^\S*chat.jsonl:\d+: ", "", error)
    number = re.match(r"message (\d+): ", text)
    text = re.sub(r"^message \d+: ", "", text)
    text = re.sub(r"the chat template of \S+", "the template", text)
    text = re.sub(
        r"does more than print .*, which", "does more than print a special token, which", text
    )
    text = re.sub(r"with '.*' here", "with its ending here", text)
    if number is None:
        return text
    message = case.messages[int(number[1]) - 1]
    kinds = []
    if "tool_calls" in message:
        kinds.append("a call")
    if any(key in message for key in REASONING_KEYS):
        kinds.append("reasoning under a key")
    if "</think>" in message["content"]:
        kinds.append("reasoning in tags")
    if want is not None and int(number[1]) - 1 in want.dropped:
        kinds.append("of which the template prints nothing")
    return f"{text} A turn with: {', '.join(kinds) or 'words alone'}"


def compare(templates: list[Template], count: int, seed: int) -> dict[str, Tally]:
    """Compare `count` chats, each with one template, in turns."""
    draw = random.Random(seed)
    cases = [random_chat(draw) for _ in range(count)]
    tallies = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, template in enumerate(templates):  # one after another, for the program's caches
            tally = tallies[template.name] = Tally()
            for case in cases[number :: len(templates)]:
                outcome(template, case, Path(folder), tally)
            print(
                f"{template.name}: {tally.right} right, {len(tally.refused)} refused, "
                f"{len(tally.wrong)} wrong, {len(tally.undecided)} undecided, "
                f"{tally.not_rendered} not rendered",
                flush=True,
            )
    return tallies


# -------------------------------------------------------------------------------------- the page


def table(tallies: dict[str, Tally]) -> Iterator[str]:
    yield "| template | chats | rendered | right | refused | wrong |"
    yield "|---|---|---|---|---|---|"
    rows = list(tallies.items())
    total = Tally()
    for _, tally in rows:
        total.right += tally.right
        total.not_rendered += tally.not_rendered
        for name in ("refused", "wrong", "undecided"):
            getattr(total, name).extend(getattr(tally, name))
    for name, tally in [*rows, ("**all**", total)]:
        share = len(tally.refused) / max(tally.rendered, 1)
        wrong = len(tally.wrong) + len(tally.undecided)
        yield (
            f"| {name} | {tally.rendered + tally.not_rendered} | {tally.rendered} | "
            f"{tally.right} | {len(tally.refused)} ({share:.1%}) | {wrong} |"
        )


def reasons(tallies: dict[str, Tally]) -> Iterator[str]:
    yield "| why a chat was refused | chats | templates | a sample |"
    yield "|---|---|---|---|"
    counts: Counter[str] = Counter()
    samples: dict[str, str] = {}
    names: defaultdict[str, set[str]] = defaultdict(set)
    for name, tally in tallies.items():
        for why, sample in tally.refused:
            counts[why] += 1
            names[why].add(name)
            if why not in samples or len(sample) < len(samples[why]):
                samples[why] = sample
    for why, count in counts.most_common():
        shown = cell(samples[why])
        where = sorted(names[why])
        listed = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        yield f"| {cell(why, 400)} | {count} | {listed} | {shown} |"


def cell(text: str, longest: int = 220) -> str:
    """A text in a row of a table, in code where it is data."""
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    text = text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
    return f"`{text}`"


def page(trl: dict[str, Tally], hostile: dict[str, Tally], command: str) -> str:
    parts = ["# Targets of random chats, token by token", "", f"`{command}`", "", PREFACE, ""]
    for title, tallies in (("Templates of trl", trl), ("Hostile templates", hostile)):
        parts += [f"## {title}", "", *table(tallies), "", *reasons(tallies), ""]
    return "\n".join(parts)


PREFACE = """Each chat is rendered with one template and compared as `benchmarks/chat_masks.py` says
in its first lines. "Rendered" are the chats that the template itself accepts. A refused chat is one
line of error and exit status 2. The templates of trl are those of texts (all but the `*_training`
ones, and idefics3, llava_next and smolvlm, which print no texts); the hostile ones, in
`benchmarks/hostile_templates.py`, change, drop, double or move what a message says. "Wrong" counts
chats that were accepted with any token, target or weight that is not the expected one, or that this
check cannot tell."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=int, default=5000, help="on the templates of trl")
    parser.add_argument("--hostile_chats", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=22)
    parser.add_argument("--output", type=Path, help="default: results/chat_masks.md")
    arguments = parser.parse_args()
    trl = compare(templates_of_trl(), arguments.chats, arguments.seed)
    hostile = compare(hostile_templates(), arguments.hostile_chats, arguments.seed + 1)

    wrong = 0
    for name, tally in (trl | hostile).items():
        for what, sample in [*tally.wrong, *tally.undecided]:
            wrong += 1
            print(f"WRONG {name}: {what}\n      {sample}")
    rendered = sum(tally.rendered for tally in trl.values())
    refused = sum(len(tally.refused) for tally in trl.values())
    print(f"{wrong} wrong; {refused} of {rendered} chats that a template of trl renders refused")
    output = arguments.output or ROOT / "benchmarks" / "results" / "chat_masks.md"
    output.write_text(page(trl, hostile, "python benchmarks/chat_masks.py"), encoding="utf-8")
    return 1 if wrong or refused > 0.1 * rendered else 0


if __name__ == "__main__":
    sys.exit(main())
