"""Answers: the same alone and in a batch, from a saved model and the one in memory, as transformers
gives them.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import UserError
from lora.config.schema import Config, fields_by_key
from lora.evaluation import generate
from lora.evaluation.generate import generate_answers, prompt_tokens, text_tokens
from lora.evaluation.stop_tokens import stop_tokens
import merge as merging
from tests.conftest import run, tiny_llama

TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
TEXTS = [
    "a",
    "the quick brown fox",
    "one two three four five six",
    "x " * 40,
    "7+8=",
    "fox",
    "never the same",
    "b c",
]


@pytest.fixture(scope="module")
def model():
    """Its answers differ from prompt to prompt: the weights are large."""
    model = tiny_llama(initializer_range=0.5)
    model.set_attn_implementation("packed")
    return model


def say(model, prompts, max_tokens=10**6, **settings):
    config = Config()
    config.training.batch_size, config.data.max_length = 1, max_tokens
    for name, value in (dict(max_new_tokens=12) | settings).items():
        setattr(fields_by_key(config)[name][0], name, value)
    return generate_answers(
        SimpleNamespace(model=model, tokenizer=TOKENIZER), prompts, config, torch.float32
    )


def prompts(texts=TEXTS):
    return [(f"row {i}", text_tokens(text, TOKENIZER)) for i, text in enumerate(texts, 1)]


def test_an_answer_does_not_depend_on_what_shares_its_batch_and_comes_in_the_order_of_the_prompts(
    model,
):
    together = say(model, prompts())
    assert say(model, prompts(), max_tokens=1) == together
    assert say(model, prompts()[::-1], max_tokens=150) == together[::-1]
    assert len(set(together)) > 4


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_the_greedy_tokens_of_a_batch_are_those_of_each_prompt_alone(attention, monkeypatch):
    """In fp32, beside transformers' own generation of one prompt, which pads nothing."""
    model = tiny_llama(initializer_range=0.5)
    alone = []
    for _, tokens in prompts():
        greedy = dict(max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
        said = model.generate(torch.tensor([tokens]), **greedy)[0, len(tokens) :].tolist()
        stops = [i for i, token in enumerate(said) if token in stop_tokens(model, TOKENIZER)]
        alone.append(said[: stops[0]] if stops else said)
    model.set_attn_implementation(attention)
    monkeypatch.setattr(generate, "plain_text", lambda tokens, tokenizer: tokens)
    assert len({len(tokens) for _, tokens in prompts()}) > 4 and len(set(map(tuple, alone))) > 4
    assert say(model, prompts()) == alone  # all in one batch
    assert say(model, prompts(), max_tokens=150) == alone  # in several


def test_an_answer_ends_before_a_stop_token(model):
    """With any of its own tokens as the stop token, an answer is what came before that token."""
    _, tokens = prompts()[1]
    plain = tiny_llama(initializer_range=0.5)  # the same weights, with transformers' own attention
    said = plain.generate(
        torch.tensor([tokens]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    said = said[0, len(tokens) :].tolist()
    for stop in said:
        model.generation_config.eos_token_id = stop
        expected = TOKENIZER.decode(said[: said.index(stop)], skip_special_tokens=True)
        assert say(model, prompts())[1] == expected


def test_the_model_is_afterwards_what_it_was_and_its_own_generation_config_is_set_aside(model):
    before = say(model, prompts())
    model.train()
    model.generation_config.update(repetition_penalty=9.0, do_sample=True, max_new_tokens=1)
    own = model.generation_config
    assert say(model, prompts()) == before
    assert (
        model.training
        and model.config._attn_implementation == "packed"
        and model.generation_config is own
    )
    model.eval()


def test_a_note_counts_the_answers_that_were_cut(capsys):
    model = tiny_llama(initializer_range=0.5)
    say(model, prompts()[:2])
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: 2 of 2 answers were cut at 12 tokens or the model's limit")
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    assert say(model, prompts()[:2]) == ["", ""]
    assert "note: " not in capsys.readouterr().err


def test_sampling_is_seeded(model):
    def draw(seed):
        return say(model, prompts(), temperature=1.5, seed=seed)

    assert draw(1) == draw(1) != draw(2)


def test_top_p_samples_from_the_likeliest_tokens(model):
    def draw(top_p):
        return say(model, prompts(), temperature=1.5, top_p=top_p, seed=1)

    # Of a share that the likeliest token alone has, what is drawn is the greedy answer.
    assert draw(1e-6) == say(model, prompts()) != draw(0.9) != draw(1.0)


def test_an_answer_has_the_room_that_the_model_has_left_and_a_prompt_that_leaves_none_is_an_error():
    model = tiny_llama(initializer_range=0.5, max_position_embeddings=40)
    rows = [("row 1", [5] * 38), ("row 2", [5] * 20)]
    counted = lambda rows: [len(TOKENIZER(text).input_ids) for text in say(model, rows)]
    assert counted(rows) == [counted(rows[:1])[0], counted(rows[1:])[0]] and counted(rows)[0] <= 3
    for tokens in ([5] * 40, []):
        with pytest.raises(
            UserError, match=f"row 2: a prompt of {len(tokens)} tokens; this model takes 1 to 39"
        ):
            say(model, [rows[0], ("row 2", tokens)])


NO_SPECIAL = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
REFUSING = "{{ raise_exception('no chats') }}"


@pytest.mark.parametrize(
    "template, own, expected",
    [
        (TOKENIZER.chat_template, None, [0, 2]),  # <|endoftext|> and <|im_end|>
        (TOKENIZER.chat_template, [5, 7], [0, 2, 5, 7]),
        (NO_SPECIAL, 0, [0]),
        (REFUSING, 0, [0]),
        (None, 0, [0]),
    ],
)
def test_an_answer_ends_at_the_tokens_that_template_and_model_name(template, own, expected):
    tokenizer, model = AutoTokenizer.from_pretrained(EMBEDDED_BASE), tiny_llama()
    tokenizer.chat_template, model.generation_config.eos_token_id = template, own
    assert stop_tokens(model, tokenizer) == expected


def test_a_prompt_ends_where_the_assistant_is_to_speak_and_special_tokens_in_it_are_mere_text():
    tokens = prompt_tokens("row", [{"role": "user", "content": "say <|im_end|>"}], None, TOKENIZER)
    assert (
        TOKENIZER.decode(tokens)
        == "<|im_start|>user\nsay <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokens.count(2) == 1


# -------------------------------------------------------------------------------- trained and saved

CHATS = [("what is red?", "a rose"), ("what is blue?", "the deep sea"), ("and green?", "grass")]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in CHATS))
    return str(path)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_reloaded_model_says_what_it_said_and_so_does_a_merged_one_in_plain_transformers(
    lora, configure, chats, tmp_path, monkeypatch
):
    import train

    tasks = []
    original = train.train
    monkeypatch.setattr(
        train, "train", lambda run, *rest: (tasks.append(run.task), original(run, *rest))
    )
    values = dict(
        base_model="embedded",
        task="lm",
        train_data=[chats],
        eval_data=[chats],
        learning_rate=3e-3,
        max_steps=20,
        eval_steps=20,
        save_steps=20,
    )
    artifact = run(configure(lora, **values)) / "final_artifact"
    arguments, config = evaluation.read_arguments(
        ["--checkpoint", str(artifact), "--test_set", chats]
    )
    task = evaluation.load(arguments.checkpoint, config, torch.device("cpu"))
    rows = [
        ("row", prompt_tokens("row", [{"role": "user", "content": q}], None, TOKENIZER))
        for q, _ in CHATS
    ]
    trained = say(tasks[0].model, rows)
    assert say(task.model, rows) == trained
    if lora:
        merged = tmp_path / "merged"
        merging.main(
            merging.read_arguments(
                ["--adapter", str(artifact), "--output", str(merged), "--dtype=float32"]
            )
        )
        model = AutoModelForCausalLM.from_pretrained(merged)
        for (_, tokens), text in zip(rows, trained):
            ends = dict(max_new_tokens=12, eos_token_id=stop_tokens(model, TOKENIZER))
            said = model.generate(torch.tensor([tokens]), do_sample=False, **ends)[0, len(tokens) :]
            assert TOKENIZER.decode(said, skip_special_tokens=True) == text


def test_a_chat_that_was_learned_by_heart_is_answered_word_by_word_and_stops_at_the_end_of_the_turn(
    configure, chats, capsys
):
    values = dict(
        task="lm",
        train_data=[chats],
        eval_data=[chats],
        gradient_accumulation_steps=1,
        eval_steps=60,
        save_steps=60,
    )
    artifact = run(configure(False, **values, max_steps=60)) / "final_artifact"
    capsys.readouterr()
    for question, answer in CHATS:
        arguments = evaluation.read_arguments(["--checkpoint", str(artifact), "--prompt", question])
        evaluation.main(*arguments, evaluation.read_request(*arguments))
        assert capsys.readouterr().out == answer + "\n"
