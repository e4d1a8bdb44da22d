"""The measures of scored steps by hand, the baselines on data made for them, what eval.py shows and
the page it writes.
"""

import hashlib
from html.parser import HTMLParser
import json
import math
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch

from lora.common.errors import UserError
from lora.common.printable_text import printable
from lora.config.schema import DataConfig, EvaluationConfig
from lora.data.batches import Rows
from lora.data.examples import Example
from lora.data.readers import read
from lora.data.tokenise import tokenise
from lora.evaluation import best_of_n, calibration, step_metrics, step_report, trivial_scorers
from lora.evaluation.generate import step_scores
from lora.model.load import load_task
from tests.conftest import run
from tests.data.test_step_readers import write
from tests.evaluation.test_eval_script import evaluate


def example(labels, prompt="p", outcome=None, steps=None, source=0):
    steps = steps or [f"step {i}" for i in range(len(labels))]
    return Example(
        "x", prompt=prompt, steps=steps, labels=labels, outcome=outcome, dataset_id=source
    )


def judged(*pairs, threshold=0.5):
    """pairs: (labels, scores) of each chain."""
    return step_metrics.ScoredChains(*chains(pairs), threshold)


def chains(pairs):
    examples = [example(labels, str(i)) for i, (labels, _) in enumerate(pairs)]
    return examples, [np.array(scores, float) for _, scores in pairs]


# ----------------------------------------------------------------------------------------- measures


def test_auc_is_the_share_of_pairs_in_order():
    scores, right = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])
    assert step_metrics.auc(scores, right) == (1 + 1 + 0.5 + 1) / 4
    assert step_metrics.auc(scores, ~right) == 1 - 3.5 / 4
    assert math.isnan(step_metrics.auc(scores, np.ones(4, bool)))
    rng = np.random.default_rng(0)
    scores, right = rng.integers(9, size=200) / 8, rng.random(200) < 0.3
    above = [(a > b) + (a == b) / 2 for a in scores[right] for b in scores[~right]]
    assert step_metrics.auc(scores, right) == pytest.approx(np.mean(above))


