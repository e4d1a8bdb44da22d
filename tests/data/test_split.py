"""What is trained on and held out, by hashes and in shards, is what a list of examples gives."""

from dataclasses import replace
import gc
import hashlib
import json

import numpy as np
import pytest

from lora.common.errors import UserError
from lora.data import files, hold_out, readers, split
from lora.data.examples import Example
from lora.data.mixing import dataset_names
from lora.data.readers import read
from lora.data.split import Split


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(split, "SHARD_SIZE", 600)  # two or three examples
    monkeypatch.setattr(split, "KEPT_SIZE", 0)


def parts(config):
    """The training and the held-out examples."""
    found = Split(config)
    return [*found.examples(held_out=False)], [*found.examples(held_out=True)]


def of_whole_list(config):
    """The same, as the splits of all earlier versions were made."""
    data = config.data
    examples = read(data.train_paths, config.model.task, data)[: data.max_samples]
    if data.eval_data:
        return examples, read(data.eval_paths, config.model.task, data)
    subjects = {example.subject for example in examples}
    if len(subjects) == 1 and examples[0].text:
        end = int(len(examples[0].text) * (1 - data.eval_fraction))
        beginning, rest = examples[0].text[:end], examples[0].text[end:]
        return [replace(examples[0], text=beginning)], [replace(examples[0], text=rest)]
    ordered = sorted(subjects, key=lambda subject: hashlib.sha256(subject.encode()).digest())
    chosen = set(ordered[: max(1, round(data.eval_fraction * len(ordered)))])
    return (
        [example for example in examples if example.subject not in chosen],
        [example for example in examples if example.subject in chosen],
    )


@pytest.fixture
def paths(tmp_path):
    """Files with repeated questions, with a chat, and one that is one text."""
    questions = [{"question": f"q {i % 17}", "answer": f"a {i % 23}"} for i in range(60)]
    turns = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "q 3"}]
    turns.append({"role": "assistant", "content": "yes"})
    rows = {"questions": questions, "chats": [{"messages": turns}] * 4}
    for name, of_file in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of_file)))
    (tmp_path / "text.txt").write_bytes(b"one line\r\n" * 200)
    return {path.stem: str(path) for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["questions"], {}),
        (["questions", "chats"], {"eval_fraction": 0.3}),
        (["chats", "questions"], {"max_samples": 30, "eval_fraction": 0.5}),
        (["questions"], {"eval_data": ["chats"]}),
        (["text"], {"eval_fraction": 0.25}),
    ],
)
def test_order_and_split_are_those_of_the_whole_list(configure, paths, names, values):
    values = {"eval_data": [], **values}
    values["eval_data"] = [paths[name] for name in values["eval_data"]]
    train_data = [paths[name] for name in names]
    config = configure(False, task="lm", train_data=train_data, **values)
    expected = of_whole_list(config)
    assert parts(config) == expected
    training, held_out = expected
    facts = Split(config).facts
    distinct = {str(replace(example, where="", dataset_id=0, category="")) for example in training}
    subjects = [{example.subject for example in part} for part in expected]
    assert facts["repeated"] == len(training) - len(distinct)
    assert facts["overlap"] == len(subjects[0] & subjects[1])
    assert facts["held_out_subjects"] == len(subjects[1])
    assert facts["chats"] == any(example.messages for example in [*training, *held_out])


@pytest.mark.parametrize("num_texts", [2, 9, 10])
def test_the_end_of_each_of_a_few_text_files_is_held_out(configure, paths, tmp_path, num_texts):
    train_data = [paths["questions"]]
    for i in range(num_texts):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 50)
        train_data.append(str(tmp_path / f"{i}.txt"))
    config = configure(False, task="lm", train_data=train_data, eval_data=[], eval_fraction=0.1)
    training, held_out = ([e.text for e in part if e.text] for part in parts(config))
    if num_texts < 10:
        assert training == [f"{i}" * 45 for i in range(num_texts)]
        assert held_out == [f"{i}" * 5 for i in range(num_texts)]
    else:  # enough for a held-out set of whole ones
        assert {len(text) for text in training + held_out} == {50}
    questions = [e.messages[0]["content"] for e in parts(config)[1] if e.messages]
    assert len(set(questions)) == 2  # a tenth of 17


