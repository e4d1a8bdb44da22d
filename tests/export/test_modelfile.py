"""A Modelfile: read by Ollama's rules, it says what the model's own chat template says, or else it
has no TEMPLATE.
"""

import re

from jinja2 import Environment
import pytest
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import UserError
from lora.evaluation.stop_tokens import stop_tokens
from lora.export.modelfile import modelfile
import merge as merging
from tests.conftest import run

CHATML = AutoTokenizer.from_pretrained(EMBEDDED_BASE).chat_template
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are \"Tiny\".\n"
DEFAULT_SYSTEM += "Be brief.<|im_end|>\n{% endif %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>"
    "assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (  # the system message stands in the user's turn
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.index0 == 1 and "
    "messages[0]['role'] == 'system' %}<<SYS>>{{ messages[0]['content'] }}<</SYS>>{% endif %}"
    "{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (  # no special tokens, a preamble, and a prompt unlike the header of an answer
    "A chat.\n{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n(short) {% endif %}"
)
WITHOUT_REASONING = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
GO = {
    "{{ range .Messages }}": "{% for m in messages %}",
    "{{ .Content }}": "{{ m.content }}",
    **{
        f'{{{{ if eq .Role "{role}" }}}}': "{% if m.role == '" + role + "' %}"
        for role in ("system", "user", "assistant")
    },
}
TURNS = [{"role": "user", "content": "{{ 1 }} <b>\n"}, {"role": "assistant", "content": " é"}]
SYSTEM = {"role": "system", "content": 'Answer in "French".\n\nOr not.'}
CHATS = [TURNS[:1], [*TURNS, *TURNS, TURNS[0]], [SYSTEM, TURNS[0]], [SYSTEM, *TURNS, TURNS[0]]]


def tokenizer_with(template, adds_bos=False):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.chat_template = template
    if adds_bos:
        bos = ("<|begin|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[bos]
        )
    return tokenizer


def commands(text):
    """What Ollama's parser reads: {command: [values]}. A value ends with the line, once the quotes
    with which it begins are closed; what it cannot print is lost.
    """
    text = "".join(c for c in text if c.isprintable() or c in "\n\t")
    found = {}
    while text:
        name, _, rest = text.partition(" ")
        if name == "PARAMETER":
            name, _, rest = rest.partition(" ")
        lines = rest.split("\n")
        for count in range(1, len(lines)):
            value = "\n".join(lines[:count]).strip()
            quotes = '"""' if value.startswith('"""') else '"' * value.startswith('"')
            if len(value) >= 2 * len(quotes) and value.endswith(quotes):
                break
        found.setdefault(name, []).append(value[len(quotes) : len(value) - len(quotes)])
        text = "\n".join(lines[count:])
    return found


def by_ollama(found, messages):
    """The prompt that Ollama makes: its Go template, written as jinja2 has it."""
    (template,) = found["TEMPLATE"]
    ends = [
        "endfor" if "range" in word else "endif" for word in re.findall("range|if eq", template)
    ]
    ends = [*ends[1:], ends[0]]
    for ours, theirs in GO.items():
        template = template.replace(ours, theirs)
    for end in ends:
        template = template.replace("{{ end }}", "{% " + end + " %}", 1)
    if "SYSTEM" in found and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": found["SYSTEM"][0]}, *messages]
    return Environment(keep_trailing_newline=True).from_string(template).render(messages=messages)


@pytest.mark.parametrize(
    "template, adds_bos",
    [
        (CHATML, False),
        (DEFAULT_SYSTEM + CHATML, False),
        (LLAMA3, True),  # llama.cpp adds <|begin|>
        (LLAMA3, False),  # the template has to write it
        (PLAIN, False),
    ],
    ids=["ChatML", "default system", "Llama 3", "Llama 3, no bos added", "plain"],
)
def test_ollama_writes_what_the_chat_template_writes(template, adds_bos, capsys):
    tokenizer = tokenizer_with(template, adds_bos)
    found = commands(modelfile("tiny model.gguf", [], tokenizer))
    assert found["FROM"] == ["./tiny model.gguf"] and capsys.readouterr().out == ""
    assert ("SYSTEM" in found) == template.startswith(DEFAULT_SYSTEM)
    for messages in CHATS:
        flags = dict(tokenize=False, add_generation_prompt=True)
        expected = tokenizer.apply_chat_template(messages, **flags)
        assert "<|begin|>" * adds_bos + by_ollama(found, messages) == expected


