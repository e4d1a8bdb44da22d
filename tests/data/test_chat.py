"""The assistant's tokens, and nothing else, are targets: golden strings, every template of trl,
awkward contents.
"""

import importlib.util
from pathlib import Path
import re

import jinja2
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.assistant_mask import chat_pieces, turn_format_of
from lora.data.batches import Rows
from lora.data.chat_template import use_chatml
from lora.data.examples import Example
from lora.data.tokenise import NO_TOKEN, encode, tokenise
from lora.evaluation.generate import after_header, answer_text, reasoning_ends
from lora.evaluation.text_metrics import without_reasoning
from lora.model.weights import add_tokens
from tests.conftest import tiny_llama

TURN = [{"role": "user", "content": "uone"}, {"role": "assistant", "content": "aone"}]
CHATS = {
    "one turn": TURN,
    "two turns": [
        *TURN,
        {"role": "user", "content": "utwo"},
        {"role": "assistant", "content": "atwo"},
    ],
    "system, blanks at the ends": [
        {"role": "system", "content": "sone"},
        {"role": "user", "content": " uone "},
        {"role": "assistant", "content": " aone \n"},
        {"role": "user", "content": "utwo"},
        {"role": "assistant", "content": "\natwo"},
    ],
    "both say the same": [{"role": role, "content": "aone"} for role in ("user", "assistant") * 2],
    "ends with the user": [*TURN, {"role": "user", "content": "utwo"}],
}
THINKING = [
    {"role": "user", "content": "uone"},
    {"role": "assistant", "content": "<think>\nr1\n</think>\n\naone"},
    {"role": "user", "content": "utwo"},
    {"role": "assistant", "content": "<think>\nr2\n</think>\n\natwo"},
]
CALLING = [
    {"role": "user", "content": "uone"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"x": "y"}}}],
    },
    {"role": "tool", "content": "found", "name": "look"},
    {"role": "assistant", "content": "atwo"},
]
NOTHING_FOUND = [*CALLING[:2], CALLING[2] | {"content": ""}, CALLING[3]]
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (  # nothing ends a turn
    "{% for m in messages %}"
    "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n### Response:\n"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
)


def tokenizer_with(template, *special):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    tokens = {"additional_special_tokens": list(special), "bos_token": "<s>"}
    tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer


def row_of(messages, tokenizer, max_length=4096, tools=None):
    (rendered,) = tokenise(
        [Example("chats.jsonl:7", messages=messages, tools=tools)],
        tokenizer,
        "lm",
        DataConfig(max_length=max_length),
        True,
    )
    return rendered


def said(row, tokenizer):
    """The texts of the runs of targets."""
    runs, before = [], False
    for target in row.targets:
        if target != NO_TOKEN:
            runs = [*runs[:-1], [*runs[-1], target]] if before else [*runs, [target]]
        before = target != NO_TOKEN
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    "template, special, expected",
    [
        (None, (), ["aone<|im_end|>", "atwo<|im_end|>"]),
        (GEMMA, ("<start_of_turn>", "<end_of_turn>"), ["aone<end_of_turn>", "atwo<end_of_turn>"]),
        (LLAMA2, (), [" aone <|endoftext|>", " atwo <|endoftext|>"]),
        (ALPACA, (), ["aone", "atwo<|endoftext|>"]),
    ],
    ids=["chatml", "gemma", "llama 2", "alpaca"],
)
def test_the_targets_of_four_templates_are_those_written_out_here(template, special, expected):
    tokenizer = tokenizer_with(
        template or AutoTokenizer.from_pretrained(EMBEDDED_BASE).chat_template, *special
    )
    (row,) = row_of(CHATS["two turns"], tokenizer).rows
    plain = tokenizer.apply_chat_template(CHATS["two turns"], tokenize=False)
    text = tokenizer.decode(row.tokens)
    assert text == plain or template is ALPACA and text == plain.rstrip() + tokenizer.eos_token
    assert row.tokens.count(tokenizer.bos_token_id) == plain.count("<s>")  # none is doubled
    assert said(row, tokenizer) == expected
    assert all(target in (NO_TOKEN, after) for target, after in zip(row.targets, row.tokens[1:]))


def templates_of_trl():
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    return sorted(path for path in folder.glob("*.jinja") if not path.stem.endswith("_training"))


