"""The measures against values worked out by hand; what eval.py reads, prints and writes; the
cite-or-refuse recipe.
"""

from collections import Counter
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import eval as evaluation
from lora.common import printable_text
from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.common.toml_json import read_file
from lora.config.schema import EvaluationConfig
from lora.config.set_keys import from_dict
from lora.data.readers import read
from lora.evaluation import retrieval, run_evaluation, text_metrics
from lora.evaluation.generate import embed
from lora.evaluation.run_evaluation import Results
from lora.model.load import load_task
from lora.tools import cite_or_refuse
from tests.conftest import run

SAMPLES = ROOT / "assets" / "samples"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(*flags):
    arguments = evaluation.read_arguments([str(flag) for flag in flags])
    evaluation.main(*arguments, evaluation.read_request(*arguments))


# -------------------------------------------------------------------------------- measures of texts

SETTINGS = EvaluationConfig(
    refusal_pattern="^I cannot", citation_pattern=r"\[\d+\]", json_keys=["a", "b"]
)


@pytest.mark.parametrize(
    "text, number",
    [
        ("so\n#### 1,234", 1234),
        ("#### $ 1 000.50 crowns", 1000.5),
        ("#### 3 then #### -7.", -7),
        ("#### 18.0", 18),
        ("#### A heading", None),
        ("#### 5\n#### none", None),
        ("#### 1.2.3", None),
        ("#### 1/2", None),
        ("#### 12 / 7", None),
        ("#### 1,000/3", None),
        ("#### 0.5/2", None),
        ("#### 2^10", None),
        ("#### 2**10", None),
        ("#### $20/hour", 20),
        ("#### 5 apples", 5),
        ("18", None),
        ("#### 1\u202f234", 1234),
        ("#### 12\u00a0345 crowns", 12345),
        ("#### 7 000 000", 7000000),
        ("#### \u22125", -5),
        ("#### .5", 0.5),
        ("#### 5, 6", None),
        ("#### 12 3 left", None),
        ("#### 12. 5 apples", None),
        ("#### 1.234,5", None),
        ("#### 3 1/2", None),
        ("#### 1e5", None),
        ("#### 10 - 5 = 5", None),
        ("#### 5\nThat is 2 + 3.", 5),
        ("#### 5 (of 6)", 5),
        ("#### 5\n\n6 is wrong.", 5),
    ],
)
def test_the_number_after_the_last_hashes_is_the_answer(text, number):
    assert text_metrics.final_number(text) == number


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("9\n#### 9", "8+1\n#### 9.0", dict(exact_answer=0, exact_match=1)),
        ("it is 9", "#### 9", dict(exact_match=0)),
        (" a b ", "a b", dict(exact_answer=1, refusal_rate=0, refusal_accuracy=1)),
        (
            "I cannot say",
            "yes [1]",
            dict(refusal_rate=1, refusal_accuracy=0, citation_rate=0, citation_accuracy=0),
        ),
        ("yes [2] [1]", "no [1], [2]", dict(citation_rate=1, citation_accuracy=1, exact_answer=0)),
        ("yes [2]", "no [1], [2]", dict(citation_accuracy=0, citation_precision=1)),
        ("yes [2] [3] [3]", "no [2]", dict(citation_accuracy=0, citation_precision=0.5)),
        # An invented citation where a refusal was due
        ("yes [1]", "I cannot say", dict(refusal_accuracy=0, citation_precision=0)),
        ('{"a": 1, "b": 2, "c": 3}', "x", dict(json_validity=1)),
        ('```json\n{"a": 1, "b": 2}\n```', "x", dict(json_validity=1)),
        ('\n```\n{"a": [\n1], "b": "``` "}\n``` ', "x", dict(json_validity=1)),
        ('```json\n{"a": 1}\n```', "x", dict(json_validity=0)),
        ('```json\n{"a": 1, "b": 2}\n', "x", dict(json_validity=0)),
        ('{"a": 1}', "x", dict(json_validity=0)),
        ('["a", "b"]', "x", dict(json_validity=0)),
        ('{"a": NaN, "b": -Infinity}', "x", dict(json_validity=0)),
        ("{", "x", dict(json_validity=0)),
    ],
)
def test_the_measures_of_an_answer_are_those_counted_by_hand(answer, reference, expected):
    measured = text_metrics.score_answer(answer, reference, SETTINGS, None)
    assert {name: measured[name] for name in expected} == expected


def test_a_measure_is_taken_only_where_it_is_configured_and_applies():
    assert text_metrics.score_answer("a", "b", EvaluationConfig(), None).keys() == {"exact_answer"}
    assert (
        not {"citation_rate", "citation_precision", "exact_match"}
        & text_metrics.score_answer("a", "I cannot", SETTINGS, None).keys()
    )
    assert text_metrics.mean_scores([{"x": 1.0}, {"x": 0.0, "y": 1.0}]) == {"x": 0.5, "y": 1.0}