def test_calibration_is_that_counted_by_hand():
    scores, labels = np.array([0.0, 0.05, 0.95, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    low, high = calibration.calibration(scores, labels)
    assert low == pytest.approx((0.025, 0.5, 2)) and high == pytest.approx((2.95 / 3, 2 / 3, 3))
    expected = (2 * 0.475 + 3 * (2.95 - 2) / 3) / 5
    assert calibration.expected_calibration_error(scores, labels) == pytest.approx(expected)


def test_first_errors_processbench_and_prmbench_are_those_counted_by_hand():
    of = judged(
        ([1, 0, None], [0.9, 0.2, 0.1]),  # found exactly
        ([1, 1, 0], [0.9, 0.4, 0.1]),  # one step too early
        ([1, 0, 1], [0.9, 0.5, 0.9]),  # 0.5 passes: missed
        ([1, 1], [0.8, 0.7]),  # rightly passed
        ([None, 1], [0.1, 0.7]),  # the step without a label is not asked about
        ([0.5, 0.4], [0.6, math.nan]),  # a soft label; the wrong step was not read: missed
    )
    numbers = of.measures()
    assert list(of.first_errors) == [1, 2, 1, -1, -1, 1]
    assert list(of.predicted_errors) == [1, 1, -1, -1, -1, -2]
    assert (
        numbers["first_error_accuracy"] == pytest.approx(1 / 4)
        and numbers["no_error_accuracy"] == 1.0
    )
    assert numbers["processbench_f1"] == pytest.approx(2 * (1 / 4) / (5 / 4))
    # right steps: 9, of which one is judged wrong; wrong steps: 3, of which one is judged right
    assert numbers["f1"] == pytest.approx(2 * 8 / (2 * 8 + 1 + 1)) and numbers[
        "negative_f1"
    ] == pytest.approx(2 / 3)
    nothing_found = judged(([1, 0], [0.9, 0.9]), ([1], [0.1])).measures()
    assert nothing_found["processbench_f1"] == 0.0 == nothing_found["negative_f1"]


def test_a_right_chain_that_is_not_read_to_its_end_is_not_rightly_passed():
    nan = math.nan
    right = ([1, 1], [0.9, 0.9]), ([1, 1], [0.9, nan]), ([1], [nan]), ([1, None], [0.9, nan])
    scored = judged(([1, 0], [0.9, 0.1]), *right)
    assert list(scored.predicted_errors) == [1, -1, -2, -2, -1]
    assert scored.measures()["no_error_accuracy"] == 2 / 4


def test_an_f1_of_nothing_to_find_is_no_number_and_bootstrap_draws_leave_it_out():
    assert math.isnan(judged(([1, 1], [0.9, 0.8])).measures()["negative_f1"])
    assert math.isnan(judged(([0], [0.1])).measures()["f1"])
    perfect = judged(*[([1], [0.9])] * 11, ([1, 0], [0.9, 0.1]))
    intervals, _ = step_metrics.intervals({"scores": perfect}, draws=50)
    assert intervals["scores"]["negative_f1"] == [1.0, 1.0]


def test_one_problem_has_no_interval_and_no_verdict():
    examples = [example([1.0, 0.0], "p"), example([0.0, 1.0], "p")]
    scores = [np.array([0.9, 0.1]), np.array([0.2, 0.8])]
    report = step_metrics.report(examples, {"scores": scores, "b": scores}, EvaluationConfig(), {})
    assert np.isnan(report["intervals"]["scores"]["auc"]).all()
    assert np.isnan(report["differences"]["b"]["auc"]).all()
    solutions = [example([None], "p", outcome, ["A: 1"]) for outcome in (True, False)]
    found = best_of_n.best_of_n(solutions, [np.array([0.9]), np.array([0.1])])
    value, interval = found["min"]
    assert value == 1.0 and np.isnan(interval).all()


def test_the_best_threshold_separates():
    pairs = [([1, 0], [0.31, 0.27]), ([1, 1], [0.35, 0.9])]
    best = step_metrics.best_threshold(*chains(pairs))
    assert (
        0.27 < best <= 0.31 and judged(*pairs, threshold=best).measures()["processbench_f1"] == 1.0
    )


def test_intervals_hold_the_value_shrink_with_more_problems_and_pair_the_scorers():
    rng = np.random.default_rng(1)

    def scorer(count, noise):
        right = np.random.default_rng(0).random((count, 5)) < 0.7
        scores = np.clip(right * 0.5 + 0.25 + noise * rng.normal(size=right.shape), 0, 1)
        return judged(*zip(right.astype(float).tolist(), scores))

    widths = []
    for count in (40, 640):
        scorers = {"ours": scorer(count, 0.2), "worse": scorer(count, 0.6)}
        ends, differences = step_metrics.intervals(scorers, draws=200)
        low, high = ends["ours"]["auc"]
        assert low < scorers["ours"].measures()["auc"] < high and differences["worse"]["auc"][0] > 0
        widths.append(high - low)
    assert widths[1] < widths[0] / 2  # a quarter, but for chance
    same = {"a": scorers["ours"], "b": scorers["ours"]}
    assert step_metrics.intervals(same, draws=20)[1]["b"]["mse"] == [0.0, 0.0]


def test_best_of_n_is_that_counted_by_hand():
    def solution(outcome, answer, *scores, prompt="p"):
        return example(
            [None] * len(scores), prompt, outcome, ["s"] * (len(scores) - 1) + [f"A: {answer}"]
        ), np.array(scores)

    rows = [
        solution(True, 5, 0.6, 0.6),  # the best by its least (0.6)
        solution(False, 7, 0.5, 1.0),  # by product (0.5), last and mean
        solution(False, 7, 0.3, 0.9),
        solution(True, 1, 0.9, prompt="q"),
        solution(False, 2, 0.9, prompt="q"),  # a tie
        solution(True, 3, 0.1, prompt="alone"),
    ]
    found = {name: value for name, (value, _) in best_of_n.best_of_n(*zip(*rows)).items()}
    assert (
        found["min"] == (1 + 0.5) / 2
        and found["last"] == found["product"] == found["mean"] == 0.5 / 2
    )
    assert (
        found["random"] == (1 / 3 + 1 / 2) / 2
        and found["oracle"] == 1.0
        and found["majority"] == (0 + 0.5) / 2
    )


@pytest.mark.parametrize(
    "step, answer",
    [
        ("12+9=21", 21.0),
        ("10/2=5", 5.0),
        ("I have 10/2 apples, so 5", 5.0),
        ("It is $1,234.", 1234.0),
        (r"So $\boxed{2}$.", 2.0),
        ("The answer is 1/2.", "1/2"),
        ("x = 3 / 2", "3/2"),
        ("The answer is (3, 4)", "(3,4)"),
        ("The answer is [5, 4)", "[5,4)"),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2"),
        ("Yes", "yes"),
    ],
)
def test_an_expression_votes_by_its_text_and_a_number_by_its_value(step, answer):
    assert best_of_n.final_answer(example([None], steps=[step])) == answer


# ---------------------------------------------------------------------------------------- baselines


def test_a_baseline_learns_its_own_cue_on_other_problems_and_no_more():
    rng = random.Random(0)
    by_place, by_word, by_chance = [], [], []
    for i in range(200):
        texts = [rng.choice(["so it is", "but it was"]) for _ in range(4)]
        by_place.append(example([1.0, 1.0, 1.0, 0.0], str(i), steps=texts))
        by_word.append(example([float("so" in text) for text in texts], str(i), steps=texts))
        by_chance.append(example([float(rng.random() < 0.5) for _ in texts], str(i), steps=texts))
    found = {}
    for kind, examples in {"place": by_place, "word": by_word, "chance": by_chance}.items():
        for name, features in trivial_scorers.BASELINES.items():
            scores = trivial_scorers.baseline_scores(features, examples)
            found[kind, name] = step_metrics.ScoredChains(examples, scores, 0.5).measures()["auc"]
    place, words = trivial_scorers.BASELINES
    assert found["place", place] == found["place", words] == found["word", words] == 1.0
    assert 0.4 < found["word", place] < 0.6 and 0.4 < found["chance", words] < 0.6


def test_baselines_are_fitted_on_problems_whose_hashes_are_alike_as_well():
    """As those of a small held-out part are, which hashes choose."""
    prompts = (f"problem {i}" for i in range(20_000))
    alike = [p for p in prompts if hashlib.sha256(p.encode()).digest()[0] == 0]
    words = ("no", "yes")
    examples = [example([float(i % 2)], p, steps=[words[i % 2]]) for i, p in enumerate(alike)]
    scores = trivial_scorers.baseline_scores(trivial_scorers.BASELINES["bag of words"], examples)
    labels, of_labelled = step_metrics.labelled_steps(examples, scores)
    assert step_metrics.auc(of_labelled, labels >= 0.5) == 1.0


def test_a_report_has_a_number_for_every_set_and_may_tune_the_threshold_on_one():
    rng = np.random.default_rng(0)
    examples = [example([1.0, float(i % 3 > 0)], str(i), source=i % 2) for i in range(60)]
    scores = [np.array([0.3, 0.28 + 0.04 * e.labels[1]]) + 0.01 * rng.random() for e in examples]
    scorers, ids = step_metrics.with_baselines(examples, scores), {"a": 0, "b": 1}
    fixed = step_metrics.report(examples, scorers, EvaluationConfig(), ids, draws=10)
    assert (
        fixed["thresholds"]["scores"] == 0.5
        and fixed["measures"]["scores"]["processbench_f1"] == 0.0
    )
    settings = EvaluationConfig(tune_threshold_on="a")
    report = step_metrics.report(examples, scorers, settings, ids, draws=10)
    tuned = report["measures"]["scores"]
    assert tuned["a/processbench_f1"] > 0.9
    assert tuned["mean_processbench_f1"] == pytest.approx(
        (tuned["a/processbench_f1"] + tuned["b/processbench_f1"]) / 2
    )
    with pytest.raises(UserError, match="tune_threshold_on c: no such set; there is a, b"):
        settings = EvaluationConfig(tune_threshold_on="c")
        step_metrics.report(examples, scorers, settings, ids, draws=10)
    for right in examples[::2]:  # all of the set a
        right.labels = [1.0, 1.0]
    with pytest.raises(UserError, match="tune_threshold_on a: it needs chains with an error and"):
        settings = EvaluationConfig(tune_threshold_on="a")
        step_metrics.report(examples, scorers, settings, ids, draws=10)


def test_a_wrong_step_without_a_score_is_missed_also_where_no_other_step_has_a_label():
    chains = [[1.0, 0.0], [1.0, 0.0], [None, 0.0], [0.0]]
    examples = [example(labels, str(i)) for i, labels in enumerate(chains)]
    examples.append(example([1.0], "right"))
    scores = [[0.9, 0.1], [0.9, np.nan], [0.9, np.nan], [np.nan], [0.9]]
    scorers = {"scores": [np.array(of_chain) for of_chain in scores]}
    report = step_metrics.report(examples, scorers, EvaluationConfig(), {}, draws=50)
    assert report["measures"]["scores"]["first_error_accuracy"] == 0.25
    low, high = report["intervals"]["scores"]["first_error_accuracy"]
    assert 0 <= low <= 0.25 <= high <= 1


# -------------------------------------------------------------------------------------- one forward


@pytest.mark.parametrize("kind", ["tiny_base", "tiny_encoder"])
def test_all_steps_in_one_forward_are_scored_as_one_by_one(kind, request, configure):
    config = configure(False, base_model=str(request.getfixturevalue(kind)), max_length=128)
    task = load_task(config, torch.float32).eval()
    examples = read(["arithmetic:test:7"], "score")
    examples[3].steps *= 40  # too long
    examples[3].labels *= 40
    together = step_scores(examples, task, config, torch.float32)
    task.eval()  # the loop goes on training after it has asked
    for e, scores in zip(examples, together, strict=True):
        assert len(scores) == len(e.steps)
        for end, score in enumerate(scores, 1):
            alone = example([None] * (end - 1) + [0.0], e.prompt, steps=e.steps[:end])
            rows = [
                (row, 0)
                for row in tokenise([alone], task.tokenizer, "score", config.data, task.causal)[
                    0
                ].rows
            ]
            if score == score:
                said = task.predict(Rows.from_rows(rows, "score").batch([0], task.packed))
                assert said.item() == pytest.approx(score, abs=1e-5)
            else:
                assert not rows
    assert np.isnan(together[3]).any() and not np.isnan(together[2]).any()


# ------------------------------------------------------------------------------------------ eval.py


class Page(HTMLParser):
    """What a browser would make of the tags: (tag, attributes) in order, all closed in order, and
    the texts.
    """

    VOID = {"meta", "wbr"}
    OPTIONAL = {"html", "li", "p"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert [tag for tag in self.open if tag not in self.OPTIONAL] == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_table_is_no_wider_than_100_columns_and_the_verdict_follows_the_intervals():
    values = {"auc": 0.7, "r2": -12.34567, "a_set_with_a_long_name/processbench_f1": 0.1}
    ends = {name: [-10.123456, -0.123456] for name in values}
    baselines = ("position and length", "bag of words")
    report = {
        "measures": {name: values for name in ("scores", *baselines)},
        "intervals": {name: ends for name in ("scores", *baselines)},
        "differences": {name: ends for name in baselines},
    }
    lines = list(step_report.aligned(step_report.table(report)))
    assert max(map(len, lines)) <= 100 and lines[-2] == "a_set_with_a_long_name/processbench_f1"
    assert "0.700 [-10.1, -0.123]" in lines[1]
    assert step_report.verdict(report).endswith("the scores beat neither baseline measurably.")
    report["differences"] = {name: ends | {"auc": [0.1, 0.3]} for name in baselines}
    assert "better than both baselines" in step_report.verdict(report)
    report["differences"]["position and length"] = ends
    between = "the scores beat bag of words, but position and length not measurably."
    assert step_report.verdict(report).endswith(between)
    report["measures"] = {name: values | {"auc": math.nan} for name in ("scores", *baselines)}
    assert step_report.verdict(report).startswith("Verdict: none")


HOSTILE = "<script>alert('x')</script> \x1b[31m & \"quoted\" </li></ol>"


def test_the_page_is_whole_shows_both_first_errors_and_runs_nothing_of_the_data():
    chains = [
        example([1.0, 0.0, None], HOSTILE, steps=["a", HOSTILE, "c"]),
        example([1.0], "q", steps=["fine"]),
    ]
    chains[0].where = HOSTILE
    scores = [np.array([0.2, 0.9, math.nan]), np.array([0.8])]
    page = Page(
        step_report.page(HOSTILE, chains, scores, 0.5, [["measure", HOSTILE], ["auc", "0.5"]])
    )
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not any(
        name in ("src", "href") or name.startswith("on")
        for _, attributes in page.tags
        for name in attributes
    )
    steps = [attributes["class"] for tag, attributes in page.tags if tag == "li"]
    assert steps == ["first", "gold", "", ""] and page.texts.count(printable(HOSTILE)) >= 4
    assert {"0.200 (1)", "0.900 (0)", "nan", "0.800 (1)"} <= {*page.texts}


def test_lines_for_the_terminal_hold_no_commands_of_the_data():
    shown = list(
        step_report.lines(example([None], steps=[HOSTILE]), np.array([0.25]), 0.5, colours=False)
    )
    assert shown == ["0.250  <script>alert('x')</script>  & \"quoted\" </li></ol>  <- first error"]
    (coloured,) = step_report.lines(example([1.0], steps=["s"]), np.array([1.0]), 0.5, colours=True)
    assert coloured.startswith("\x1b[48;2;150;245;150m") and coloured.endswith(
        "1.000 (1)  s\x1b[0m"
    )


def test_eval_measures_colours_and_writes_of_a_scorer(configure, tmp_path, capsys):
    artifact = run(configure(True)) / "final_artifact"
    rows = [
        {"prompt": f"p{i}", "steps": ["3+4=7", "7-2=9"], "labels": [1, i % 2]} for i in range(12)
    ]
    capsys.readouterr()
    page, out, picture = tmp_path / "page.html", tmp_path / "n.json", tmp_path / "r.odd"
    data = write(tmp_path / "t.jsonl", rows)
    evaluate(
        "--checkpoint",
        artifact,
        "--test_set",
        data,
        "--html",
        page,
        "--output",
        out,
        "--reliability",
        picture,
    )
    numbers, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert {
        "loss",
        "mse",
        "mae",
        "r2",
        "pearson",
        "spearman",
        "auc",
        "ece",
        "processbench_f1",
    } < numbers.keys()
    assert numbers["loss"] == pytest.approx(numbers["mse"])
    assert numbers["measures"].keys() == {"scores", "position and length", "bag of words"}
    assert numbers["differences"].keys() == {"position and length", "bag of words"}
    assert (
        numbers["intervals"]["scores"]["auc"][0]
        <= numbers["auc"]
        <= numbers["intervals"]["scores"]["auc"][1]
    )
    assert (
        shown.count("(1)  3+4=7") == 12
        and "t.jsonl:12\np11\n" in shown
        and "  position and length  " in shown
    )
    chains = [json.loads(line) for line in (tmp_path / "n.scores.jsonl").read_text().splitlines()]
    for row, chain in zip(rows, chains, strict=True):
        assert {key: chain[key] for key in row} == row
        for step, score in zip(chain["steps"], chain["scores"], strict=True):
            assert any(f"{score:.3f} " in line and step in line for line in shown.splitlines())
    report = shown[shown.index("labelled steps, ") :].splitlines()
    assert max(map(len, report)) <= 100
    assert len([line for line in report if line.startswith("Verdict: by AUC, ")]) == 1
    assert len([tag for tag, _ in Page(page.read_text()).tags if tag == "li"]) == 24
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="expected a file that is not there yet"):
        evaluate("--checkpoint", artifact, "--test_set", data, "--html", page)

    outcomes = [
        {"prompt": f"p{i // 2}", "steps": ["a", "A: 1"], "is_correct": i % 2 == 0} for i in range(8)
    ]
    evaluate(
        "--checkpoint",
        artifact,
        "--test_set",
        write(tmp_path / "o.jsonl", outcomes),
        "--output",
        out,
    )
    numbers = json.loads(out.read_text())
    assert (
        numbers["best_of_n/random"] == 0.5
        and numbers["best_of_n/oracle"] == 1.0
        and "auc" not in numbers
    )
    evaluate("--checkpoint", artifact, "--prompt", "p\na\nb", "--html", tmp_path / "p.html")
    assert len(capsys.readouterr().out.splitlines()[-3:]) == 3 and (tmp_path / "p.html").is_file()


def test_a_set_of_which_nothing_fits_has_no_figures_of_its_own(configure, tmp_path):
    artifact, out = run(configure(True, max_steps=1)) / "final_artifact", tmp_path / "n.json"
    rows = [
        {"prompt": f"p{i}", "steps": ["3+4=7", "7-2=9"], "labels": [1, i % 2]} for i in range(12)
    ]
    files = [write(tmp_path / "short.jsonl", rows), write(tmp_path / "a.jsonl", rows[:5])]
    files.append(write(tmp_path / "long.jsonl", [row | {"prompt": "p" * 9999} for row in rows]))
    evaluate("--checkpoint", artifact, "--eval_data", *files, "--output", out)
    assert {name for name in json.loads(out.read_text()) if "/" in name} == {
        "short/processbench_f1",
        "a/processbench_f1",
    }


def test_outcomes_are_read_from_both_forms(tmp_path):
    solution = {"is_correct": True, "solution": "x = 1\n\nA: 1\n"}
    row = {
        "question": "q",
        "ground_truth": "g",
        "6b": solution,
        "175b": solution | {"is_correct": False},
    }
    path = write(tmp_path / "o.jsonl", [row, {"prompt": "p", "steps": ["a"], "is_correct": True}])
    found = [(e.prompt, e.steps, e.labels, e.outcome) for e in read([path], "score", DataConfig())]
    both = ("q", ["x = 1", "A: 1"], [None, None])
    assert found == [(*both, True), (*both, False), ("p", ["a"], [None], True)]


BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_page_and_runs_nothing_of_the_data(tmp_path):
    attack = (
        "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    )
    chain = example([1.0, 0.0], attack, steps=[attack, "b"])
    text = step_report.page(
        "scores", [chain], [np.array([0.9, 0.1])], 0.5, [["measure", attack], ["auc", "1"]]
    )
    # What the browser made of the colours is asked of the browser itself, by a script of this
    # test's own.
    asking = "<script>document.body.append([...document.querySelectorAll('li')].map("
    asking += "li => getComputedStyle(li)."
    asking += (
        "backgroundColor + li.className + getComputedStyle(li).outlineStyle).join('|'))</script>"
    )
    # join, because + would escape the script
    (tmp_path / "page.html").write_text("".join([text, asking]), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"file://{tmp_path}/page.html",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>scores</title>" in shown
    assert "rgb(171, 245, 150)none|rgb(255, 169, 150)first goldsolid" in shown