def special_tokens(template):
    """What looks like a special token in a template: its tokenizer would have it as one."""
    return sorted(
        set(
            re.findall(
                r"<[|｜][^<>\s'\"]*[|｜]>|<\|\w+>|<\w+\|>|</?s>|<(?:start|end)_of_\w+>", template
            )
        )
    )


@pytest.mark.parametrize("path", templates_of_trl(), ids=lambda path: path.stem)
def test_on_every_template_of_trl_exactly_the_assistants_words_are_targets(path):
    template = path.read_text()
    tokenizer = tokenizer_with(template, *special_tokens(template))
    shows_text = False
    for name, messages in {
        **CHATS,
        "thinking": THINKING,
        "calling": CALLING,
        "nothing": NOTHING_FOUND,
    }.items():
        try:
            plain = tokenizer.apply_chat_template(messages, tokenize=False)
        except (jinja2.TemplateError, TypeError):
            continue  # a chat that this template refuses
        if name in CHATS and "aone" not in plain:
            with pytest.raises(
                UserError,
                match="chats.jsonl:7: message .: cannot tell where the chat template of ",
            ):
                row_of(messages, tokenizer)  # a template for images, which drops plain texts
            continue
        try:
            (row,) = row_of(messages, tokenizer).rows
        except UserError as error:
            # Never a wrong mask
            assert name not in CHATS and "chats.jsonl:7: message" in str(error)
            continue
        shows_text = True
        assert tokenizer.decode(row.tokens).startswith(plain.rstrip())
        runs = said(row, tokenizer)
        answers = [
            m["content"].rpartition("</think>")[2].strip()
            for m in messages
            if m["role"] == "assistant"
        ]
        assert len(runs) == len(answers)
        for run, answer, turn in zip(
            runs, answers, [m for m in messages if m["role"] == "assistant"]
        ):
            assert answer in run and not any(
                word in run for word in ("uone", "utwo", "sone", "found")
            )
            if "tool_calls" in turn:
                assert "look" in run and "y" in run and "atwo" not in run
            elif name in CHATS:
                # What is left of the run is what ends the turn, and what stands between the
                # generation prompt and the answer.
                earlier = messages[: next(i for i, m in enumerate(messages) if m is turn)]
                prompt = tokenizer.apply_chat_template(
                    earlier, tokenize=False, add_generation_prompt=True
                )
                if plain.startswith(prompt):
                    opening = plain[len(prompt) : plain.index(answer, len(prompt))]
                    run = run.removeprefix(opening)
                ending = run.replace(answer, "", 1).strip()
                assert not ending or ending in [
                    *special_tokens(template),
                    tokenizer.eos_token,
                    turn_format_of(tokenizer, template).ending,
                ]
    assert shows_text or path.stem in ("idefics3", "llava_next", "smolvlm")


def test_reasoning_is_learned_where_the_template_writes_it_and_only_the_answer_where_it_drops_it(
    qwen3,
):
    runs = said(row_of(THINKING, qwen3).rows[0], qwen3)
    assert runs == ["aone<|im_end|>", "<think>\nr2\n</think>\n\natwo<|im_end|>"]
    runs = said(row_of(CALLING, qwen3).rows[0], qwen3)
    assert runs == [
        '<tool_call>\n{"name": "look", "arguments": {"x": "y"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\natwo<|im_end|>",
    ]


def test_special_tokens_that_somebody_wrote_stay_text():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    messages = [
        {"role": "user", "content": "what is <|im_end|>?<|im_start|>"},
        {"role": "assistant", "content": "<|im_end|> ends a turn"},
    ]
    (row,) = row_of(messages, tokenizer).rows
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(row.tokens) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert row.tokens.count(end) == 2 and row.targets.count(end) == 1
    assert said(row, tokenizer) == ["<|im_end|> ends a turn<|im_end|>"]


@pytest.fixture
def qwen3():
    (path,) = (path for path in templates_of_trl() if path.stem == "qwen3")
    return tokenizer_with(path.read_text())


def calling(result, **arguments):
    calls = [{"type": "function", "function": {"name": "look", "arguments": arguments}}]
    return [
        CALLING[0],
        {"role": "assistant", "content": "", "tool_calls": calls},
        CALLING[2] | {"content": result},
    ]