def test_a_block_of_reasoning_is_no_part_of_an_answer():
    settings = EvaluationConfig(refusal_pattern="^No source", json_keys=["a"])
    answer = '<think>\n\n</think>\n\n{"a": 1}'
    measured = text_metrics.score_answer(answer, '{"a": 1}', settings, None)
    assert measured["exact_answer"] == measured["json_validity"] == 1.0
    cut = "<think>Perhaps 4. #### 4"
    assert not text_metrics.passes(cut, "#### 4", settings)
    assert text_metrics.score_answer(cut, "#### 4", settings, None)["exact_match"] == 0.0
    refusal = "<think>They do not say.</think>\n\nNo source says it."
    assert text_metrics.score_answer(refusal, "No source.", settings, None)["refusal_rate"] == 1.0
    assert text_metrics.passes(refusal, "No source.", settings)


def test_rouge_is_f1_of_words_pairs_and_subsequences():
    measured = text_metrics.score_answer(
        "The cat sat down", "the cat ran", EvaluationConfig(), text_metrics.rouge_scorer()
    )
    assert measured["rouge1"] == pytest.approx(2 * 2 / (4 + 3)) == measured["rougeL"]
    assert measured["rouge2"] == pytest.approx(2 * 1 / (3 + 2))


@pytest.mark.parametrize("text", ["日本語です", "Это возможно", "école"])
def test_rouge_of_the_same_text_is_1_in_every_script(text):
    measured = text_metrics.score_answer(text, text, SETTINGS, text_metrics.rouge_scorer())
    assert measured["rouge1"] == measured["rougeL"] == 1.0
    half = text_metrics.rouge_scorer().score("東京大学", "東京")
    assert half["rouge1"].recall == 0.5


def test_words_of_ascii_are_those_of_rouge_score():
    from rouge_score.tokenizers import DefaultTokenizer

    text = "It's the CATS' 1,000.50 x_y; re-use ''well''\n#### 7"
    own = text_metrics.RougeTokenizer().tokenize(text)
    assert own == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize(
    "answer, reference, passed",
    [
        ("#### 4", "2+2\n#### 4", True),
        ("2+2\n#### 5", "2+2\n#### 4", False),
        ("I cannot tell.", "I cannot say.", True),
        ("Yes.", "I cannot say.", False),
        ("Well:  THE\nblue one!", "the blue one", True),
        ("the red one", "the blue one", False),
        ("I do not know, perhaps 150.", "no", False),
        ("I do not know, perhaps 150.", "15", False),
        ("It is (15).", "15", True),
        ("It is 5.", "5", True),
        ("It is 0.5.", "5", False),
        ("It is 5.25.", "5", False),
        ("About 1,500.", "500", False),
        ("それは東京です", "東京", True),
        ("それはParisです", "Paris", True),
        ("서울입니다", "서울", True),
        ("Это возможно.", "возможно", True),
        ("Это невозможно.", "возможно", False),
        ("никогда", "да", False),
        ("L'école", "école", True),
        ("L'e\u0301cole", "école", True),
        ("L'école", "cole", False),
        ("não", "o", False),
    ],
)
def test_a_critical_question_passes_by_number_by_refusal_or_by_text(answer, reference, passed):
    assert text_metrics.passes(answer, reference, SETTINGS) == passed


def test_what_goes_to_the_terminal_holds_no_commands_for_it():
    text = "a\x1b[31mred\x1b[0m \x1b]0;title\x07b\r\x08\x9b\u202ec\td\ne"
    assert printable_text.printable(text) == "ared bc\td\ne"


def test_questions_are_read_in_every_form_of_chat_and_ask_for_the_last_answer(tmp_path):
    chat = [
        dict(role=role, content=role[0] + str(i))
        for i, role in enumerate(["user", "assistant"] * 2)
    ]
    rows = [
        {"messages": chat},
        {"question": "q", "answer": "r"},
        {"instruction": "i", "input": "j", "output": "o"},
    ]
    questions = text_metrics.read_questions(write(tmp_path / "q.jsonl", rows))
    assert [[m["content"] for m in q.messages] for q in questions] == [
        ["u0", "a1", "u2"],
        ["q"],
        ["i\n\nj"],
    ]
    assert [q.reference for q in questions] == ["a3", "r", "o"]
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    for row, message in (
        ({"text": "t"}, "a text has no question"),
        ({"messages": [chat[1]]}, "expected a question before it"),
        ({"messages": [chat[0], calls]}, "the last answer is a tool call, or has no text"),
        ({"messages": [chat[0], calls | {"content": "Let me look."}]}, "is a tool call, or has"),
        ({"messages": [chat[0], {**calls, "content": "<think>t</think>"}]}, "a tool call, or has"),
    ):
        with pytest.raises(UserError, match=f"q.jsonl:1: .*{message}"):
            text_metrics.read_questions(write(tmp_path / "q.jsonl", [row]))


