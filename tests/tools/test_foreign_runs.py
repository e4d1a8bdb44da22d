"""Folders of runs that somebody else has written: compare and report read nothing outside of them,
print no control characters, and say in one line what is odd.
"""

import csv
import io
import json
import os
import shlex
import shutil

import numpy as np
import pytest

from lora.common.checksums import write_checksums
from lora.common.errors import UserError
from lora.tools import compare, report
from lora.tools.sweep import missing_commands
from tests.conftest import configuration, run
from tests.preflight.test_check import chat, write

CONTROL = "\x1b[31m\x1b]0;title\x07\u202e\u200f\x9b\ud800"
STATE = "checkpoints/checkpoint_step_2/trainer_state.json"
METRICS = "logs/train_metrics.jsonl"


@pytest.fixture(scope="module")
def run_once(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = {
        "train_data": write(folder / "t", map(chat, range(40))),
        "eval_data": write(folder / "e", [chat(1)] * 3),
    }
    settings = {"task": "lm", "max_steps": 2, "eval_steps": 1, "max_length": 128}
    return run(configuration(tiny_base, folder, True, "lm", **settings, **data))


@pytest.fixture
def foreign(run_once, tmp_path):
    return shutil.copytree(run_once, tmp_path / "foreign")


def seal(folder):
    (folder / "checksums.json").unlink()
    write_checksums(folder)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_link(path, target):
    path.unlink()
    path.symlink_to(target)


def as_fifo(path):
    path.unlink()
    os.mkfifo(path)


LINES = [  # of train_metrics.jsonl
    *['{"step": 9, "val/loss": NaN}', '{"step": 9, "val/loss": -Infinity}', '{"val/loss": 1}'],
    *['{"step": 9, "val/loss": 1e308}', '{"step": 9, "val/loss": "low"}', '{"step": "9"}'],
    *['{"step": -1}', "[9]", "nine", "", "[" * 100_000, '{"step": 9, "x": {"y": 1}}'],
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:40])
@pytest.mark.parametrize("tool", [compare, report])
def test_an_odd_line_of_metrics_is_named(foreign, tool, line):
    with open(foreign / METRICS, "a") as file:
        file.write(line + "\n")
    number = len((foreign / METRICS).read_text().splitlines())
    with pytest.raises(UserError, match=f"train_metrics.jsonl:{number}: ") as error:
        tool.main([str(foreign)])
    assert len(str(error.value)) < 1000


