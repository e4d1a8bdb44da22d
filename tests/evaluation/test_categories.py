"""A row's "category": the numbers of a category are those of its rows alone."""

import json
import re

import pytest

import eval as evaluation
from lora.data.readers import read
from lora.evaluation.run_evaluation import MAX_CATEGORIES
from tests.conftest import run
from tests.evaluation.test_eval_script import evaluate, write

FLAGS = ("--max_length=128", "--max_new_tokens=3", "--dtype=float32")


def chat(number, **more):
    question = {"role": "user", "content": f"{number}+{number}?"}
    answer = {"role": "assistant", "content": f"{2 * number}"}
    return {"messages": [question, answer], **more}


def numbers_of(tmp_path, *flags):
    """What eval.py writes; and the answers beside it."""
    output = tmp_path / "numbers.json"
    evaluate(*flags, "--output", output)
    answers = tmp_path / "numbers.generations.jsonl"
    lines = answers.read_text().splitlines() if answers.exists() else []
    return json.loads(output.read_text()), [json.loads(line) for line in lines]


def of_category(numbers, name, prefix=""):
    start = f"{prefix}category/{name}/"
    return {key[len(start) :]: numbers[key] for key in numbers if key.startswith(start)}


def test_a_category_has_the_numbers_of_its_rows_alone(tiny_base, tmp_path, capsys):
    rows = [chat(i, category=("json", "red team")[i % 2]) for i in range(1, 8)]
    rows += [chat(8), chat(9, category="")]
    all_rows = write(tmp_path / "all.jsonl", rows)
    of_json = [row for row in rows if row.get("category") == "json"]
    alone = write(tmp_path / "alone.jsonl", of_json)
    plain = [{"messages": row["messages"]} for row in of_json]
    without = write(tmp_path / "without.jsonl", plain)
    base = ("--base_model", tiny_base, "--task=lm", *FLAGS, "--refusal_pattern=^1")
    files = ("--eval_data", "--test_set", "--critical_questions")
    capsys.readouterr()
    whole, answers = numbers_of(tmp_path, *base, *[x for file in files for x in (file, all_rows)])
    shown = capsys.readouterr().out
    assert "keys not read" not in shown
    single, _ = numbers_of(tmp_path, *base, *[x for file in files for x in (file, alone)])
    numbers, _ = numbers_of(tmp_path, *base, "--test_set", without)
    assert not any("category" in key for key in numbers)

    found = of_category(whole, "json")
    assert found.pop("questions") == 3 and found.pop("targets") > 3
    for key, value in found.items():
        assert value == pytest.approx(single[key], rel=1e-5), key  # fp32 sums in another order
        assert f"category/json/{key} {value:.6f}\n" in shown
    assert {"loss", "bits_per_byte", "exact_answer", "rouge1", "refusal_rate"} < found.keys()
    critical = of_category(whole, "json", "critical/")
    assert critical["questions"] == 3 and critical["passed"] == single["critical/passed"]
    assert of_category(whole, "red team")["questions"] == 4
    assert "category/red team/questions 4\n" in shown
    assert {key.split("/")[1] for key in whole if key.startswith("category/")} == {
        "json",
        "red team",
    }
    assert [answer["category"] for answer in answers[:9]] == [
        row.get("category", "") for row in rows
    ]


def test_a_category_of_scored_steps_has_the_numbers_of_its_chains_alone(
    configure, tmp_path, capsys
):
    artifact = run(configure(True, max_steps=1)) / "final_artifact"
    rows = []
    for i in range(1, 9):
        steps, labels = [f"{i}+1={i + 1}", f"{i + 1}+1={i + i % 3}"], [1, int(i % 3 == 2)]
        rows.append({"prompt": f"{i}+1+1", "steps": steps, "labels": labels, "category": i % 2})
    candidates = []
    for i in range(4):
        outcome = {"prompt": f"p{i % 2}", "steps": [f"{i}=1"], "is_correct": i < 2}
        candidates.append({**outcome, "category": "chosen"})
    all_rows = write(tmp_path / "all.jsonl", rows + candidates)
    alone = write(tmp_path / "alone.jsonl", [row for row in rows if row["category"] == 1])
    flags = ("--checkpoint", artifact, "--max_length=128", "--dtype=float32", "--eval_data")
    capsys.readouterr()
    whole, _ = numbers_of(tmp_path, *flags, all_rows)
    shown = capsys.readouterr().out
    single, _ = numbers_of(tmp_path, *flags, alone)
    found = of_category(whole, "1")
    assert found.pop("chains") == 4 and {"mse", "auc", "processbench_f1"} < found.keys()
    for key, value in found.items():
        assert value == pytest.approx(single[key], rel=1e-5), key  # fp32 sums in another order
        assert re.search(rf"category/1/{key} {'nan' if value is None else f'{value:.6f}'}\n", shown)
    chosen = of_category(whole, "chosen")
    assert chosen["chains"] == 4 and chosen["best_of_n/oracle"] == whole["best_of_n/oracle"] == 1.0
    assert "mse" not in chosen and "keys not read" not in shown


@pytest.mark.parametrize("task", ["lm", "score"])
def test_any_kind_of_row_may_have_a_category(tmp_path, capsys, task):
    rows = {
        "lm": [{"text": "a"}, {"question": "q", "answer": "a"}, chat(1)],
        "score": [
            {"prompt": "p", "steps": ["s"], "labels": [1]},
            {"sentence1": "p", "sentence2": "s", "score": 1},
            {"problem": "p", "steps": ["s"], "label": -1},
        ],
    }[task]
    path = write(tmp_path / "rows.jsonl", [{**row, "category": " red team "} for row in rows])
    assert [example.category for example in read([path], task)] == ["red team"] * 3
    assert "keys not read" not in capsys.readouterr().out
    path = write(tmp_path / "lists.jsonl", [{**row, "category": ["a"]} for row in rows])
    assert [example.category for example in read([path], task)] == [""] * 3
    assert "keys not read: category (3 rows)" in capsys.readouterr().out


def test_a_category_changes_no_token_and_no_training(configure, tmp_path):
    losses = []
    for more in ({}, {"category": "a"}):
        path = write(tmp_path / "rows.jsonl", [chat(i, **more) for i in range(20)])
        name = f"run{len(losses)}"
        folder = run(configure(True, name, task="lm", max_steps=3, train_data=[path], eval_data=[]))
        losses.append(json.loads((folder / "logs" / "final_results.json").read_text())["best"])
    assert losses[0] == losses[1]


def test_too_many_categories_are_one_note(tiny_base, tmp_path, capsys):
    rows = [{"text": f"{i}", "category": i} for i in range(MAX_CATEGORIES + 1)]
    path = write(tmp_path / "rows.jsonl", rows)
    numbers, _ = numbers_of(tmp_path, "--base_model", tiny_base, *FLAGS, "--eval_data", path)
    assert "note: 101 categories, too many to give the means" in capsys.readouterr().out
    assert not any(key.startswith("category/") for key in numbers)


def test_categories_from_python_and_in_the_terminal(configure, tmp_path, capsys):
    artifact = run(configure(True, task="lm", max_steps=1)) / "final_artifact"
    path = write(tmp_path / "rows.jsonl", [chat(1, category="a\x1b[31m")])
    arguments, config = evaluation.read_arguments(
        ["--checkpoint", str(artifact), "--eval_data", path]
    )
    numbers = evaluation.main(arguments, config, evaluation.read_request(arguments, config))
    assert numbers["category/a\x1b[31m/loss"] == pytest.approx(numbers["loss"])
    assert "category/a/loss" in capsys.readouterr().out
