"""`share_prompts`: answers to one prompt come in one step, and what they share is read once, with equal results."""

from itertools import groupby
import json

import numpy as np
import pytest
import torch

from lora.attention import Documents, packed_attention
from lora.data import Rows, TrainingData
from lora.errors import UserError
from lora.model import load_task
from lora.render import NO_SCORE, NO_TOKEN, Row
from lora.source import Source
from lora.store import tokenised
from tests.conftest import run
from tests.test_data import assert_equal_gradients, gradients

PROMPTS, ANSWERS = 12, 4


@pytest.fixture
def write(tmp_path):
    """write(task): a file of chains, or of chats, with those of one prompt scattered over it; two have more in common."""

    def row(task, i, k):
        prompt, steps = (
            f"Problem {i}: add {i} and {i + 1}. Is that odd?",
            [f"{i}+{i + 1}={2 * i + k // 2}", f"so {k} it is"],
        )
        if task == "score":
            return {"prompt": prompt, "steps": steps, "labels": [float(k < 2), k / ANSWERS]}
        texts = [("user", prompt), ("assistant", steps[0]), ("user", "And?"), ("assistant", steps[1])]
        return {"messages": [{"role": role, "content": content} for role, content in texts]}

    def write(task):
        path = tmp_path / f"{task}.jsonl"
        rows = [row(task, i, k) for k in range(ANSWERS) for i in range(PROMPTS)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def data_of(configure, path, task="score", rank=0, world=1, **values):
    """(task, its TrainingData)"""
    config = configure(False, task=task, train_data=[path], eval_data=[path], **values)
    model = load_task(config, torch.float32)
    rows, held_out, _ = tokenised(Source(config), model)
    return model, TrainingData(rows, held_out, config, model.packed, rank, world)


def prompts_of(data, steps):
    return [data.rows.prompts[data.rows_at(step)].tolist() for step in steps]


@pytest.mark.parametrize("task", ["score", "lm"])
def test_what_is_read_once_gives_the_losses_and_gradients_of_rows_apart(configure, write, task):
    model, data = data_of(configure, write(task), task, share_prompts=True, batch_size=8)
    batches, rows = data.batch_at(0), data.rows_at(0)
    apart = [data.rows.batch([i]) for i in rows]
    assert sum(b.tokens.numel() for b in batches) < 0.7 * sum(b.tokens.numel() for b in apart)
    assert sum(b.num_targets for b in batches) == sum(b.num_targets for b in apart)
    shared = [len(batch.target_positions) - len(batch.target_positions.unique()) for batch in batches]
    assert sum(shared) > 0  # targets of two rows at one position
    assert_equal_gradients(gradients(model, batches), gradients(model, apart))
    with torch.no_grad():
        alone = dict(zip(rows.tolist(), map(model.predict, apart)))
        for batch in batches:
            expected = torch.cat([alone[row] for row in batch.rows])
            torch.testing.assert_close(model.predict(batch), expected, rtol=0, atol=1e-5)


def test_answers_to_one_prompt_come_together_and_each_once_per_pass(configure, write):
    _, data = data_of(configure, write("score"), share_prompts=True, batch_size=ANSWERS, gradient_accumulation_steps=1)
    first, second = range(PROMPTS), range(PROMPTS, 2 * PROMPTS)
    for steps in (first, second):
        assert sorted(row for step in steps for row in data.rows_at(step)) == [*range(ANSWERS * PROMPTS)]
        assert all(len({*prompts}) == 1 for prompts in prompts_of(data, steps))
    assert prompts_of(data, first) != prompts_of(data, second)
    _, apart = data_of(configure, write("score"), batch_size=ANSWERS, gradient_accumulation_steps=1)
    assert max(len({*prompts}) for prompts in prompts_of(apart, first)) == ANSWERS


def test_prompts_with_many_answers_come_no_earlier_than_others(configure):
    """As they would if a prompt's place were that of the first of its rows in a shuffle of all rows."""
    answers = [(prompt, k) for prompt in range(40) for k in range(1 + 9 * (prompt % 2))]
    rows = Rows.of(((Row([prompt, k], [k, NO_TOKEN], prompt=prompt), 0) for prompt, k in answers), "lm")
    data = TrainingData(rows, rows, configure(False, task="lm", share_prompts=True))
    orders = [[prompt for prompt, _ in groupby(rows.prompts[data.order(0, epoch)].tolist())] for epoch in range(100)]
    assert all(sorted(order) == [*range(40)] for order in orders)
    places = [place for order in orders for place, prompt in enumerate(order) if prompt % 2]
    assert abs(np.mean(places) - 19.5) < 1.0  # of 2,000 places with a standard deviation of 11.5: four times the mean's


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_have_each_row_once_about_as_much_of_it_and_prompts_whole_where_they_can(configure, write, world):
    path, settings = write("score"), {"world": world, "share_prompts": True}
    parts = [data_of(configure, path, rank=rank, **settings)[1] for rank in range(world)]
    for part in parts:
        part.examples_per_step = ANSWERS * PROMPTS
    rows = [[row for batch in part.batch_at(0) if batch.num_targets for row in batch.rows] for part in parts]
    assert sorted(row for of_rank in rows for row in of_rank) == [*range(ANSWERS * PROMPTS)]
    prompts = [{*parts[0].rows.prompts[of_rank].tolist()} for of_rank in rows]
    assert sum(map(len, prompts)) <= PROMPTS + world - 1  # at most one is cut where a process's part ends
    sizes = [parts[0].rows.lengths(np.array(of_rank)).sum() for of_rank in rows]
    assert max(sizes) - min(sizes) <= 2 * parts[0].rows.lengths(np.arange(ANSWERS * PROMPTS)).max()


def test_the_rows_tried_before_the_first_step_are_no_fewer_positions_than_any_step_has(configure):
    """The longest are answers to one prompt: shared, they would be a small micro-batch."""
    prompt = [*range(20, 80)]
    alike = [(Row([*prompt, i], [NO_TOKEN] * 59 + [i, NO_TOKEN], prompt=1), 0) for i in range(8)]
    others = [(Row([*range(100 * i, 100 * i + 40)], [5] * 39 + [NO_TOKEN], prompt=i), 0) for i in range(2, 18)]
    rows = Rows.of([*alike, *others], "lm")
    settings = {"max_length": 64, "batch_size": 4, "gradient_accumulation_steps": 2}
    data = TrainingData(rows, rows, configure(False, task="lm", share_prompts=True, **settings))
    tried = max(batch.tokens.numel() for batch in data.batch_at(None))
    assert tried >= max(batch.tokens.numel() for step in range(6) for batch in data.batch_at(step)) > 61 + 7


def test_windows_of_a_text_are_prompts_of_their_own(configure, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} of a long text.\n" for i in range(300)))
    _, data = data_of(configure, str(path), "lm", share_prompts=True, max_length=32)
    assert len({*data.rows.prompts.tolist()}) == len(data.rows) > 50
    order = data.order(0, 0).tolist()
    assert sorted(order) == [*range(len(order))] != order


def test_a_mask_holds_the_positions_of_its_own_document_only():
    """An attention that keeps its mask for the backward pass would else keep one of the whole length squared."""
    documents = Documents([7, 9], [0, 8])
    mask = documents.unseen(9, 8, None, torch.zeros(1))
    assert mask.untyped_storage().nbytes() == 4 * 9 and documents.unseen(9, 8, None, torch.zeros(1)) is mask


def test_rows_that_are_equal_or_begin_another_are_read_once(configure, write):
    task, _ = data_of(configure, write("score"))
    long = [5, 6, 7, 8, 9, 10]
    tokens = [long[:4], long, long, [*long[:2], 11], [20, 21], long]
    rows = Rows.of(((Row(t, [NO_SCORE] * (len(t) - 1) + [i / 10]), 0) for i, t in enumerate(tokens)), "score")
    with torch.no_grad():
        apart = torch.cat([task.predict(rows.batch([i])) for i in range(6)])
        rows.share = True
        for order, positions in ((range(6), 4 + 2 + 0 + 1 + 2 + 6), (rows.groups(range(6), 99)[0], 4 + 2 + 1 + 2)):
            batch = rows.batch(order)
            assert batch.tokens.numel() == positions
            torch.testing.assert_close(task.predict(batch), apart[[*order]], rtol=0, atol=1e-6)


def test_a_run_that_reads_once_has_the_metrics_of_one_that_does_not(configure, write, monkeypatch):
    """On the same rows in the same order."""
    path = write("score")

    def metrics(name):
        config = configure(True, name, train_data=[path], eval_data=[path], share_prompts=True)
        lines = map(json.loads, (run(config) / "logs" / "train_metrics.jsonl").read_text().splitlines())
        return [line[key] for line in lines for key in ("train/loss", "train/grad_norm", "val/loss") if key in line]

    once = metrics("once")
    monkeypatch.setattr(Rows, "shared", lambda self, indices: [0] * len(indices))
    apart = metrics("apart")
    assert once != apart and len(apart) > 24
    assert once == pytest.approx(apart, rel=1e-3)  # fp32 sums in another order, carried through 12 updates


def test_a_model_that_cannot_share_is_refused(configure, tiny_encoder):
    with pytest.raises(UserError, match="share_prompts needs one that reads from left to right"):
        load_task(configure(False, base_model=str(tiny_encoder), max_length=64, share_prompts=True), torch.float32)
    module = type("Encoder", (), {"is_causal": False})
    with pytest.raises(ValueError, match="causal models only"):
        packed_attention(module, *torch.randn(3, 1, 2, 9, 4), None, documents=Documents([7, 5], [0, 3]))
