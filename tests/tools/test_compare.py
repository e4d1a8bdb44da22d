"""Runs compared: what differs, which is better, and how sure that is."""

from functools import partial
import json
from pathlib import Path
import shlex
import shutil

import numpy as np
import pytest

from lora.common.errors import UserError
from lora.config.command_line import read_command_line
from lora.config.schema import get_lora_config
from lora.config.set_keys import from_dict, set_key
from lora.evaluation.statistics import bootstrap_samples
from lora.tools import compare
from lora.tools.compare import main, table
from lora.tools.finished_run import FinishedRun, flat_config
from lora.tools.sweep import missing_commands, proposed_name
from lora.tools.verdict import interval, spread_of_seeds, verdict
from tests.conftest import configuration, run


@pytest.fixture(scope="module")
def sweep(tiny_base, tmp_path_factory):
    """{name: folder} of four runs: two seeds, at a learning rate that teaches something and at one
    that does not.
    """
    settings = {
        "s1": {"seed": 1}, "s2": {"seed": 2},
        "slow1": {"seed": 1, "learning_rate": 1e-6}, "slow2": {"seed": 2, "learning_rate": 1e-6},
    }  # fmt: skip
    data = {
        "eval_data": ["arithmetic:validation:40"],
        "train_data": ["arithmetic:train:200"],
        "max_eval_batches": 0,
    }
    many = {"task": "lm", "max_steps": 15, "eval_steps": 5}
    make = partial(configuration, tiny_base, tmp_path_factory.mktemp("sweep"), True, **data, **many)
    return {name: run(make(name, **values)) for name, values in settings.items()}


@pytest.mark.parametrize(
    "task, settings", [("lm", {}), ("score", {}), ("score", {"score_loss": "bce"})]
)
def test_every_evaluation_keeps_the_losses_that_make_up_its_own(configure, task, settings):
    folder = run(configure(True, task=task, max_steps=6, eval_steps=3, **settings))
    finished = FinishedRun.of(folder)
    assert [step for step, _ in finished.curve()] == [0, 3, 6]
    for step, loss in finished.curve():
        kept = finished.example_losses(step).values()
        assert len(kept) == 8
        total, targets = map(sum, zip(*kept))
        assert total / targets == pytest.approx(loss, rel=1e-6)  # they are kept in fp32


def test_the_examples_are_the_same_however_they_are_laid_out(configure):
    runs = [run(configure(True, f"b{size}", max_steps=1, batch_size=size)) for size in (1, 4)]
    one, other = (FinishedRun.of(folder).example_losses(0) for folder in runs)
    assert one.keys() == other.keys()
    # Fp32, other sums
    np.testing.assert_allclose([*one.values()], [other[key] for key in one], rtol=1e-4)