def test_a_long_text_file_is_read_in_parts_that_end_with_a_line(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_TEXT_LENGTH", 100)
    path = tmp_path / "long.txt"
    lines = [f"line {i} of a long text\r\n" for i in range(50)]
    path.write_bytes("".join(lines).encode())
    examples = read([str(path)], "lm")
    text = "".join(lines).replace("\r\n", "\n")
    assert "".join(example.text for example in examples) == text and len(examples) > 5
    assert all(example.text.endswith("\n") and len(example.text) < 130 for example in examples)

    # Three of them are too few to hold out a whole one.
    monkeypatch.setattr(hold_out, "LONG_TEXT", 50)
    path.write_bytes("".join(lines[:14]).encode())
    config = configure(False, task="lm", train_data=[str(path)], eval_data=[], eval_fraction=0.1)
    training, held_out = parts(config)
    assert len(training) == len(held_out) == 3
    assert all(len(end.text) < 0.15 * len(e.text) for e, end in zip(training, held_out))


def test_nothing_is_read_beyond_max_samples(configure, paths, monkeypatch):
    def rows(path, bad_rows):
        for i in range(1, 6):
            yield f"{path}:{i}", {"question": f"q {i}", "answer": "a"}
        raise AssertionError("a row too many")

    monkeypatch.setattr(readers.files, "read_rows", rows)
    absent = paths["chats"]  # it would raise as well
    config = configure(False, task="lm", train_data=[paths["questions"], absent], eval_data=[])
    config.data.max_samples = 5
    training, held_out = parts(config)
    assert len(training) + len(held_out) == 5
    config.data.max_samples = 6
    with pytest.raises(AssertionError, match="a row too many"):
        Split(config)


def test_a_bad_row_within_max_samples_is_reported(configure, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"question": "q", "answer": "a"})
    path.write_text("\n".join([good, "[", good, good, "{"]))
    config = configure(False, task="lm", train_data=[str(path)], eval_data=[], max_samples=2)
    with pytest.raises(UserError, match="rows.jsonl:2: not JSON"):
        Split(config)


def num_examples():
    gc.collect()
    return sum(type(thing) is Example for thing in gc.get_objects())


def test_two_shards_at_most_are_in_memory(configure, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"q {i}", "answer": "a" * 80} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = configure(False, task="lm", train_data=[str(path)], eval_data=[])
    found = Split(config)
    largest = max(found.shard_sizes)
    num_of_others = num_examples()  # of tests before
    alive = []
    for i, shard in enumerate(found.shards()):
        if i % 30 == 29:  # looking at all objects takes time
            alive.append(num_examples() - num_of_others)
        del shard
    assert len(found.shard_sizes) > 90 and len(alive) == len(found.shard_sizes) // 30
    assert max(alive) <= 2 * largest + 2


def test_the_hashes_of_a_split_have_the_order_of_its_whole_digests():
    texts = [f"text {i}" for i in range(1000)]
    hashes = np.array([split.hash64(text) for text in texts], np.uint64)
    by_digest = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert [texts[i] for i in hashes.argsort()] == by_digest


def test_a_bar_changes_no_row():
    assert list(split.with_bar(iter(range(2500)))) == list(range(2500))


@pytest.mark.parametrize("count, fraction, held_out", [(4, 0.9, 3), (2, 0.8, 1), (1, 0.5, 0)])
def test_one_prompt_at_least_is_left_to_train_on(count, fraction, held_out):
    hashes = np.arange(count, dtype=np.uint64)
    assert hold_out.chosen_by_hash(hashes, fraction).sum() == held_out


def test_of_a_folder_of_few_texts_the_end_of_each_is_held_out(configure, tmp_path):
    (tmp_path / "books").mkdir()
    for name in "ab":
        (tmp_path / "books" / f"{name}.txt").write_text(name * 1000)
    config = configure(True, task="lm", train_data=[str(tmp_path / "books")], eval_data=[])
    training, held_out = parts(config)
    assert [len(e.text) for e in training] == [900, 900]
    assert [len(e.text) for e in held_out] == [100, 100]


def test_names_of_data_sets_are_different():
    names = dataset_names(["a/x.jsonl", "b/x.jsonl", "x_1.jsonl", ".h.jsonl"])
    assert len(set(names)) == 4 and names[2:] == ["x_1", "data"]