# ---------------------------------------------------------------------------------------- retrieval


def test_retrieval_measures_are_those_counted_by_hand():
    # Of twelve documents; the query looks along the first
    angles = np.radians(np.arange(0, 120, 10))
    corpus = np.stack([np.cos(angles), np.sin(angles)], 1)
    ranks = retrieval.relevant_ranks(corpus[[0, 0]], corpus, [{1, 11}, {0}])
    assert ranks == [[2, 12], [1]]
    numbers = retrieval.metrics(ranks)
    assert numbers["recall@1"] == 0.5 and numbers["recall@5"] == numbers["recall@10"] == 0.75
    assert numbers["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    assert numbers["ndcg@10"] == pytest.approx((1 / math.log2(3) / (1 + 1 / math.log2(3)) + 1) / 2)


@pytest.mark.parametrize("kind", ["tiny_base", "tiny_encoder"])
def test_an_embedding_is_the_mean_over_the_hidden_states_of_the_text_alone(
    kind, request, configure
):
    config = configure(
        False, base_model=str(request.getfixturevalue(kind)), max_length=16, batch_size=2
    )
    task = load_task(config, torch.float32)
    texts = ["some words", "a", "many more words than that " * 3, "b c"]
    embeddings = embed(task, texts, config, torch.float32)
    alone = AutoModel.from_pretrained(config.model.base_model).eval()
    for text, embedding in zip(texts, embeddings, strict=True):
        encoded = task.tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            mean = alone(**encoded).last_hidden_state[0].mean(0)
        torch.testing.assert_close(
            torch.from_numpy(embedding), mean / mean.norm(), rtol=0, atol=1e-5
        )


def test_embeddings_that_are_not_finite_are_refused(configure):
    config = configure(False, max_length=16)
    task = load_task(config, torch.float32)
    with torch.no_grad():
        next(task.model.parameters()).fill_(math.inf)
    with pytest.raises(UserError, match="embeddings are not finite in torch.float32; add --dtype"):
        embed(task, ["a b"], config, torch.float32)


def test_a_mistake_in_corpus_or_queries_names_the_line(tmp_path):
    good = [{"id": 1, "text": "one"}, {"id": "b", "text": "two"}]
    corpus = retrieval.read_corpus(write(tmp_path / "c.jsonl", good))
    assert corpus == {"1": "one", "b": "two"}
    queries = [{"query": "q", "relevant": ["b", 1]}, {"query": "r", "relevant": "b"}]
    assert retrieval.read_queries(write(tmp_path / "q.jsonl", queries), corpus) == [
        ("q", {0, 1}),
        ("r", {1}),
    ]
    for row, message in (
        ({"id": "1", "text": "three"}, "id 1 occurs twice"),
        ({"id": "c", "text": ""}, "text is ''"),
        ({"text": "three"}, "id None; expected a text or an integer"),
    ):
        with pytest.raises(UserError, match=f"c.jsonl:3: {message}"):
            retrieval.read_corpus(write(tmp_path / "c.jsonl", [*good, row]))
    for row, message in (
        ({"query": "q", "relevant": ["x"]}, "relevant names x, which is no id of the corpus"),
        ({"query": "q", "relevant": []}, r"relevant is \[\]; expected a list of ids"),
        ({"relevant": ["b"]}, "query is None"),
    ):
        with pytest.raises(UserError, match=f"q.jsonl:2: {message}"):
            retrieval.read_queries(write(tmp_path / "q.jsonl", [queries[0], row]), corpus)


# ------------------------------------------------------------------------------------------ eval.py


def test_loss_and_perplexity_do_not_depend_on_the_batch_size(tmp_path):
    numbers = []
    for batch_size in (1, 3, 16):
        out = tmp_path / f"{batch_size}.json"
        flags = (
            "--base_model=embedded",
            "--eval_data",
            SAMPLES / "chat.jsonl",
            f"--batch_size={batch_size}",
        )
        evaluate(*flags, "--max_length=512", "--output", out)
        numbers.append(json.loads(out.read_text()))
    for other in numbers[1:]:  # fp32 sums in another order
        assert other == pytest.approx(numbers[0], rel=1e-5)
    measures = {"targets", "loss", "perplexity", "token_accuracy", "bits_per_byte"}
    assert measures == numbers[0].keys()


def test_one_call_measures_loss_answers_critical_questions_and_retrieval(
    tiny_base, tmp_path, capsys
):
    queries = write(
        tmp_path / "queries.jsonl", [{"query": "when is it open", "relevant": ["opening-hours"]}]
    )
    config = tmp_path / "c.toml"
    config.write_text("[evaluation]\nrefusal_pattern = '^The sources'\nmax_new_tokens = 5\n")
    out = tmp_path / "numbers.json"
    evaluate(
        *(
            "--config",
            config,
            "--base_model",
            tiny_base,
            "--max_length=512",
            "--eval_data",
            SAMPLES / "text.txt",
        ),
        *(
            "--test_set",
            SAMPLES / "questions.jsonl",
            "--critical_questions",
            SAMPLES / "critical.jsonl",
        ),
        *(
            "--test_queries",
            queries,
            "--corpus",
            SAMPLES / "corpus.jsonl",
            "--output",
            out,
            "--json_keys=a",
        ),
    )
    numbers = json.loads(out.read_text())
    assert {
        *(
            "loss",
            "perplexity",
            "bits_per_byte",
            "exact_answer",
            "exact_match",
            "rouge1",
            "rouge2",
            "rougeL",
        ),
        *(
            "refusal_rate",
            "json_validity",
            "critical/exact_match",
            "critical/refusal_accuracy",
            "critical/passed",
        ),
        *("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"),
    } < numbers.keys()
    assert "citation_rate" not in numbers
    assert [row["passed"] for row in numbers["critical_questions"]] == [False] * 3
    shown = capsys.readouterr().out
    assert shown.count("FAIL  ") == 3 and re.search(r"critical/passed 0\.000000\n", shown)
    rows = [
        json.loads(line)
        for line in (tmp_path / "numbers.generations.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8 + 3 and rows[0]["where"].endswith("questions.jsonl:1")
    assert rows[0]["prompt"].endswith("<|im_start|>assistant\n") and rows[0]["reference"].endswith(
        "#### 32"
    )
    assert {"answer", "exact_match", "json_validity"} < rows[0].keys() and rows[-1][
        "passed"
    ] is False


def test_without_rouge_score_one_line_says_so_and_the_rest_is_measured(
    tiny_base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    flags = ("--base_model", tiny_base, "--max_length=256", "--max_new_tokens=2")
    evaluate(*flags, "--test_set", SAMPLES / "questions.jsonl", "--output", tmp_path / "n.json")
    assert "pip install 'plainlora[eval]'" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers.pop("questions") > 0
    assert numbers == {"exact_answer": 0.0, "exact_match": 0.0}


def test_bits_per_byte_are_those_of_the_text(tiny_base, tmp_path):
    text = "Grüße: 7+8=15"
    data = write(tmp_path / "t.jsonl", [{"text": text}])
    evaluate(
        "--base_model",
        tiny_base,
        "--max_length=64",
        "--eval_data",
        data,
        "--output",
        tmp_path / "n.json",
    )
    numbers = json.loads((tmp_path / "n.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    ids = tokenizer(text).input_ids
    asked = len(ids[1:]) + 1  # all but the first token, and the end token, which is no text
    size = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert numbers["bits_per_byte"] == pytest.approx(numbers["loss"] * asked / math.log(2) / size)


def test_a_checkpoint_brings_its_patterns_along_and_flags_beat_them(configure):
    artifact = (
        run(configure(True, task="lm", max_steps=1, refusal_pattern="^no", json_keys=["k"]))
        / "final_artifact"
    )
    _, config = evaluation.read_arguments(
        ["--checkpoint", str(artifact), "--json_keys", "x", "y", "--temperature=0.5"]
    )
    assert config.evaluation == EvaluationConfig(
        refusal_pattern="^no", json_keys=["x", "y"], temperature=0.5
    )


def test_a_base_beside_a_checkpoint_that_is_a_whole_model_is_refused(configure, tiny_base):
    """The base would be evaluated, in the checkpoint's name."""
    artifact = run(configure(False, task="lm", max_steps=1)) / "final_artifact"
    with pytest.raises(UserError, match="holds a whole model; leave it out"):
        evaluation.read_arguments(["--checkpoint", str(artifact), "--base_model", str(tiny_base)])


def test_ignore_chat_template_goes_on_with_the_text(capsys):
    start = "From left to right: 7+8-6\n7+8=15\n"
    flags = ("--base_model=embedded", "--max_length=256", "--max_new_tokens=30")
    evaluate(*flags, "--prompt", start, "--ignore_chat_template")
    assert re.match(r"\d+-\d=\d+\n", capsys.readouterr().out)


BASE = ["--base_model=embedded"]
MISTAKES = [
    ([*BASE, "--prompt= "], "--prompt: expected a text that is not empty"),
    ([*BASE, "--prompt=a", "--eval_data=b"], "--prompt goes with no files"),
    ([*BASE, "--ignore_chat_template", "--eval_data=b"], "--ignore_chat_template is for --prompt"),
    ([*BASE, "--prompt=a", "--json_keys=name,age"], "json_keys name,age: expected keys with a"),
    ([*BASE, "--test_queries=a"], "--test_queries and --corpus go together"),
    (
        [*BASE, "--prompt=a", "--citation_pattern=["],
        r"citation_pattern = '\[': not a regular expression",
    ),
    ([*BASE, "--task=score", "--critical_questions=a"], "a scorer gives no answers"),
    ([*BASE, "--test_set=/no.jsonl"], "/no.jsonl: No such file"),
    (["--config=a", "--checkpoint=b"], "leave --config out"),
    ([*BASE, "--eval_data=arithmetic:test:9", "--output=/tmp"], "--output /tmp: a folder"),
    ([*BASE, "--temperature=-1", "--prompt=a"], "--temperature = -1.0: expected a number >= 0"),
    ([*BASE, "--top_p=0.9", "--prompt=a"], "top_p = 0.9 is for sampling, .* add --temperature"),
    ([*BASE, "--top_p=0", "--temperature=1", "--prompt=a"], "--top_p = 0.0: expected a number > 0"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        evaluation.read_request(*evaluation.read_arguments(flags))
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------- cite or refuse


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """(folder with train.jsonl and test.jsonl, the sentences of the sample corpus)."""
    folder = tmp_path_factory.mktemp("recipe") / "cited"
    corpus = str(SAMPLES / "corpus.jsonl")
    cite_or_refuse.main([corpus, "--output", str(folder), "--eval_fraction=0.3"])
    documents = cite_or_refuse.read_documents([corpus])
    return folder, [sentence for document in documents for sentence in document.sentences]


def parts(row):
    """(the shown passages, the requested opening, the answer) of a row, read from its text."""
    system, user, assistant = (message["content"] for message in row["messages"])
    *sources, blank, question = user.split("\n")
    passages = [re.fullmatch(rf"\[{i}\] (.*)", source)[1] for i, source in enumerate(sources, 1)]
    quoted = re.search('"(.*)"', question)
    return passages, quoted and quoted[1], assistant


def rows_of(recipe, side):
    return [json.loads(line) for line in (recipe[0] / f"{side}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("side", ["train", "test"])
def test_an_answer_is_quoted_from_the_passage_it_cites_and_a_refused_one_stands_in_none(
    recipe, side
):
    counts = Counter(row["category"] for row in rows_of(recipe, side))
    for row in rows_of(recipe, side):
        if row["category"] == "generic":
            continue
        passages, opening, answer = parts(row)
        sentence = next(sentence for sentence in recipe[1] if sentence.startswith(opening))
        if row["category"] == "refusal":
            assert answer == "The sources do not say."
            assert not any(
                opening in passage or sentence[len(opening) + 1 :] in passage
                for passage in passages
            )
        else:
            quote, number = re.fullmatch(r"(.*) \[(\d+)\]\.?", answer).groups()
            asks_for_words = re.match(
                "What follows|Quote|How", row["messages"][1]["content"].split("\n")[-1]
            )
            assert (row["category"] == "quotation") == bool(asks_for_words)
            if row["category"] == "quotation":
                assert f"{opening} {quote}" == sentence
            else:
                assert quote == "It stands in"
            assert sentence in passages[int(number) - 1]
            assert sum(sentence in passage for passage in passages) == 1
        assert 1 <= len(passages) <= 3
    about_sentences = counts["quotation"] + counts["reference"] + counts["refusal"]
    assert counts["refusal"] == round(0.3 * about_sentences) > 0
    assert counts["generic"] == round(0.1 * about_sentences) > 0
    assert min(counts["quotation"], counts["reference"]) > 0


def test_no_document_is_on_both_sides(recipe):
    shown = {
        side: {p for row in rows_of(recipe, side) for p in parts(row)[0]}
        for side in ("train", "test")
    }
    documents = cite_or_refuse.read_documents([str(SAMPLES / "corpus.jsonl")])
    sides = [
        {
            side
            for side, passages in shown.items()
            if any(passage in " ".join(document.sentences) for passage in passages)
        }
        for document in documents
    ]
    assert sides.count({"test"}) == 4 and sides.count({"train"}) == 8


def test_the_references_as_answers_are_perfect_under_the_patterns_of_the_config(recipe):
    settings = from_dict(read_file(ROOT / "configs" / "cite_or_refuse.toml"), "").evaluation
    questions = text_metrics.read_questions(str(recipe[0] / "test.jsonl"))
    rouge = text_metrics.rouge_scorer()
    numbers = text_metrics.mean_scores(
        [text_metrics.score_answer(q.reference, q.reference, settings, rouge) for q in questions]
    )
    assert numbers.pop("refusal_rate") == pytest.approx(0.35, abs=0.05)
    expected = {"citation_accuracy", "citation_precision", "refusal_accuracy", "rougeL"}
    assert set(numbers.values()) == {1.0} and expected < numbers.keys()
    assert all(text_metrics.passes(q.reference, q.reference, settings) for q in questions)


def test_the_recipe_gives_the_same_files_for_the_same_seed_and_others_for_another(recipe, tmp_path):
    for name, seed in (("again", 42), ("other", 43)):
        flags = ["--output", str(tmp_path / name), "--seed", str(seed), "--eval_fraction=0.3"]
        cite_or_refuse.main([str(SAMPLES / "corpus.jsonl"), *flags])
    for side in ("train.jsonl", "test.jsonl"):
        first, again, other = (
            (folder / side).read_bytes()
            for folder in (recipe[0], tmp_path / "again", tmp_path / "other")
        )
        assert first == again != other


GERMAN = """
instructions = ["Antworte nur aus den Quellen."]
sources = ["[{number}] {title} ({date}): {text}"]
quotation_questions = ["Wie geht es weiter nach «{opening}»?", "Zitiere nach «{opening}»."]
quotation_answers = ["«{rest}» ({title}, {date}) [{number}]"]
reference_questions = ["Wo steht «{opening}»?"]
reference_answers = ['{"Titel": "{title}", "Datum": "{date}"}']
refusal_answers = ["Das steht nicht in den Quellen.", "Davon sagen die Quellen nichts."]
generic_questions = ["Erzähl etwas."]
generic_answers = ["Das steht nicht in den Quellen. Wonach fragst du?"]
"""


def test_templates_may_be_of_any_language_and_name_the_rows_title_and_date(tmp_path, capsys):
    (tmp_path / "de.toml").write_text(GERMAN)
    rows = [json.loads(line) for line in (SAMPLES / "corpus.jsonl").read_text().splitlines()]
    rows = [
        {**row, "title": f"{{date}} {row['id']}", "date": 1900 + i} for i, row in enumerate(rows)
    ]
    corpus = write(tmp_path / "corpus.jsonl", rows)
    default = str(cite_or_refuse.DEFAULT_TEMPLATES)
    flags = ["--output", str(tmp_path / "out"), "--templates", default, str(tmp_path / "de.toml")]
    cite_or_refuse.main([corpus, *flags])
    languages, refusals = Counter(), set()
    for side in ("train", "test"):
        for line in (tmp_path / "out" / f"{side}.jsonl").read_text().splitlines():
            chat = json.loads(line)
            instruction, question, answer = [message["content"] for message in chat["messages"]]
            german = instruction == "Antworte nur aus den Quellen."
            languages[german] += 1
            assert german == bool(re.match(r"\[1\] \{date\} [\w-]+ \(19\d\d\): ", question))
            if german and chat["category"] == "quotation":
                rest, title, date, number = re.fullmatch(
                    r"«(.+)» \((.+), (\d+)\) \[(\d)\]", answer
                ).groups()
                assert f"[{number}] {title} ({date}): " in question and rest in question
            if german and chat["category"] == "reference":
                reference = json.loads(answer)
                assert f"{reference['Titel']} ({reference['Datum']}): " in question
            if german and chat["category"] == "refusal":
                refusals.add(answer)
            if german and chat["category"] == "generic":
                assert question.endswith("\n\nErzähl etwas.") and answer.endswith(
                    "Wonach fragst du?"
                )
    assert min(languages[True], languages[False]) > 20 and len(refusals) == 2
    shown = capsys.readouterr().out
    assert re.search(
        r"train.jsonl: 10 documents, \d+ questions \(\d+ generic, \d+ quotation, ", shown
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ("{title}, {date}", "{titel}"),
            r"jsonl:\d+: no titel for the template '«{rest}» \({titel}",
        ),
        (
            ("Erzähl etwas.", "Erzähl von {title}."),
            "--templates: no title for the template 'Erzähl",
        ),
        (
            ("generic_answers", "generic_refusals"),
            "generic_answers = None; expected a list of texts",
        ),
        (('["Wo steht «{opening}»?"]', '"Wo?"'), "reference_questions = 'Wo\\?'; expected a list"),
        (("Wo steht «{opening}»?", "Wo?"), "reference_questions: 'Wo\\?' lacks {opening}"),
        (("Erzähl etwas.", " "), "generic_questions is ' '; expected a text"),
        (("[", "{"), "de.toml: cannot be read"),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_line(tmp_path, change, message):
    (tmp_path / "de.toml").write_text(GERMAN.replace(*change))
    rows = [json.loads(line) for line in (SAMPLES / "corpus.jsonl").read_text().splitlines()]
    corpus = write(tmp_path / "corpus.jsonl", [{**row, "title": "T", "date": "D"} for row in rows])
    flags = ["--output", str(tmp_path / "out"), "--templates", str(tmp_path / "de.toml")]
    with pytest.raises(UserError, match=message):
        cite_or_refuse.main([corpus, *flags])
    assert not (tmp_path / "out").exists()


def test_a_row_without_the_title_that_a_template_names_is_one_line(tmp_path):
    (tmp_path / "de.toml").write_text(GERMAN)
    flags = ["--output", str(tmp_path / "out"), "--templates", str(tmp_path / "de.toml")]
    with pytest.raises(
        UserError, match=r"corpus.jsonl:\d+: no title for the template .* to the row"
    ):
        cite_or_refuse.main([str(SAMPLES / "corpus.jsonl"), *flags])


def test_a_corpus_that_is_too_small_leaves_nothing_behind(tmp_path):
    (tmp_path / "one.txt").write_text("One document only.")
    arguments = [str(tmp_path / "one.txt"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="1 documents; expected at least 4"):
        cite_or_refuse.main(arguments)
    short = write(tmp_path / "short.jsonl", [{"text": f"Too short {i}."} for i in range(9)])
    arguments = [short, "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="no sentence of 8 words"):
        cite_or_refuse.main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "short.jsonl"]


def test_a_heading_and_a_hard_wrapped_line_are_no_part_of_a_sentence():
    text = "# A heading\n\nThe first sentence goes\nover two lines. And the second! Is it?\n\n\nYes"
    assert cite_or_refuse.sentences_of(text) == (
        *(
            "# A heading",
            "The first sentence goes over two lines.",
            "And the second!",
            "Is it?",
            "Yes",
        ),
    )


def test_every_sample_file_is_read():
    for name, count in (
        ("chat.jsonl", 8),
        ("questions.jsonl", 8),
        ("critical.jsonl", 3),
        ("text.txt", 1),
        ("corpus.jsonl", 12),
    ):
        assert len(read([str(SAMPLES / name)], "lm")) == count
    assert all(
        text_metrics.final_number(q.reference)
        for q in text_metrics.read_questions(str(SAMPLES / "questions.jsonl"))
    )


# ----------------------------------------------------------------------------- foreign names, files


def test_the_names_of_test_sets_have_no_commands_for_the_terminal(configure, tmp_path, capsys):
    folder = run(configure(True, max_steps=1))
    row = {"prompt": "1+1", "steps": ["=2", "=3"], "labels": [1, 0]}
    file = write(tmp_path / "a\x1b[31m\u202eb.jsonl", [row] * 2)
    page = tmp_path / "page.html"
    checkpoint = ["--checkpoint", folder / "final_artifact"]
    evaluate(*checkpoint, "--test_set", file, "--html", page)
    for text in (capsys.readouterr().out, page.read_text()):
        assert "/ab.jsonl:1" in text and "\x1b" not in text and "\u202e" not in text

    lm = run(configure(True, "lm", task="lm", max_steps=1))
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    file = write(tmp_path / "c\x1b[31m\u202ed.jsonl", [{"messages": chat}])
    flags = ["--critical_questions", file, "--max_new_tokens", "2"]
    evaluate("--checkpoint", lm / "final_artifact", *flags)
    printed = capsys.readouterr().out
    assert "/cd.jsonl:1" in printed and "\x1b" not in printed and "\u202e" not in printed


def test_results_replace_a_file_and_are_not_written_into_it(tmp_path):
    results = Results({"loss": 1.0}, rows=[{"answer": "a"}])
    for name in ("r.json", "r.generations.jsonl"):
        (tmp_path / name).write_text("before")
        (tmp_path / f"kept_{name}").hardlink_to(tmp_path / name)
        (tmp_path / f".tmp_{name}").symlink_to(tmp_path / f"kept_{name}")
    results.save(tmp_path / "r.json", "lm")
    assert json.loads((tmp_path / "r.json").read_text()) == {"loss": 1.0}
    assert json.loads((tmp_path / "r.generations.jsonl").read_text()) == {"answer": "a"}
    for name in ("r.json", "r.generations.jsonl"):
        assert (tmp_path / f"kept_{name}").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_configuration_that_starts_from_other_weights_is_refused(configure, tmp_path):
    config = configure(True, init_from="outputs/other/final_artifact")
    config.save(tmp_path / "mine.toml")
    with pytest.raises(UserError, match="evaluates the base alone; name those weights with --che"):
        evaluate("--config", tmp_path / "mine.toml")


def test_a_wrong_step_beyond_those_of_training_is_there(configure, tmp_path):
    artifact = run(configure(True, max_steps=1, max_steps_per_example=2)) / "final_artifact"
    row = {"prompt": "1+1", "steps": ["=2", "2=2", "2=3"], "labels": [1, 1, 0]}
    output = tmp_path / "n.json"
    data = write(tmp_path / "a.jsonl", [row])
    evaluate("--checkpoint", artifact, "--eval_data", data, "--output", output)
    numbers = json.loads(output.read_text())
    assert numbers["no_error_accuracy"] is None and numbers["first_error_accuracy"] is not None


def test_what_needs_labels_is_refused_without_any(configure, tmp_path):
    artifact = run(configure(True, max_steps=1)) / "final_artifact"
    row = {"prompt": "1+1", "steps": ["=2"], "labels": [None]}
    flags = ["--checkpoint", artifact, "--eval_data", write(tmp_path / "a.jsonl", [row])]
    with pytest.raises(
        UserError,
        match="no step has a label and no solution has an outcome, so nothing is measured",
    ):
        evaluate(*flags)
    with pytest.raises(UserError, match="no step has a label"):
        evaluate(*flags, "--reliability", tmp_path / "a.png")
    long = write(tmp_path / "b.jsonl", [row | {"steps": ["=2" * 300], "labels": [1]}])
    with pytest.raises(UserError, match="no step with a label fits max_length 64 and no solution"):
        evaluate("--checkpoint", artifact, "--eval_data", long, "--max_length", 64)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--eval_data=in.json", "--output=in.json"], "--output in.json: would replace .*in.json,"),
        (["--eval_data=a", "--output=o", "--html=o"], "--html o: would replace .*/o, which"),
        (["--eval_data=a", "--html=o", "--reliability=o"], "--reliability o: would replace"),
        (
            ["--task=lm", "--test_set=o.generations.jsonl", "--output=o.json"],
            "--output o.json: would replace .*o.generations.jsonl,",
        ),
        (["--eval_data=a", "--citation_pattern=x"], "--citation_pattern is for --task lm; leave"),
        (["--eval_data=a", "--task=lm", "--threshold=0.3"], "--threshold is for --task score;"),
    ],
)
def test_a_file_that_would_be_replaced_and_a_flag_of_the_other_task_are_refused(
    flags, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        evaluation.read_arguments(["--base_model=embedded", "--task=score", *flags])


def test_a_threshold_that_the_run_tunes_is_not_asked_of_a_prompt(configure, capsys):
    config = configure(True, max_steps=1)
    config.evaluation.tune_threshold_on = "gsm8k"
    artifact = run(config) / "final_artifact"
    evaluate("--checkpoint", artifact, "--prompt", "1+1\n=2")
    note = "note: the threshold is 0.5, not tuned on gsm8k, which is not here"
    assert note in capsys.readouterr().out
    evaluate("--checkpoint", artifact, "--test_set", "arithmetic:test:3")
    assert note in capsys.readouterr().out
    run_evaluation.forget_absent_tuning_set(["a/gsm8k.json"], config.evaluation)
    only = "note: the threshold is 0.5, not tuned on gsm8k, the only set here\n"
    assert capsys.readouterr().out == only and config.evaluation.tune_threshold_on == ""


def test_held_out_files_are_read_without_the_training_files(configure, tmp_path, capsys):
    data = write(tmp_path / "t.jsonl", [{"text": "a b c"}] * 2)
    files = dict(
        task="lm", train_data=[data], eval_data=[write(tmp_path / "e.jsonl", [{"text": "d"}])]
    )
    artifact = run(configure(True, max_steps=1, **files)) / "final_artifact"
    (tmp_path / "t.jsonl").unlink()
    evaluate("--checkpoint", artifact)
    printed = capsys.readouterr().out
    assert "eval: 1 examples" in printed and "in train_data of the run" not in printed


def test_training_examples_are_not_taken_for_held_out_ones_after_their_file_has_changed(
    configure, tmp_path, capsys
):
    rows = [{"text": f"{i} pears"} for i in range(30)]
    data = write(tmp_path / "t.jsonl", rows)
    folder = run(configure(True, task="lm", train_data=[data], eval_data=[], max_steps=1))
    write(tmp_path / "t.jsonl", rows + rows)
    for checkpoint in ("final_artifact", "checkpoints/checkpoint_step_1"):
        with pytest.raises(UserError, match="t.jsonl: not the file .*; restore it, or give"):
            evaluate("--checkpoint", folder / checkpoint)
    evaluate("--checkpoint", folder / checkpoint, "--eval_data", data, "--eval_data", data)
    printed = capsys.readouterr().out
    assert "eval: 120 examples" in printed
    assert f"note: {data}: in train_data of the run, so not all of it is held out" in printed


def test_a_dot_in_the_name_of_the_numbers_stays_in_that_of_the_answers(tiny_base, tmp_path):
    questions = write(tmp_path / "q.jsonl", [{"question": "a", "answer": "b"}])
    for name in ("lr_0.001", "lr_0.01.json"):
        flags = ("--base_model", tiny_base, "--test_set", questions, "--max_length", "64")
        evaluate(*flags, "--max_new_tokens=1", "--output", tmp_path / name)
    names = {path.name for path in tmp_path.glob("*.generations.jsonl")}
    assert names == {"lr_0.001.generations.jsonl", "lr_0.01.generations.jsonl"}