def test_special_tokens_in_a_call_or_in_reasoning_stay_text_too(qwen3):
    end = qwen3.convert_tokens_to_ids("<|im_end|>")
    last = {"role": "assistant", "content": "atwo", "reasoning_content": "r <|im_end|> r"}
    (row,) = row_of([*calling("found", x="a <|im_end|> b"), last], qwen3).rows
    assert said(row, qwen3) == [
        '<tool_call>\n{"name": "look", "arguments": {"x": "a <|im_end|> b"}}\n</tool_call>'
        "<|im_end|>",
        "<think>\nr <|im_end|> r\n</think>\n\natwo<|im_end|>",
    ]
    assert row.targets.count(end) == 2
    written = tokenizer_with(
        "{% for m in messages %}{{ m.role }} {{ m.content }} {{ m.tool_calls }}\n{% endfor %}"
    )
    # As Python writes a list
    with pytest.raises(UserError, match=r"does more than print <\|im_end\|>"):
        row_of(calling("found", x="<|im_end|>"), written)


def test_what_is_said_next_may_stand_in_the_call_or_the_reasoning_before_it(qwen3):
    call = '<tool_call>\n{"name": "look", "arguments": {"x": 8}}\n</tool_call><|im_end|>'
    assert said(row_of(calling("8", x=8), qwen3).rows[0], qwen3) == [call]
    thinking = [
        THINKING[0],
        {"role": "assistant", "content": "<think>I look</think>aone"},
        TURN[0] | {"content": "ok"},
    ]
    embedded = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    assert said(row_of(thinking, embedded).rows[0], embedded) == [
        "<think>I look</think>aone<|im_end|>"
    ]


def test_of_an_answer_that_is_empty_after_its_reasoning_the_end_is_learned(qwen3):
    (row,) = row_of(
        [TURN[0], {"role": "assistant", "content": "<think>\n\n</think>\n\n"}], qwen3
    ).rows
    assert said(row, qwen3) == ["<think>\n\n</think>\n\n<|im_end|>"]


def test_blanks_that_the_tokenizers_offsets_leave_out_are_targets_too():
    messages = [TURN[0], {"role": "assistant", "content": "      indented \n  by two"}]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    (row,) = row_of(messages, tokenizer).rows
    # As in Llama 3
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert row_of(messages, tokenizer).rows == [row]
    assert said(row, tokenizer) == ["      indented \n  by two<|im_end|>"]


def test_private_use_characters_in_the_data_are_no_marks():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    messages = [
        {"role": "user", "content": "\ue000\ue001"},
        {"role": "assistant", "content": "\ue001x\ue000  y"},
    ]
    assert said(row_of(messages, tokenizer).rows[0], tokenizer) == ["\ue001x\ue000  y<|im_end|>"]


def test_pad_equal_to_eos_masks_no_end_token():
    tokenizer = tokenizer_with(LLAMA2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (row,) = row_of(CHATS["two turns"], tokenizer).rows
    assert row.targets.count(tokenizer.eos_token_id) == 2


def test_a_chat_that_is_cut_keeps_right_targets_or_is_dropped_and_counted():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    (whole,) = row_of(CHATS["two turns"], tokenizer).rows
    for length in range(2, len(whole.tokens) + 1):
        rendered = row_of(CHATS["two turns"], tokenizer, length)
        assert rendered.cut == (length < len(whole.tokens))
        targets = [target for row in rendered.rows for target in row.targets]
        assert targets == (
            whole.targets[: length - 1] + [NO_TOKEN]
            if any(t != NO_TOKEN for t in whole.targets[: length - 1])
            else []
        )


def test_a_chat_that_the_template_refuses_names_row_and_template():
    tokenizer = tokenizer_with("{{ raise_exception('roles must alternate') }}")
    tokenizer.name_or_path = "some/model"
    with pytest.raises(
        UserError,
        match="chats.jsonl:7: the chat template of some/model refuses it: roles must alternate",
    ):
        row_of(TURN, tokenizer)


def test_a_template_that_moves_the_text_is_an_error_and_never_a_wrong_mask():
    shouting = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(UserError, match="chats.jsonl:7: message 2: cannot tell where"):
        row_of(TURN, tokenizer_with(shouting.replace("upper", "reverse")))
    twice = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="chats.jsonl:7: message 2: cannot tell where"):
        row_of(TURN, tokenizer_with(twice))


