"""RUN/report.html: one file with everything in it, of finished and unfinished runs, whatever they
are called.
"""

from html.parser import HTMLParser
import json
import re
import shutil

import pytest

from lora.common.errors import UserError
from lora.tools.charts import chart, ticks
from lora.tools.finished_run import FinishedRun
from lora.tools.report import checkpoint_table, main
from tests.conftest import run
from tests.preflight.test_check import chat, write


class Reader(HTMLParser):
    """The texts and the attributes of a page; an end tag must close what was opened last."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.links = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("section", "svg", "div", "table", "ol", "pre", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("section", "svg", "div", "table", "ol", "pre", "style"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def report(folder):
    main([str(folder)])
    page = (folder / "report.html").read_text()
    reader = Reader(page)
    assert not reader.open and not reader.links  # nothing of a network or of another file
    assert "<script" not in page and not re.search(r"url\(|@import", page)
    return reader.text


def test_a_scorers_report_has_curves_scores_and_what_it_was_made_of(configure):
    folder = run(configure(True, name="a<b>&c"))
    text = report(folder)
    for part in (
        "a<b>&c",
        "validation r2",
        "LoRA of rank 16 on base",
        "held-out sequences with",
        "step 12",
        "Reliability",
        "lora_r",
        "trainable parameters",
        "torch",
    ):
        assert part in text, part
    assert len(re.findall(r"\d\.\d{3} \([01]\)", text)) > 8  # scores with their labels
    assert "trainable" in text and "Step 0/" not in text  # of the log only what came before


@pytest.mark.parametrize("max_length", [128, 64])
def test_a_language_models_report_has_answers(configure, tmp_path, max_length):
    data = {
        "train_data": write(tmp_path / "t", map(chat, range(40))),
        "eval_data": write(tmp_path / "e", [chat(1)] * 3),
    }
    text = report(run(configure(False, task="lm", max_steps=2, max_length=max_length, **data)))
    assert text.count("How many are 1 boxes") == 3 and "There are 7 pears in all." in text


def test_of_full_fine_tuning_the_base_is_not_needed(configure, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    data = {"train_data": write(tmp_path / "t", map(chat, range(40)))}
    data["eval_data"] = write(tmp_path / "e", [chat(1)])
    folder = run(configure(False, base_model=str(base), task="lm", max_steps=1, **data))
    shutil.rmtree(base)
    assert "There are 7 pears in all." in report(folder)


def test_a_chat_that_nobody_began_leaves_the_other_samples(configure, tmp_path):
    data = {"train_data": write(tmp_path / "t", map(chat, range(40)))}
    begun = {"messages": [{"role": "assistant", "content": "Nobody asked."}]}
    data["eval_data"] = write(tmp_path / "e", [begun, chat(1)])
    text = report(run(configure(True, task="lm", max_steps=1, **data)))
    assert "There are 7 pears in all." in text


def test_a_run_that_has_not_ended_has_a_report(configure):
    folder = run(configure(True, max_steps=2))
    shutil.rmtree(folder / "final_artifact")
    (folder / "logs" / "final_results.json").unlink()
    assert "Status: not ended" in report(folder)
    (folder / "logs" / "train_metrics.jsonl").unlink()
    shutil.rmtree(folder / "checkpoints")
    assert "Configuration" in report(folder)


def test_a_checkpoint_whose_loss_is_not_finite_is_in_the_table(configure):
    folder = run(configure(True, max_steps=1))
    path = folder / "checkpoints" / "checkpoint_step_1" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["val"]["loss"] = None  # as the loop writes NaN
    path.write_text(json.dumps(state))
    table = checkpoint_table(FinishedRun.of(str(folder)))
    assert table[0] == ["", "step 1"] and ["loss", "-"] in table


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no logs/config.json there; expected the folder of a run"):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.2, 0.21), (-3, 1e6), (1e-9, 2e-9), (0, 7), (5, 6.001)]
)
def test_ticks_are_few_round_numbers_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and all(low - 1e-12 <= tick <= high * (1 + 1e-12) for tick in found)


def test_a_curve_of_one_point_or_none_is_drawn():
    assert "circle" in chart("t", "x", {"a": [(0, 1e17)]})
    assert chart("t", "x", {"a": []}) == "" and "circle" in chart(
        "t", "x", {"a": [(0, 1.0)], "b": []}
    )