ODD_FILES = {
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "no JSON": lambda path: path.write_text("x\n"),
    "a list": lambda path: path.write_text("[]\n"),
    "a link out of the folder": lambda path: as_link(path, "/etc/passwd"),
    "a link to itself": lambda path: as_link(path, path.name),
    "a pipe": as_fifo,
    "a device": lambda path: as_link(path, "/dev/zero"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
READ_BY = {
    "logs/config.json": (compare, report),
    METRICS: (compare, report),
    "logs/final_results.json": (compare, report),
    "status.json": (compare, report),
    STATE: (report,),
}


@pytest.mark.parametrize("oddity", ODD_FILES)
@pytest.mark.parametrize("name", READ_BY)
def test_an_odd_file_is_named(foreign, name, oddity):
    if name == "status.json":
        (foreign / name).touch()
    ODD_FILES[oddity](foreign / name)
    for tool in READ_BY[name]:
        message = name.rpartition("/")[2] + "|no folder of a run is named"  # without config.json
        with pytest.raises(UserError, match=message) as error:
            tool.main([str(foreign)])
        assert "root:" not in str(error.value)


ODD_VALUES = [
    ("logs/final_results.json", {"best": "x"}),
    ("logs/final_results.json", {"seconds": float("nan")}),
    ("logs/final_results.json", {"peak_memory_gb": 1e308}),
    ("logs/final_results.json", {"last": {"step": 1, "loss": [1]}}),
    ("logs/config.json", {"training": {"seed": "x"}}),
    ("logs/config.json", {"training": 5}),
    (STATE, {"step": "x"}),
    (STATE, {"val": {"loss": "low"}}),
    (STATE, {"val": {"loss": float("inf")}}),
    (STATE, {"unknown": 1}),
]


@pytest.mark.parametrize("name, values", ODD_VALUES, ids=str)
def test_an_odd_value_is_named(foreign, name, values):
    change(foreign / name, **values)
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        report.main([str(foreign)])


ARRAYS = {
    "texts": {"id": ["a"], "loss": ["b"], "targets": ["c"]},
    "not finite": {"id": [1], "loss": [np.nan], "targets": [1]},
    "lengths": {"id": [1, 2], "loss": [1.0], "targets": [1]},
    "no targets": {"id": [1], "loss": [1.0], "targets": [0]},
    "numbers": {"id": 1, "loss": 1.0, "targets": 1},
    "objects": {"id": [{}], "loss": [{}], "targets": [{}]},
    "another array": {"x": [1]},
    "large": {"id": np.zeros(40_000_000), "loss": [1.0], "targets": [1]},  # 320 MB, zipped 0.3
}


@pytest.mark.parametrize("name", ARRAYS)
def test_odd_losses_of_examples_are_named(foreign, run_once, name):
    best = compare.FinishedRun.of(str(foreign)).best_step
    path = foreign / "logs" / "examples" / f"step_{best}.npz"
    np.savez_compressed(path, **{key: np.asarray(values) for key, values in ARRAYS[name].items()})
    with pytest.raises(UserError, match=rf"step_{best}.npz: damaged"):
        compare.main([str(foreign), "--against", str(run_once)])


def page_of(folder):
    report.main([str(folder)])
    return (folder / "report.html").read_text()


def test_a_link_as_the_log_is_not_followed(foreign, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret\n")
    as_link(next(foreign.glob("logs/train_*.log")), secret)
    with pytest.raises(UserError, match="a link that leads out of its folder"):
        report.main([str(foreign)])
    assert not (foreign / "report.html").exists()


@pytest.mark.parametrize("name", ["logs", "checkpoints"])
def test_a_linked_folder_is_not_followed(foreign, tmp_path, name):
    shutil.move(foreign / name, tmp_path / "elsewhere")
    (foreign / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link that leads out of its folder"):
        report.main([str(foreign)])


@pytest.mark.parametrize("key", ["train_data", "eval_data"])
def test_no_other_file_than_the_runs_data_comes_into_the_page(foreign, tmp_path, key):
    assert "what it held out is not known" not in page_of(foreign)
    rows = [chat(7, question="the secret"), {"messages": [{"role": "the secret", "content": ""}]}]
    secret = write(tmp_path / "secret", rows)[0]
    toml = foreign / "final_artifact" / "training_config.toml"
    own = json.loads((foreign / "logs" / "config.json").read_text())["data"][key][0]
    toml.write_text(toml.read_text().replace(own, str(secret)))
    seal(foreign / "final_artifact")
    page = page_of(foreign)
    assert "the secret" not in page
    # With eval_data, the training files are not read, so their errors are not shown.
    assert ("what it held out is not known" in page) == (key == "eval_data")


@pytest.mark.parametrize("name", ["report.html", ".tmp_report.html"])
def test_the_page_is_not_written_through_a_link(foreign, tmp_path, name):
    other = tmp_path / "other"
    other.write_text("mine")
    (foreign / name).symlink_to(other)
    assert "<html" in page_of(foreign)
    assert other.read_text() == "mine" and not (foreign / "report.html").is_symlink()


def test_a_damaged_artifact_is_said_in_the_page(foreign, capsys):
    (foreign / "final_artifact" / "README.md").write_text("x")
    page = page_of(foreign)
    assert "README.md&#39;: changed" in page and "on held-out examples" not in page
    assert "'README.md': changed" in capsys.readouterr().out


def has_control(text):
    return any(character in text for character in CONTROL if character not in "[]0;title3m1")


def test_no_control_characters_reach_the_terminal_or_the_page(foreign, tmp_path, capsys):
    """In the name of the folder, the base, a metric, the reason of an end and the log."""
    # A half of a character is no part of a file's name.
    foreign = foreign.rename(tmp_path / f"a{CONTROL[:-1]}")
    config = json.loads((foreign / "logs" / "config.json").read_text())
    config["model"]["base_model"] = f"base{CONTROL}"
    change(foreign / "logs" / "config.json", **config)
    change(foreign / STATE, val={"loss": 1.0, f"x{CONTROL}": 1.0})
    (foreign / "logs" / "final_results.json").unlink()
    (foreign / "status.json").write_text(json.dumps({"exit": 3, "error": f"stopped{CONTROL}"}))
    log = next(foreign.glob("logs/train_*.log"))
    log.write_text(f"log{CONTROL[:-1]}\n" + log.read_text())
    other = shutil.copytree(foreign, tmp_path / "b")
    config["model"]["base_model"] = "c"
    change(other / "logs" / "config.json", **config)
    for form in ([], ["--format", "csv"], ["--format", "md"]):
        compare.main([str(foreign), str(other), *form])
    printed = capsys.readouterr().out
    assert printed.count("stopped") >= 4 and "base" in printed and not has_control(printed)
    page = page_of(foreign)
    assert "stopped" in page and "log" in page and not has_control(page)


# ------------------------------------------------------------------------------ what compare prints


@pytest.fixture
def stopped(foreign):
    (foreign / "logs" / "final_results.json").unlink()
    reason = "step 2: loss nan | stopped before the update"
    (foreign / "status.json").write_text(json.dumps({"exit": 3, "error": reason}))
    return foreign


def test_a_run_that_a_guard_stopped_shows_status_and_reason(stopped, run_once, capsys):
    ending = "exit status 3, stopped by a guard: step 2: loss nan | stopped before the update"
    compare.main([str(stopped), str(run_once)])
    assert f"\nforeign: {ending}\n" in capsys.readouterr().out
    compare.main([str(stopped), str(run_once), "--format", "json"])
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["foreign"]["ending"] == ending and rows["lm"]["ending"] == ""
    compare.main([str(stopped), str(run_once), "--format", "csv"])
    for row in csv.DictReader(io.StringIO(capsys.readouterr().out)):
        for name, value in rows[row["run"]].items():
            assert row[name] == ("" if value is None else str(value))
    compare.main([str(stopped), str(run_once), "--format", "md"])
    heading, rule, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and {line.count("|") for line in (heading, rule, *lines)} == {
        len(rows["lm"]) + 1
    }
    with pytest.raises(UserError, match="--format prints the table alone"):
        compare.main([str(stopped), "--format", "md", "--sweep", "seed=1"])


def test_two_tasks_do_not_stand_on_one_axis(run_once, tiny_base, tmp_path, capsys, monkeypatch):
    scorer = run(configuration(tiny_base, tmp_path, True, "scorer", max_steps=1))
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    compare.main([str(run_once), str(scorer), "--plot", str(tmp_path / "a.png")])
    axes = [axes for axes in drawn[0].axes if axes.get_xlabel() == "step"]
    assert [len(one.lines) for one in axes] == [1, 1]
    assert {one.get_ylabel() for one in axes} == {
        "validation loss (cross entropy)",
        "validation loss (mse)",
    }
    assert capsys.readouterr().out.count("validation loss (") == 2


@pytest.mark.parametrize(
    "name, sweep, expected",
    [
        ("r16_s1", {"lora_r": "4", "seed": "2"}, "r4_s2"),
        ("r16_s1", {"lora_r": "16", "seed": "2"}, "r16_s2"),
        ("lr1e-2", {"seed": "2"}, "lr1e-2_seed_2"),
        ("seed11", {"seed": "2"}, "seed11_seed_2"),
        ("a16", {"r": "4"}, "a4"),
        ("a", {"prompt_format": "../{prompt}"}, "a_prompt_format_..-prompt-"),
    ],
)
def test_a_sweep_proposes_names_and_folders_like_the_runs_own(
    configure, tmp_path, monkeypatch, name, sweep, expected
):
    folder = tmp_path / "elsewhere" / name
    (folder / "logs").mkdir(parents=True)
    config = configure(True, seed=1)
    for suffix in ("json", "toml"):
        config.save(folder / "logs" / f"config.{suffix}")
    monkeypatch.chdir(tmp_path)
    first = compare.FinishedRun.of(str(folder))
    axes = [f"{key}={value}" for key, value in sweep.items()]
    (command,) = missing_commands(first, [first], axes)
    words = shlex.split(command)
    assert words[words.index("--experiment_name") + 1] == expected
    assert words[words.index("--output_dir") + 1] == "elsewhere"