def test_without_a_template_chatml_is_used_and_the_known_end_token_ends_a_turn(capsys):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    tokenizer.chat_template = None
    use_chatml(tokenizer)
    assert "no chat template: using ChatML, with <|im_end|>" in capsys.readouterr().out
    assert said(row_of(TURN, tokenizer).rows[0], tokenizer) == ["aone<|im_end|>"]
    char = AutoTokenizer.from_pretrained(EMBEDDED_BASE.parent / "char")
    use_chatml(char)
    assert said(row_of(TURN, char).rows[0], char) == ["aone<|endoftext|>"]
    char.chat_template = char.eos_token = None
    with pytest.raises(UserError, match="no chat template and no end token"):
        use_chatml(char)


def test_chatml_begins_with_bos_where_the_tokenizers_texts_do(capsys):
    tokenizer = tokenizer_with(None)
    begin = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = begin
    use_chatml(tokenizer)
    (row,) = row_of(TURN, tokenizer).rows
    assert row.tokens.count(tokenizer.bos_token_id) == 1
    assert row.tokens[0] == tokenizer.bos_token_id


def test_where_answers_do_not_follow_the_generation_prompt_it_is_known():
    never = set()
    for path in templates_of_trl():
        template = path.read_text()
        tokenizer = tokenizer_with(template, *special_tokens(template))
        if not turn_format_of(tokenizer, tokenizer.chat_template).answers_follow_prompt:
            never.add(path.stem)
    assert "deepseek_r1_distill" in never
    assert not never & {"qwen2_5", "qwen3", "llama3", "gemma", "gemma2", "gptoss", "phi3"}


def test_of_gpt_oss_only_the_last_message_is_the_answer(gptoss):
    text = "<|channel|>analysis<|message|>r<|end|><|start|>assistant<|channel|>final<|message|>a"
    tokens = gptoss(text, add_special_tokens=False).input_ids
    header_end = gptoss.convert_tokens_to_ids("<|message|>")
    assert gptoss.decode(after_header(tokens, header_end)) == "a"
    plain = gptoss("a b", add_special_tokens=False).input_ids
    assert after_header(plain, header_end) == plain
    assert reasoning_ends(gptoss) == [header_end]
    assert answer_text([], tokens, gptoss, [header_end]) == "a"
    for end in ("r", "r<|end|><|start|>assistant<|channel|>final"):
        text = "<|channel|>analysis<|message|>" + end
        cut = answer_text(
            [], gptoss(text, add_special_tokens=False).input_ids, gptoss, [header_end]
        )
        assert cut.startswith("<think>") and without_reasoning(cut) == ""


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")], ids=["text", "special"])
def test_reasoning_that_was_cut_has_no_answer(special):
    tokenizer = tokenizer_with(None, *special)
    ends = reasoning_ends(tokenizer)
    assert len(ends) == len(special) / 2

    def answer(prompt, text):
        tokens = [tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, text)]
        return without_reasoning(answer_text(*tokens, tokenizer, ends))

    assert answer("q", "4") == "4"
    assert answer("q", "<think>2+2</think>4") == answer("q<think>\n", "2+2</think>4") == "4"
    assert answer("q", "<think>2+2=") == answer("q<think>\n", "2+2=") == ""
    assert answer("q<think>\n\n</think>\n\n", "4 <think>") in ("4 <think>", "4 ")


def test_pieces_are_the_plain_render():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    messages = [*CHATS["two turns"], {"role": "user", "content": "<|im_end|>"}]
    pieces, _ = chat_pieces(Example("", messages=messages), tokenizer)
    assert "".join(piece.text for piece in pieces) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert [piece.literal for piece in pieces] == [False, True, False]
    assert all(len(tokens) == len(weights) for tokens, weights in encode(pieces, tokenizer))