def test_the_interval_covers_the_truth_19_times_of_20():
    """Of 300 simulated pairs of runs; the standard error of the share is 1.3 %."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(300):
        counts = rng.integers(1, 9, size=150)
        hard = rng.exponential(size=150)  # examples differ by more than the runs do
        ones, others = (counts * (hard + rng.exponential(shift, size=150)) for shift in (0.55, 0.5))
        _, (low, high) = interval(ones - others, counts, draws=300, seed=seed)
        hits += low <= 0.05 <= high
    assert 274 <= hits <= 296


def test_the_draws_are_the_same_for_the_same_seed():
    one, other, third = ([*map(list, bootstrap_samples(5, 3, seed))] for seed in (1, 1, 2))
    assert one == other != third and all(len(drawn) == 5 for drawn in one)


def test_one_example_has_no_interval():
    loss, ends = interval([0.5], [2])
    assert loss == 0.25 and np.isnan(ends).all()


def test_seeds_cannot_be_told_apart_and_learning_can(sweep, capsys):
    runs = {name: FinishedRun.of(folder) for name, folder in sweep.items()}
    spread = spread_of_seeds(runs.values())
    assert spread[1] == 2 and spread[0] > 0
    assert ": cannot tell" in verdict(runs["s2"], runs["s1"], spread)
    assert ": worse" in verdict(runs["slow1"], runs["s1"], spread)
    assert ": better" in verdict(runs["s2"], runs["slow1"], spread)
    alone = verdict(runs["slow1"], runs["s1"], spread_of_seeds([runs["slow1"], runs["s1"]]))
    assert ": worse (as models" in alone
    main([*map(str, sweep.values()), "--against", str(sweep["s1"])])
    assert capsys.readouterr().out.count(" minus s1: ") == 3


def test_the_table_has_what_differs_and_how_it_ended_best_first(sweep, capsys, tmp_path):
    unfinished = tmp_path / "begun"
    (unfinished / "logs").mkdir(parents=True)
    config = json.loads((sweep["s1"] / "logs" / "config.json").read_text())
    del config["lora"]  # as of full fine-tuning
    (unfinished / "logs" / "config.json").write_text(json.dumps(config))
    (unfinished / "logs" / "train_metrics.jsonl").write_text(
        '{"step": 0, "val/loss": 0.5}\n{"step": 8, "val/l'
    )
    runs = sorted(
        (FinishedRun.of(folder) for folder in [unfinished, *sweep.values()]),
        key=lambda one: one.best_loss,
    )
    rows = table(runs)
    heading = list(rows[0])
    assert (
        set(heading[:5]) == {"run", "learning_rate", "seed", "lora_r", "best loss"}
        and "token_accuracy" in heading
        and "tokens/s" in heading
    )
    assert (
        {row["run"] for row in rows[:2]} == {"s1", "s2"}
        and rows[-1]["run"] == "begun"
        and rows[-1]["ending"] == "not ended"
    )
    losses = [row["best loss"] for row in rows[:-1]]
    assert losses == sorted(losses)
    results = json.loads((sweep[rows[0]["run"]] / "logs" / "final_results.json").read_text())
    assert losses[0] == results["best"]["loss"]
    main([str(folder) for folder in sweep.values()])
    printed, sketch = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in printed.splitlines()[-5:]] == [
        "run",
        *(row["run"] for row in rows[:-1]),
    ]
    assert sketch.startswith("validation loss (cross entropy), from") and sketch.count("▁")


def test_runs_of_other_contents_under_one_path_are_told_apart(sweep, tmp_path):
    other = shutil.copytree(sweep["s1"], tmp_path / "other")
    for path in other.glob("checkpoints/*/trainer_state.json"):
        state = json.loads(path.read_text())
        name = next(iter(state["facts"]["train_data"]))
        state["facts"]["train_data"][name] = "0" * 64
        path.write_text(json.dumps(state))
    runs = [FinishedRun.of(sweep["s1"]), FinishedRun.of(other)]
    assert len({row["data"] for row in table(runs)}) == 2
    assert "data" not in table(runs[:1] * 2)[0]
    assert missing_commands(runs[1], runs[:1], ["seed=1"])


def test_a_key_that_one_of_two_runs_has_not_set_differs(sweep, tmp_path):
    other = shutil.copytree(sweep["s1"], tmp_path / "other")
    config = json.loads((other / "logs" / "config.json").read_text())
    config["data"]["max_samples"] = 100
    (other / "logs" / "config.json").write_text(json.dumps(config))
    rows = table([FinishedRun.of(str(sweep["s1"])), FinishedRun.of(str(other))])
    assert [row["max_samples"] for row in rows] == [None, 100]


def test_a_run_that_was_stopped_tells_nothing_about_seeds(sweep, tmp_path):
    runs = [FinishedRun.of(str(sweep[name])) for name in ("s1", "s2")]
    stopped = FinishedRun.of(str(shutil.copytree(sweep["s2"], tmp_path / "s3")))
    stopped.settings["seed"], stopped.status = 3, {"exit": 130, "error": "stopped"}
    for line in stopped.lines:
        line["val/loss"] = 9.0
    assert spread_of_seeds([*runs, stopped]) == spread_of_seeds(runs)


def test_a_sweep_of_a_run_on_several_processes_is_started_so(sweep, tmp_path, capsys):
    run_dir = shutil.copytree(sweep["s1"], tmp_path / "r")
    for path in run_dir.glob("checkpoints/*/trainer_state.json"):
        state = json.loads(path.read_text())
        state["facts"]["place"]["processes"] = 2
        path.write_text(json.dumps(state))
    main([str(run_dir), "--sweep", "seed=1,2"])
    *_, title, line = capsys.readouterr().out.splitlines()
    assert title == f"not yet run, with all other keys as in {run_dir}:"
    assert line.startswith("torchrun --nproc_per_node=2 ")


def test_what_of_a_sweep_is_missing_is_printed_and_can_be_run(sweep, capsys):
    folders = [str(sweep["s1"]), str(sweep["s2"])]
    main([*folders, "--sweep", "seed=1,2,3", "lora_r=16"])
    *_, title, line = capsys.readouterr().out.splitlines()
    assert title == f"not yet run, with all other keys as in {sweep['s1']}:"
    words = shlex.split(line)
    assert words[:2] == ["python", "train_lora.py"]
    command = read_command_line(words[2:], get_lora_config(), None, "")
    assert command.config.training.seed == 3 and command.config.training.max_steps == 15
    assert command.config.output.experiment_name == "s3"
    run(command.config)
    main([*folders, str(command.run_dir), "--sweep", "seed=1,2,3", "lora_r=16"])
    assert "not yet run" not in capsys.readouterr().out


def test_a_proposed_name_is_not_that_of_a_run_with_other_settings(sweep, capsys):
    """s3 of "s1" with another seed would be the name of a run with another rank."""
    runs = [FinishedRun.of(str(sweep["s1"])), FinishedRun.of(str(sweep["s2"]))]
    runs[1].settings["lora_r"] = 3
    (command,) = missing_commands(runs[0], runs, ["seed=2"])
    assert "--experiment_name s2_2 " in command


@pytest.mark.parametrize(
    "name, of_run, values, expected",
    [
        ("r16", {"lora_r": 16, "lora_alpha": 32.0}, (32, 64.0), "r32_lora_alpha_64"),
        ("r16", {"lora_r": 16, "lora_alpha": 32.0}, (64, 32.0), "r64"),
        ("r4", {"lora_r": 4, "seed": 1}, (1, 2), "r1_seed_2"),
        ("r4_s1", {"lora_r": 4, "seed": 1}, (1, 2), "r1_s2"),
        ("r4_lr1e-2", {"lora_r": 4, "learning_rate": 0.01}, (1, 0.001), "r1_lr0.001"),
        ("r1_use_dora_True", {"lora_r": 1, "use_dora": True}, (1, False), "r1_use_dora_False"),
        ("r16_q_proj", {"target_modules": ["q_proj"]}, (["v_proj"],), "r16_v_proj"),
        ("2026-12-01_r4", {"lora_r": 1}, (2,), "2026-12-01_r4_lora_r_2"),
    ],
)
def test_every_combination_has_a_name_of_its_own(name, of_run, values, expected):
    config = get_lora_config()
    for key, value in zip(of_run, values):
        set_key(config, key, value, "test")
    assert proposed_name(FinishedRun(Path(name), of_run), config, of_run) == expected


def test_only_other_seeds_tell_how_much_chance_there_is(sweep):
    runs = {name: FinishedRun.of(folder) for name, folder in sweep.items()}
    assert spread_of_seeds([runs["s1"], runs["s1"]]) == (0.0, 0)
    again = spread_of_seeds([*runs.values(), runs["s1"]])
    assert again == spread_of_seeds(runs.values())
    config = from_dict(runs["s2"].settings_by_table, "test")
    config.output.logging_steps, config.output.save_steps = 3, 7
    config.evaluation.threshold = 0.3
    assert flat_config(config) == runs["s2"].settings


def test_the_picture_of_the_runs_is_written(sweep, tmp_path):
    main([*map(str, sweep.values()), "--plot", str(tmp_path / "sweep.png")])
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        compare.swept_key([FinishedRun.of(folder) for folder in sweep.values()]) == "learning_rate"
    )


def test_runs_without_an_evaluation_make_a_picture_and_a_table(configure, tmp_path, capsys):
    folders = [tmp_path / "fast", tmp_path / "slow"]
    for folder, rate in zip(folders, (1e-3, 1e-4)):
        (folder / "logs").mkdir(parents=True)
        configure(True, learning_rate=rate).save(folder / "logs" / "config.json")
    main([*map(str, folders), "--plot", str(tmp_path / "a.png")])
    assert capsys.readouterr().out.count("not ended") == 2 and (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/no/such"], "no folder of a run is named"),
        (
            ["{run}", "--plot", "/no/such/a.png"],
            "--plot /no/such/a.png: expected the name of a .png file",
        ),
        (["{run}", "--sweep", "lora_r"], "--sweep lora_r: expected KEY=VALUE"),
        (["{run}", "--sweep", "artifact_version=a,b"], "artifact_version: it changes no numbers"),
        (["{run}", "--sweep", "threshold=0.3"], "--sweep threshold: it changes no numbers"),
        (["{run}", "--sweep", "lora_x=1"], "--sweep lora_x: no such key"),
        (["{run}", "--sweep", "seed=1", "--sweep", "seed=2"], "--sweep seed: given twice"),
        (["{run}", "--against", "/no/such"], "/no/such: no logs/config.json"),
    ],
)
def test_a_mistake_is_one_line(sweep, arguments, message):
    with pytest.raises(UserError, match=message):
        main([argument.format(run=sweep["s1"]) for argument in arguments])


def test_examples_of_other_tokens_are_not_compared(configure):
    runs = []
    for name, step_marker in (("plain", ""), ("marked", ".")):
        folder = run(configure(True, name, max_steps=1, step_marker=step_marker))
        runs.append(FinishedRun.of(folder))
    causes = "(do data, tokenizer, layout or max_length differ?)"
    line = "plain minus marked: cannot tell: they share no validation examples of the same tokens"
    assert verdict(*runs, (0.0, 0)) == f"{line} {causes}"


def test_losses_of_two_kinds_are_not_compared_and_a_run_that_was_prolonged_has_not_ended(
    configure, capsys
):
    mse = run(configure(True, "mse", max_steps=2))
    bce = run(configure(True, "bce", max_steps=2, score_loss="bce"))
    main([str(mse), str(bce), "--against", str(mse)])
    not_told = "bce minus mse: cannot tell: their losses are not on one scale"
    assert not_told in capsys.readouterr().out
    (bce / "status.json").write_text('{"exit": 143, "error": "stopped", "run_dir": "bce"}')
    assert not FinishedRun.of(bce).has_ended and FinishedRun.of(bce).ending
    main([str(mse), "--sweep", "max_samples=10,20", "bf16=true,false"])
    printed = capsys.readouterr().out
    assert "mse_max_samples_10_dtype_bfloat16" in printed and "--max_samples 20" in printed
