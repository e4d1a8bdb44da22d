"""Write a Modelfile: what Ollama reads beside a GGUF file.

Ollama writes prompts with a Go template. It is learned here from what the tokenizer's own chat
template renders, and compared with that on more chats; if they differ, no TEMPLATE is written.
Source: parser/parser.go and template/template.go of Ollama.
"""

from transformers import PreTrainedTokenizerBase as Tokenizer

from lora.common.errors import UserError
from lora.common.printable_text import printable
from lora.data.chat_template import Chat
from lora.export.gguf_tokenizer import added_around

MARK = "CONTENT"  # stands for every content while the texts around them are learned
CHATS = ("user", "system user", "user assistant user assistant user", "system user assistant user")
CONTENTS = (MARK, f"a {MARK}\n\nb", f"<think>\n{MARK}\n</think>\n\nb")


def modelfile(gguf_name: str, stops: list[int], tokenizer: Tokenizer) -> str:
    """Return the text of a Modelfile; print why it has no TEMPLATE. Raises UserError."""
    lines = [f"FROM ./{gguf_name}"]
    try:
        if tokenizer.chat_template:
            lines += template_lines(tokenizer)
    except UserError as error:
        print(printable(f"note: the Modelfile has no TEMPLATE, so Ollama takes another: {error}"))
    for stop in stops:
        try:
            lines.append(f"PARAMETER stop {quoted(tokenizer.decode([stop]))}")
        except UserError as error:
            print(printable(f"note: the Modelfile lacks a stop token: {error}"))
    return "\n".join(lines) + "\n"


def template_lines(tokenizer: Tokenizer) -> list[str]:
    """Return TEMPLATE, and SYSTEM with the chat template's default one. Raises UserError."""
    # 1. Take the texts around the contents.
    turns = rendered(tokenizer, "user assistant user assistant", prompt=False).split(MARK)
    with_system = rendered(tokenizer, "system user", prompt=False).split(MARK)
    if (len(turns), len(with_system)) != (5, 3):
        raise UserError("the chat template does not write every content once.")
    first, to_answer, to_question, _, after_answer = turns
    before_system, to_user, after_user = with_system
    before_user = to_question.removeprefix(after_answer)
    start, system = first.removesuffix(before_user), ""
    if first.startswith(before_system) and first.endswith(to_user):
        start, system = "", first[len(before_system) : -len(to_user)]
    before_system = before_system.removeprefix(start)
    after_system = to_user.removesuffix(before_user)
    around = {
        "system": (before_system, after_system),
        "user": (before_user, after_user),
        "assistant": (to_answer.removeprefix(after_user), after_answer),
    }
    prompt = rendered(tokenizer, "user").rpartition(MARK)[2].removeprefix(after_user)

    # 2. Compare what Ollama makes of them with what the chat template does.
    def by_ollama(roles: str, content: str) -> str:
        text = start
        if system and not roles.startswith("system"):
            text = before_system + system + after_system
        for role in roles.split():
            before, after = around[role]
            text += before + content + after
        return text + prompt

    for roles in CHATS:
        for content in CONTENTS:
            if by_ollama(roles, content) != rendered(tokenizer, roles, content):
                raise UserError(f"it cannot write {content!r} ({roles}) as the chat template does.")
    blanks = (CHATS[-1], f" {MARK}\n")
    if by_ollama(*blanks) != rendered(tokenizer, *blanks):
        print(
            "note: the chat template strips contents and Ollama does not: give it stripped texts."
        )

    # 3. Write them in Go.
    template = start + "{{ range .Messages }}"
    for role, (before, after) in around.items():
        template += '{{ if eq .Role "ROLE" }}'.replace("ROLE", role)
        template += before + "{{ .Content }}" + after + "{{ end }}"
    lines = [f"TEMPLATE {quoted(template + '{{ end }}' + prompt)}"]
    if system:
        lines.append(f"SYSTEM {quoted(system)}")
    return lines


def rendered(tokenizer: Tokenizer, roles: str, content: str = MARK, prompt: bool = True) -> str:
    """Return a chat without the bos_token that llama.cpp adds by itself. Raises UserError."""
    messages = [{"role": role, "content": content} for role in roles.split()]
    chat = Chat("Modelfile", messages, None, tokenizer)
    text = chat.render(messages, add_generation_prompt=prompt)
    adds_bos, adds_eos = added_around(tokenizer)
    bos = tokenizer.bos_token if adds_bos else ""
    if adds_eos or not text.startswith(bos):
        raise UserError("llama.cpp adds bos_token or eos_token, the chat template does not.")
    if "{" in text or "strftime_now" in tokenizer.chat_template:
        raise UserError("the chat template writes the date or braces.")
    return text.removeprefix(bos)


def quoted(text: str) -> str:
    """Return a text as a Modelfile's parser reads it back. Raises UserError."""
    if '"""' in text or not text.replace("\n", "").replace("\t", "").isprintable():
        raise UserError(f"a Modelfile cannot hold {text!r}.")
    quotes = '"""' if '"' in text or "\n" in text else '"'
    return quotes + text + quotes