def test_a_message_without_a_weight_in_it_is_no_target_and_another_weight_is_a_factor():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    example = Example("", messages=CHATS["two turns"], weight=3.0)
    rows = []
    for weights in ([], [1, 0, 1, 0.5], [1, 0.25, 1, 1]):
        example.message_weights = weights
        (result,) = tokenise([example], tokenizer, "lm", DataConfig(max_length=512), True)
        rows += result.rows
    assert [said(row, tokenizer) for row in rows] == [
        ["aone<|im_end|>", "atwo<|im_end|>"],
        ["atwo<|im_end|>"],
        ["aone<|im_end|>", "atwo<|im_end|>"],
    ]
    factors = []
    for row in rows:
        batch = Rows.from_rows([(row, 0)], "lm").batch([0])
        factors.append(dict(zip(batch.targets.tolist(), batch.loss_weights.tolist())))
    one, two = (tokenizer.encode(word, add_special_tokens=False) for word in ("one", "two"))
    assert factors[0][one[-1]] == factors[0][two[-1]] == 3.0
    assert factors[1][two[-1]] == 1.5 and one[-1] not in factors[1]
    assert factors[2][one[-1]] == 0.75 and factors[2][two[-1]] == 3.0


@pytest.fixture
def gptoss():
    (path,) = (path for path in templates_of_trl() if path.stem == "gptoss")
    template = path.read_text()
    return tokenizer_with(template, *special_tokens(template))


def test_of_gpt_oss_the_channels_that_follow_the_prompt_are_learned(gptoss):
    end, final = "<|end|>", "<|channel|>final<|message|>"
    assert said(row_of(CHATS["two turns"], gptoss).rows[0], gptoss) == [
        f"{final}aone",  # <|end|> is there, and the model does not stop at it
        f"{final}atwo<|return|>",
    ]
    thinking = [TURN[0], {"role": "assistant", "content": "aone", "thinking": "r1"}]
    assert said(row_of(thinking, gptoss).rows[0], gptoss) == [
        f"<|channel|>analysis<|message|>r1{end}<|start|>assistant{final}aone<|return|>"
    ]
    only_thought = [TURN[0], {"role": "assistant", "content": "<think>r1</think>"}]
    with pytest.raises(UserError, match="message 2: cannot tell where the chat template"):
        row_of(only_thought, gptoss)


@pytest.mark.parametrize("filter", ["upper", "truncate(12, true, '')", "length"])
def test_a_filter_that_sees_what_stands_for_a_special_token_is_refused(filter):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    template += " [{{ m.content | FILTER }}]<|im_end|>\n{% endfor %}"
    tokenizer = tokenizer_with(template.replace("FILTER", filter))
    looks_special = [{"role": "user", "content": "what is <|im_end|>?"}, TURN[1]]
    with pytest.raises(UserError, match=r"does more than print <\|im_end\|>, which the chat holds"):
        row_of(looks_special, tokenizer)


def test_a_turn_whose_end_cannot_be_found_is_refused():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ ' STOP' if 'longer' not in m.content else ' HALT' }}\n{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    assert "aone STOP" in said(row_of(TURN, tokenizer).rows[0], tokenizer)[0]
    longer = [TURN[0], {"role": "assistant", "content": "a longer one"}]
    with pytest.raises(UserError, match="does not end a turn with ' STOP' here as it does else"):
        row_of(longer, tokenizer)


def test_reasoning_that_the_template_does_not_print_is_counted(qwen3):
    assert row_of(THINKING, qwen3).unprinted == {"reasoning": 1}  # that of the earlier turn
    assert row_of(TURN, qwen3).unprinted == {}


LOOK = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}


@pytest.mark.parametrize(
    "name, role, tools, unprinted",
    [
        ("qwen3", "system", [LOOK], {}),
        ("qwen3", "developer", [LOOK], {"developer messages": 1}),
        ("deepseekv3", "developer", [LOOK], {"developer messages": 1, "tools": 1}),
        ("llama3_1", "developer", [LOOK], {}),
        ("llama3", "developer", [LOOK], {"tools": 1}),
        ("qwen3", "tool", None, {}),
        ("gemma4_v3", "tool", None, {"tool messages": 1}),
    ],
)
def test_messages_and_tools_that_the_template_does_not_print_are_counted(
    name, role, tools, unprinted
):
    (path,) = [path for path in templates_of_trl() if path.stem == name]
    template = path.read_text(encoding="utf-8")
    tokenizer = tokenizer_with(template, *special_tokens(template))
    # The last answer repeats the message, which must not hide that it is not there.
    other = {"role": role, "content": "22"}
    chat = [*TURN, other, TURN[1]] if role == "tool" else [other, *TURN]
    chat[-1] = {"role": "assistant", "content": "it is 22"}
    assert row_of(chat, tokenizer, tools=tools).unprinted == unprinted


