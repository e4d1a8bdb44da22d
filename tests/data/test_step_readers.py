"""Step-labelled data in its raw forms: hand-written rows of the exact shape, and what is read from
them.
"""

import csv
import json

import numpy as np
import pytest
import torch

from lora.common.errors import UserError
from lora.config.command_line import read_command_line
from lora.config.schema import DataConfig, get_lora_config
from lora.data.raw_data import RawData
from lora.data.readers import read
from lora.data.sampler import TrainingData
from lora.data.split import Split
from lora.data.token_cache import load_or_tokenise
from lora.evaluation.predict import evaluate
from lora.model.load import load_task
from lora.model.run import Run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chains(path, **settings):
    return [(e.prompt, e.steps, e.labels) for e in read([path], "score", DataConfig(**settings))]


def test_a_label_that_is_a_list_is_refused_in_one_line(tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "label": ["x", "y"]}
    with pytest.raises(UserError, match=r"label \['x', 'y'\]; expected 0..1"):
        read([write(tmp_path / "a.jsonl", [row])], "score")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "steps": ["a"], "labels": None, "is_correct": True},
        {"prompt": None, "labels": None, "problem": "p", "steps": ["a"], "label": -1},
        {"input": None, "mistake_index": None, "problem": "p", "steps": ["a"], "label": -1},
    ],
)
def test_null_columns_of_a_data_set_that_was_joined_choose_no_reader(tmp_path, row):
    ((prompt, steps, _),) = chains(write(tmp_path / "a.jsonl", [row]))
    assert (prompt, steps) == ("p", ["a"])


def test_generated_chains_are_cut_to_their_first_steps_too():
    read_all = read(["arithmetic:test:4"], "score")
    cut = read(["arithmetic:test:4"], "score", DataConfig(max_steps_per_example=2))
    assert [e.steps for e in cut] == [e.steps[:2] for e in read_all]
    assert [e.labels for e in cut] == [e.labels[:2] for e in read_all]


def rating(text, value, flagged=False):
    return {"text": text, "rating": value, "flagged": flagged}


def prm800k_row(steps, problem="p", finish="solution", **flags):
    question = {
        "problem": problem,
        "ground_truth_solution": None,
        "ground_truth_answer": "4",
        "pre_generated_steps": ["x"],
        "pre_generated_answer": "4",
        "pre_generated_verifier_score": 0.5,
    }
    label = {"steps": steps, "total_time": 1000, "finish_reason": finish}
    row = {
        "labeler": "a",
        "timestamp": "t",
        "generation": None,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": question,
        "label": label,
    }
    return row | flags


def prm800k_step(completions, chosen=None, human=None):
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


def test_prm800k_is_the_chosen_path_and_every_other_completion_with_its_prefix(tmp_path, capsys):
    path = write(
        tmp_path / "prm.jsonl",
        [
            prm800k_row(
                [
                    prm800k_step(
                        [rating("a0", -1), rating("a1", 1), rating("a2", 0), rating("a3", None)],
                        chosen=1,
                    ),
                    prm800k_step([rating("b0", -1)], human="h"),
                    prm800k_step(None, human={"text": "i", "corrected_rating": None}),
                    prm800k_step([rating("c0", 0), rating("c1", 1)], chosen=0),
                ]
            ),
            prm800k_row(
                [prm800k_step([rating("d", 1)], chosen=0), prm800k_step([rating("e", -1)])],
                finish="found_error",
            ),
            prm800k_row(
                [prm800k_step([rating("q", 1)], chosen=0)], is_quality_control_question=True
            ),
            prm800k_row(
                [prm800k_step([rating("q", 1)], chosen=0)],
                is_initial_screening_question=True,
                generation=-1,
            ),
            prm800k_row([prm800k_step([rating("q", 1)], chosen=0)], finish="bad_problem"),
            prm800k_row([prm800k_step([rating("q", 1)], chosen=0)], finish="give_up"),
        ],
    )
    prefix = ["a1", "h", "i"]
    for neutral in (1.0, 0.5, 0.0):
        assert chains(path, neutral_label=neutral) == [
            ("p", [*prefix, "c0"], [1.0, 1.0, 1.0, neutral]),
            ("p", ["a0"], [0.0]),
            ("p", ["a2"], [neutral]),
            ("p", ["a1", "b0"], [None, 0.0]),
            ("p", [*prefix, "c1"], [None, None, None, 1.0]),
            ("p", ["d", "e"], [1.0, 0.0]),
        ]
    said = capsys.readouterr().out.splitlines()[0]
    assert (
        "left out: 2 rows (quality control or screening), 1 rows (bad problem), 1 rows (give up)"
        in said
    )


