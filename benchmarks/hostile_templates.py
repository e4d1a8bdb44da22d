"""Chat templates that change, drop, double or move what a message says, for chat_masks.py."""

HEAD = "{% for m in messages %}"
TAIL = "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\nCONTENT<|im_end|>\n"


def chatml(content: str, prompt: str = PROMPT) -> str:
    """ChatML whose contents are written by an expression, or by more of a template."""
    if "{" not in content:
        content = "{{ " + content + " }}"
    return HEAD + TURN.replace("CONTENT", content) + TAIL + prompt


TEMPLATES = {
    # filters
    "upper": chatml("m.content | upper"),
    "lower": chatml("m.content | lower"),
    "title": chatml("m.content | title"),
    "trim": chatml("m.content | trim"),
    "line ends": chatml("m.content | replace('\\r\\n', '\\n')"),
    "two blanks": chatml("m.content | replace('  ', ' ')"),
    "letters": chatml("m.content | replace('e', 'a')"),
    "longer letters": chatml("m.content | replace('e', 'ee')"),
    "truncate": chatml("m.content | truncate(24, true)"),
    "cut": chatml("m.content[:30]"),
    "escape": chatml("m.content | e"),
    "urlencode": chatml("m.content | urlencode"),
    "tojson": chatml("m.content | tojson"),
    "indent": chatml("m.content | indent(2)"),
    "words": chatml("m.content.split() | join(' ')"),
    "lines": chatml("m.content.split('\\n') | join(' / ')"),
    "reverse": chatml("m.content | reverse"),
    "first sentence": chatml("m.content.split('.')[0]"),
    "without think": chatml("m.content.split('</think>')[-1]"),
    "no private use": chatml("m.content | replace('\\ue000', '') | replace('\\ue001', '')"),
    "last one upper": chatml("m.content | upper if loop.last else m.content"),
    "upper first letter": chatml("(m.content[:1] | upper) + m.content[1:]"),
    "length": chatml("[{{ m.content | length }}] {{ m.content }}"),
    "wordcount": chatml("{{ m.content }} ({{ m.content | wordcount }} words)"),
    # twice, moved, dropped
    "twice": chatml("{{ m.content }}\n{{ m.content }}"),
    "twice for the assistant": chatml(
        "{{ m.content }}{% if m.role == 'assistant' %}\nIn short: {{ m.content }}{% endif %}"
    ),
    "preview": chatml("{{ m.content[:8] }}: {{ m.content }}"),
    "answer before": ("Expected: {{ messages[-1].content }}\n" + chatml("m.content")),
    "question again": chatml(
        "{{ m.content }}{% if m.role == 'assistant' and loop.index0 %}"
        " (asked: {{ messages[loop.index0 - 1].content }}){% endif %}"
    ),
    "backwards": "{% for m in messages | reverse %}"
    + TURN.replace("CONTENT", "{{ m.content }}")
    + TAIL,
    "by role": (
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}\n{% endfor %}"
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|im_end|>\n{% endfor %}"
    ),
    "answers swapped": (
        "{% set said = messages | selectattr('role', 'equalto', 'assistant') | list | reverse "
        "| list %}{% set n = namespace(i=0) %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{{ said[n.i].content }}{% set n.i = n.i + 1 %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "sorted": (
        "{% for m in messages | sort(attribute='role') %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "last two": "{% for m in messages[-2:] %}"
    + TURN.replace("CONTENT", "{{ m.content }}")
    + TAIL
    + PROMPT,
    "no system": (
        "{% for m in messages if m.role != 'system' %}"
        + TURN.replace("CONTENT", "{{ m.content }}")
        + TAIL
        + PROMPT
    ),
    "said once": (
        "{% set n = namespace(seen=[]) %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content not in n.seen %}{{ m.content }}{% endif %}"
        "{% set n.seen = n.seen + [m.content] %}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "short ones only": chatml("{% if m.content | length < 60 %}{{ m.content }}{% endif %}"),
    "reasoning behind": chatml(
        "{{ m.content.split('</think>')[-1] }}{% if '</think>' in m.content %}"
        " because {{ m.content.split('</think>')[0] }}{% endif %}"
        "{% if m.thinking %} because {{ m.thinking }}{% endif %}"
    ),
    "reasoning twice": chatml(
        "{% if m.reasoning_content %}{{ m.reasoning_content }} {{ m.reasoning_content }}{% endif %}"
        "{% if m.thinking %}{{ m.thinking }} {% endif %}{{ m.content }}"
    ),
    "reasoning in the user's turn": (
        "{% for m in messages %}{% if m.role == 'assistant' and m.reasoning %}<|im_start|>user\n"
        "{{ m.reasoning }}<|im_end|>\n{% endif %}"
        + TURN.replace("CONTENT", "{{ m.content }}")
        + TAIL
        + PROMPT
    ),
    "calls as a list": chatml("{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}"),
    "calls as text of the user": (
        "{% for m in messages %}{% if m.tool_calls %}<|im_start|>user\n"
        "call {{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments.x }}"
        "<|im_end|>\n{% endif %}" + TURN.replace("CONTENT", "{{ m.content }}") + TAIL + PROMPT
    ),
    # prompts
    "no prompt": chatml("m.content", ""),
    "another prompt": chatml("m.content", "{% if add_generation_prompt %}ASSISTANT:{% endif %}"),
    "thinking prompt": chatml(
        "m.content",
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    ),
    "prompt of user": chatml(
        "m.content", "{% if add_generation_prompt %}<|im_start|>user\n{% endif %}"
    ),
    "counting prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }} of "
        "{{ messages | length }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }} of "
        "{{ messages | length + 1 }}\n{% endif %}"
    ),
    "prompt always": chatml("m.content", "<|im_start|>assistant\n"),
    "channel": (
        "{% for m in messages %}<|im_start|>{{ m.role }}"
        "{% if m.role == 'assistant' %} final{% endif %}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    ),
    # endings
    "endings by turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</{{ loop.index }}>\n"
        "{% endfor %}" + PROMPT
    ),
    "endings by length": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ ' STOP' if m.content | length < 30 else ' HALT' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "endings by blanks": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if '\\n' in m.content %}<|endoftext|>{% else %}<|im_end|>{% endif %}\n{% endfor %}"
        + PROMPT
    ),
    "ending in words": (
        "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### End\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}"
    ),
    "ending in front": (
        "{% for m in messages %}<|im_end|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|>assistant\n{% endif %}"
    ),
    "no ending": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
    "nothing between": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "only the last ends": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}<|im_end|>{% endif %}"
    ),
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
        "{% elif m.role == 'system' %}{{ '<<SYS>>' + m.content + '<</SYS>>' }}"
        "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
}
CHATML_END = ["<|im_end|>"]
ENDINGS = {
    "endings by turn": [f"</{number}>" for number in range(1, 40)],
    "endings by length": [" STOP", " HALT"],
    "endings by blanks": ["<|im_end|>", "<|endoftext|>"],
    "ending in words": ["### End"],
    "llama 2": ["</s>"],
    # What follows ends a turn there, as in GLM-4: the special token that begins the next one.
    "ending in front": CHATML_END,
    "no ending": [],
    "nothing between": [],
    "only the last ends": CHATML_END,
}
for name in TEMPLATES:
    if name not in ENDINGS:
        ENDINGS[name] = CHATML_END