def test_a_template_that_strips_is_written_with_a_note(capsys):
    tokenizer = tokenizer_with(CHATML.replace("message['content']", "message['content'].strip()"))
    assert modelfile("m", [], tokenizer) == modelfile("m", [], tokenizer_with(CHATML))
    assert "note: the chat template strips contents and Ollama does not" in capsys.readouterr().out


@pytest.mark.parametrize(
    "template, adds_bos, reason",
    [
        (LLAMA2, False, "it cannot write 'CONTENT' (system user) as the chat template does"),
        (WITHOUT_REASONING, False, "it cannot write '<think>"),
        (REFUSING + CHATML, False, "refuses it: none"),
        ("{{ strftime_now('%d %B') }}" + CHATML, False, "the date or braces"),
        ("{{ '{{' }}" + CHATML, False, "the date or braces"),
        ("\u200b" + CHATML, False, r"a Modelfile cannot hold '\u200b"),
        (CHATML, True, "llama.cpp adds bos_token or eos_token"),
        ("{{ messages | length }}", False, "does not write every content once"),
    ],
)
def test_what_no_template_of_ollama_says_is_told_in_one_line(template, adds_bos, reason, capsys):
    found = commands(modelfile("m.gguf", [0, 2], tokenizer_with(template, adds_bos)))
    assert found == {"FROM": ["./m.gguf"], "stop": ["<|endoftext|>", "<|im_end|>"]}
    said = capsys.readouterr().out
    assert reason in said and said.count("\n") == 1


def test_stop_tokens_with_quotes_are_read_back():
    tokenizer = tokenizer_with(None)
    stops = ['"', '""', '<|"|>', "<|a b|>", "\n"]
    tokenizer.add_tokens(stops)
    found = commands(modelfile("m", tokenizer.convert_tokens_to_ids(stops), tokenizer))
    assert found["stop"] == stops


def test_a_stop_token_that_cannot_be_written_is_told_and_left_out(capsys):
    tokenizer = tokenizer_with(None)
    tokenizer.add_tokens("<\u200bend>")
    stops = [tokenizer.convert_tokens_to_ids("<\u200bend>"), tokenizer.eos_token_id]
    assert commands(modelfile("m", stops, tokenizer))["stop"] == [tokenizer.eos_token]
    assert "note: the Modelfile lacks a stop token" in capsys.readouterr().out


def test_merge_writes_it_beside_the_gguf_and_overwrites_none(configure, tmp_path, monkeypatch):
    artifact = run(configure(True, task="lm", max_steps=1)) / "final_artifact"
    flags = ["--adapter", str(artifact), "--output", str(tmp_path / "m")]
    flags += ["--gguf", str(tmp_path / "new" / "Modelfile")]  # an odd name
    merging.main(merging.read_arguments(flags))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    written = tmp_path / "new" / "Modelfile.Modelfile"
    text = written.read_text()
    assert text == modelfile("Modelfile", stop_tokens(model, tokenizer), tokenizer)
    assert "TEMPLATE" in text and 'PARAMETER stop "<|im_end|>"' in text

    # Another type of file may stand in the same folder.
    (tmp_path / "new" / "Modelfile").unlink()
    with pytest.raises(UserError, match="m.Modelfile: the name of the Modelfile that is written"):
        merging.read_arguments(
            [*flags[:3], str(tmp_path / "n"), "--gguf", str(tmp_path / "m.Modelfile")]
        )
    with pytest.raises(UserError, match="Modelfile.Modelfile exists; choose another file"):
        merging.read_arguments([*flags[:3], str(tmp_path / "again"), *flags[4:]])
    flags[-1] = str(tmp_path / "new" / "m.q8_0.gguf")
    merging.read_arguments([*flags[:3], str(tmp_path / "again"), *flags[4:]])