def test_math_shepherd_ratings_stand_where_the_marks_do(tmp_path):
    rows = [
        ("A b? Step 1: c+d ки\nStep 2: - e ки", "A b? Step 1: c+d +\nStep 2: - e -"),
        ("A ки b. Step 1: c ки\nStep 2: d ки\n", "A + b. Step 1: c -\nStep 2: d +\n"),
        ("No steps named? First ки\nthen ки", "No steps named? First +\nthen +"),
        ("no end ки", "no end +"),
    ]
    path = write(
        tmp_path / "ms.jsonl", [{"input": a, "label": b, "task": "GSM8K"} for a, b in rows]
    )
    assert chains(path) == [
        ("A b?", ["c+d", "- e"], [1.0, 0.0]),
        ("A ки b.", ["c", "d"], [0.0, 1.0]),
        ("No steps named?", ["First", "then"], [1.0, 1.0]),
    ]


def test_the_first_wrong_step_is_counted_from_0_in_two_sets_and_from_1_in_the_third(tmp_path):
    steps = ["a", "b", "c"]
    mistakes = [
        {"input": "p", "steps": steps, "target": "t", "answer": "u", "mistake_index": i}
        for i in (0, 1, 2, None)
    ]
    expected = [[0.0, None, None], [1.0, 0.0, None], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    assert [labels for _, _, labels in chains(write(tmp_path / "bb.jsonl", mistakes))] == expected
    more = {
        "id": "gsm8k-0",
        "generator": "g",
        "problem": "p",
        "steps": steps,
        "final_answer_correct": False,
    }
    processbench = write(
        tmp_path / "gsm8k.json.jsonl", [more | {"label": i} for i in (0, 1, 2, -1)]
    )
    assert [labels for _, _, labels in chains(processbench)] == expected
    prmbench = {
        "original_question": "o",
        "original_process": ["x", "y"],
        "modified_question": "p",
        "modified_process": steps,
        "modified_steps": [1, 3],
        "error_steps": [1, 3],
        "reason": "r",
        "idx": "1",
    }
    rows = [
        prmbench | {"classification": "redundency"},
        prmbench | {"classification": "circular", "error_steps": []},
    ]
    assert chains(write(tmp_path / "pb.jsonl", rows)) == [
        ("p", steps, [0.0, 1.0, 0.0]),
        ("o", ["x", "y"], [1.0, 1.0]),
        ("p", steps, [1.0, 1.0, 1.0]),
    ]


def test_a_chain_of_eqasc_is_judged_as_a_whole_at_its_last_step(tmp_path, capsys):
    def chain(first, second, label, **about):
        about = {
            "chain_id": "1",
            "turk_label": label,
            "df": "h",
            "grc": ["a", "b", "c"],
            "overlapping_entities": {},
        }
        return [{"text": first, "score": 1.5}, {"text": second, "score": 2.0}, about]

    right = {
        "label": "A",
        "text": "wind",
        "df": None,
        "chains": [
            chain("f", "g", {"label": "yes"}),
            chain("f", "h", {"label": "not-quite"}),
            chain("g2", "g1", None),
            chain("i", "j", None),
            chain("i", "k", {"label": None}),
        ],
    }
    wrong = {
        "label": "B",
        "text": "coal",
        "df": "coal is",
        "chains": [chain("f", "g", {"label": "yes"})],
    }
    row = {
        "id": "1",
        "fact1": "g1",
        "fact2": "g2",
        "answerKey": "A",
        "question": {"stem": "What renews?", "choices": [right, wrong]},
    }
    (tmp_path / "eqasc.json").write_text(json.dumps([row]))
    last = "What renews? wind"
    assert chains(str(tmp_path / "eqasc.json")) == [
        (last, ["f", "g", last], [None, None, 1.0]),
        (last, ["f", "h", last], [None, None, 0.0]),
        (last, ["g2", "g1", last], [None, None, 1.0]),
    ]
    assert "left out: 2 rows (a chain that nobody judged)" in capsys.readouterr().out


def test_the_share_of_yes_votes_is_the_label_of_eobqa(tmp_path):
    names = (
        "QID\tChain#\tTag\tQuestion\tAnswer\tFact1\tFact2\tWOL score\tTurk\tTurks\tExtra Facts\tDF"
    )
    row = (
        "1003\t1\ttest\tA thing is\twind\tIt turns.\twind renews\t49.81\tyes\tyes fact1 yes\tNIL\t"
        "A thing is wind"
    )
    (tmp_path / "e.tsv").write_text(f"{names}\n{row}\n")
    (chain,) = chains(str(tmp_path / "e.tsv"))
    assert chain == (
        "A thing is wind",
        ["It turns.", "wind renews", "A thing is wind"],
        [None, None, 2 / 3],
    )


# ------------------------------------------------------------------------------------------- REVEAL

REVEAL = [  # answer_id, step_idx, step, type_label, attribution_label, correctness_label
    ("a1", 1, "s1", "Attribution", "Unsupported", ""),
    ("a1", 1, "s1", "Attribution", "Partially", ""),
    ("a1", 0, "s0", "Attribution", "Fully", "Incorrect"),
    ("a1", 2, "s2", "Logical", "", "Correct"),
    ("a1", 3, "s3", "Both", "Contradictory", "Correct"),
    ("a1", 4, "s4", "", "", ""),
    ("a2", 0, "t0", "Logical", "Fully", "Incorrect"),
]


def reveal(tmp_path, step="step"):
    names = ["answer_id", "question_id", "question", "full_answer", "step_idx", step]
    with open(tmp_path / "reveal.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*names, "type_label", "attribution_label", "correctness_label"])
        table.writerows(
            [i, "q", f"Q {i}?", "all", n, text, *labels] for i, n, text, *labels in REVEAL
        )
    return str(tmp_path / "reveal.csv")


def test_reveal_takes_the_best_evidence_of_a_step_and_the_lower_of_two_kinds(tmp_path):
    expected = [
        ("Q a1?", ["s0", "s1", "s2", "s3", "s4"], [1.0, 0.5, 1.0, 0.0, None]),
        ("Q a2?", ["t0"], [0.0]),
    ]
    assert chains(reveal(tmp_path)) == expected
    with pytest.raises(
        UserError, match="2, 3, 4 and 4 more: no column step; name yours: --columns step=YOURS"
    ):
        chains(reveal(tmp_path, "step_text"))
    assert chains(reveal(tmp_path, "step_text"), columns={"step": "step_text"}) == expected
    columns = {"category": "question_id"}
    examples = read([reveal(tmp_path)], "score", DataConfig(columns=columns))
    assert [example.category for example in examples] == ["q", "q"]


def test_reveal_is_evaluated_on_and_trained_on_with_permission_only(tmp_path, configure):
    path = reveal(tmp_path)
    train = write(
        tmp_path / "t.jsonl",
        [{"prompt": f"p{i}", "steps": ["s"], "labels": [1]} for i in range(30)],
    )
    config = configure(
        True, train_data=[train], eval_data=[], use_reveal=True, reveal_path=path, eval_fraction=0.1
    )
    training, held_out = ([*Split(config).examples(part)] for part in (False, True))
    assert (len(training), len(held_out)) == (27, 3 + 2) and not any(e.terms for e in training)
    assert [e.dataset_id for e in held_out] == [0] * 3 + [1] * 2
    assert RawData(config).files["eval_data"].keys() == {path}
    key, config.data.eval_data, config.data.use_reveal = RawData(config).key, [path], False
    assert RawData(config).key != key  # the same files, but nothing is held out of the first
    config.data.train_data = [path]
    with pytest.raises(
        UserError,
        match="reveal.csv:2: REVEAL's owners permit it as a test set, not as a training set",
    ):
        Split(config)
    config.data.train_data, config.data.eval_data, config.data.use_reveal = [train], [], True
    config.data.reveal_train_i_have_permission = True
    training, held_out = ([*Split(config).examples(part)] for part in (False, True))
    assert {e.dataset_id for e in training} == {0, 1} and config.data.weights == [1.0, 1.0]


# ----------------------------------------------------------------------------------- the named sets


def test_use_and_weight_keys_are_the_mixing_of_data_weights(tmp_path):
    prm = write(tmp_path / "prm.jsonl", [prm800k_row([prm800k_step([rating("a", 1)], chosen=0)])])
    flags = [
        "--base_model=m",
        "--train_data",
        "x",
        "--prm800k_path",
        prm,
        "--prm800k_weight=3",
        "--output_dir",
        str(tmp_path),
    ]
    data = read_command_line([*flags, "--use_prm800k"], get_lora_config(), "", "").config.data
    assert (
        data.train_paths == ["x", prm]
        and data.weights == [1.0, 3.0]
        and data.eval_paths == ["x", prm]
    )
    assert read_command_line(flags, get_lora_config(), "", "").config.data.train_paths == ["x"]
    with pytest.raises(UserError, match="use_eqasc: no file is named; add --eqasc_path FILE"):
        read_command_line([*flags, "--use_eqasc"], get_lora_config(), "", "")


def test_named_sets_are_mixed_by_weight_and_validated_one_by_one(tmp_path, configure):
    own = [{"prompt": f"p{i}", "steps": ["s"], "labels": [1]} for i in range(20)]
    rated = [
        prm800k_row([prm800k_step([rating("a", 1)], chosen=0)], problem=f"q{i}") for i in range(20)
    ]
    config = configure(
        True,
        train_data=[write(tmp_path / "own.jsonl", own)],
        eval_data=[],
        eval_fraction=0.5,
        use_prm800k=True,
        prm800k_path=write(tmp_path / "phase1.jsonl", rated),
        prm800k_weight=3.0,
        use_reveal=True,
        reveal_path=reveal(tmp_path),
    )
    task = load_task(config, torch.float32)
    rows, held_out, _ = load_or_tokenise(RawData(config), task)
    data = TrainingData(rows, held_out, config)
    drawn = rows.dataset_ids[data.rows_of_examples(np.arange(400))].tolist()
    assert drawn.count(1) == 300 and drawn.count(0) == 100
    metrics, *_ = evaluate(Run(task, config, data, torch.device("cpu"), torch.float32))
    assert {"loss", "own/loss", "phase1/loss", "reveal/loss"} < metrics.keys()


def test_long_chains_are_cut_and_empty_steps_leave_a_chain_out(tmp_path, capsys):
    rows = [
        {"prompt": "p", "steps": ["a", "b", "c"], "labels": [1, 0, 1]},
        {"prompt": "q", "steps": [""], "labels": [1]},
    ]
    path = write(tmp_path / "s.jsonl", rows)
    assert chains(path, max_steps_per_example=2) == [("p", ["a", "b"], [1.0, 0.0])]
    assert f"note: {path}: left out: 1 rows (an empty step)\n" == capsys.readouterr().out


BAD = [
    (
        {"input": "p", "steps": ["a"], "mistake_index": 1},
        "mistake_index 1; expected null, or 0 to 0",
    ),
    ({"input": "p", "steps": ["a"], "mistake_index": True}, "mistake_index True; expected null"),
    (
        {
            "Question": "p",
            "Model_Solution_Steps": ["a"],
            "Model_Solution_First_Error_Step": "0",
        },
        "Model_Solution_First_Error_Step '0'; expected N/A, or 1, 2, ...",
    ),
    (
        {"question": "p", "ground_truth": "g", "m": {"solution": "a"}, "steps": ["a"]},
        "is_correct None; expected true or false",
    ),
    (
        {"problem": "p", "steps": ["a"], "label": 1, "mistake_index": 0},
        "label 1; expected -1, or 0 to 0",
    ),
    ({"problem": "p", "steps": ["a"], "label": None}, "label None; expected -1, or 0 to 0"),
    (
        {"modified_question": "p", "modified_process": ["a"], "error_steps": [0]},
        r"error_steps \[0\]",
    ),
    (
        {"input": "A? b ки", "label": "A? c +", "task": "MATH"},
        "label is not the text of input with",
    ),
    (
        {"input": "A? b ки", "label": "A? b *", "task": "MATH"},
        "label is not the text of input with",
    ),
    (
        prm800k_row([prm800k_step([rating("a", 2)], chosen=0)]),
        r"not a row of PRM800K \(KeyError: 2\)",
    ),
    (prm800k_row([prm800k_step([rating("a", 1)], chosen=4)]), r"not a row of PRM800K \(IndexError"),
    (
        prm800k_row([prm800k_step([rating("a", 1)], chosen=-1)]),
        r"not a row of PRM800K \(IndexError",
    ),
    (
        {"prompt": "p", "steps": None, "is_correct": True},
        "is_correct True; expected true or false, and steps in a list",
    ),
    (
        {"question": "p", "ground_truth": "g", "m": {"is_correct": True}},
        "solution is None; expected a text",
    ),
    ({"labeler": "a", "question": None, "label": {}}, r"not a row of PRM800K \(TypeError"),
    (
        {"question": [], "answerKey": "A", "fact1": "", "fact2": ""},
        r"not a row of eQASC \(TypeError",
    ),
    (
        {"prompt": "p", "steps": ["a"], "labels": [1], "weight": -1},
        "weight -1; expected a number from 0 on",
    ),
    (
        {"prompt": "p", "steps": ["a"], "labels": [1], "weight": True},
        "weight True; expected a number from 0 on",
    ),
]


@pytest.mark.parametrize("row, message", BAD, ids=[message for _, message in BAD])
def test_a_row_of_another_shape_is_one_line(tmp_path, row, message):
    with pytest.raises(UserError, match=f"a.jsonl:1: {message}") as error:
        chains(write(tmp_path / "a.jsonl", [row]))
    assert "\n" not in str(error.value)