def test_a_template_that_refuses_what_nobody_wrote_is_asked_for_the_chat_alone():
    """What is counted is rendered without tools and with another system message."""
    template = (
        "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}"
        "{% if messages[0].content not in ('on', 'off') %}{{ raise_exception('mode') }}{% endif %}"
    )
    chat = [{"role": "system", "content": "on"}, *TURN]
    assert row_of(chat, tokenizer_with(template + CHATML), tools=[LOOK]).unprinted == {}


# ------------------------------------------------------------- found by benchmarks/chat_masks.py

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOT_THOUGHT = [TURN[0], {"role": "assistant", "content": "<think>\n\n</think>\n\naone"}]


def test_reasoning_that_is_empty_is_learned_where_the_template_prints_it(qwen3):
    chatml = tokenizer_with(CHATML)
    block = "<think>\n\n</think>\n\n"
    for tokenizer in (chatml, qwen3):
        (row,) = row_of(NOT_THOUGHT, tokenizer).rows
        assert said(row, tokenizer) == [f"{block}aone<|im_end|>"]
    (row,) = row_of([TURN[0], {"role": "assistant", "content": block}], chatml).rows
    assert said(row, chatml) == [f"{block}<|im_end|>"]
    # What the prompt holds already is no target.
    prompted = tokenizer_with(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    (row,) = row_of(NOT_THOUGHT, prompted).rows
    assert said(row, prompted) == ["\n</think>\n\naone<|im_end|>"]


def test_a_short_answer_is_not_taken_for_a_letter_of_the_template(gptoss):
    thinking = [TURN[0], {"role": "assistant", "content": "<think>r1</think>a"}]
    assert said(row_of(thinking, gptoss).rows[0], gptoss) == [
        "<|channel|>final<|message|><think>r1</think>a<|return|>"
    ]


def test_what_a_template_writes_behind_every_turn_does_not_end_it():
    always = CHATML.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
    tokenizer = tokenizer_with(always)
    assert said(row_of(CHATS["two turns"], tokenizer).rows[0], tokenizer) == [
        "aone<|im_end|>",
        "atwo<|im_end|>",
    ]


def test_turns_that_end_in_different_words_are_refused():
    numbered = CHATML.replace("<|im_end|>", "</{{ loop.index }}>")
    with pytest.raises(UserError, match="does not end a turn with the same here as it does else"):
        row_of(TURN, tokenizer_with(numbered))


def test_what_a_filter_puts_between_the_prompt_and_the_answer_is_learned():
    lines = tokenizer_with(CHATML.replace("m.content", "m.content.split('\\n') | join(' / ')"))
    messages = [TURN[0], {"role": "assistant", "content": "\naone"}]
    assert said(row_of(messages, lines).rows[0], lines) == [" / aone<|im_end|>"]


def test_a_chat_that_holds_every_private_use_character_is_one_line():
    content = "".join(chr(code) for code in range(0xE000, 0xF900))
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    with pytest.raises(UserError, match=r"a.jsonl:1: it holds every character of U\+E000..U\+F8FF"):
        chat_pieces(Example("a.jsonl:1", messages=turns), tokenizer)


@pytest.mark.parametrize("token", ["a", "user", "assistant", "im_end"])
def test_an_added_token_that_is_a_part_of_the_templates_words_is_none_of_its_own(token):
    """A turn is found as before, and in a content the token is read as the new one."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    add_tokens(tiny_llama(), tokenizer, [token])
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"2 {token} 2"}]
    data = DataConfig(max_length=99)
    example = Example("a.jsonl:1", messages=turns)
    (result,) = tokenise([example], tokenizer, "lm", data, True)
    (row,) = result.rows
    added = tokenizer.convert_tokens_to_ids(token)
    assert added in row.targets and tokenizer.decode(
        [target for target in row.targets if target >= 0]
    ).startswith(f"2 {token} 2")


def test_a_token_that_the_template_writes_is_special():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    turn = "<|{{ m.role }}|>[B]{{ m.content }}end<x>"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    add_tokens(tiny_llama(), tokenizer, ["[B]", "<x>", "<y>"])
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    assert {"[B]", "<x>"} <= special and "<y>" not in special
