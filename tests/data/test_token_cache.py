"""What is tokenised once is used again: the same rows, for the same bytes and settings only, by any
number of processes.
"""

from collections import defaultdict
import dataclasses
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile

import numpy as np
import pytest
import torch

from lora.common.errors import ResourceExhausted, UserError
from lora.config.parse_values import kind_of
from lora.data import counts, raw_data, split, token_cache
from lora.data.entry_writer import ARRAYS, EntryWriter
from lora.data.processes import AHEAD, in_processes
from lora.data.raw_data import NOT_IN_KEY, RawData, cache_folder, cache_key, content_sha256
from lora.data.tokenise import NO_TOKEN
from lora.export.final_artifact import hub_revisions
from lora.model.load import load_task
from tests.conftest import run


@pytest.fixture
def chats(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{i} " * (i + 1)},
            ]
        }
        for i in range(40)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings(configure, path, **values):
    return configure(False, task="lm", train_data=[str(path)], eval_data=[], **values)


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def test_a_second_run_reads_no_data_and_tokenises_nothing(configure, chats, monkeypatch):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)
    *first, facts = token_cache.load_or_tokenise(RawData(config), task)
    monkeypatch.setattr(token_cache, "tokenise", None)
    source = RawData(config)
    assert source.split is None
    *second, again = token_cache.load_or_tokenise(source, task)
    assert facts == again and all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(isinstance(rows.tokens, np.memmap) for rows in second)
    assert (
        facts["train"]["examples"] == 36
        and facts["eval"]["examples"] == 4
        and facts["overlap"] == 0
    )


def test_a_worker_of_a_pool_tokenises_without_processes(configure, chats, monkeypatch):
    config = settings(configure, chats)
    process = multiprocessing.current_process()
    monkeypatch.setitem(process._config, "daemon", True)  # as in one of multiprocessing.Pool
    monkeypatch.setattr(token_cache, "MANY_SHARDS", 1)
    rows, _, _ = token_cache.load_or_tokenise(RawData(config), load_task(config, torch.float32))
    assert len(rows) == 36


def test_a_hash_that_another_process_is_writing_is_taken_again(chats, own_cache):
    os.utime(chats, (1, 1))  # it has settled, so its hash is remembered
    expected = content_sha256(str(chats))
    (remembered,) = own_cache.glob("sha256/*")
    remembered.write_text("")
    assert content_sha256(str(chats)) == expected == remembered.read_text()


def test_max_length_auto_and_its_number_share_an_entry(configure, chats, monkeypatch):
    """A resumed run has the number, where the command says auto."""
    config = settings(configure, chats)
    config.data.max_length = "auto"
    source = RawData(config)
    task = load_task(config, torch.float32)
    token_cache.load_or_tokenise(source, task)
    assert config.data.max_length == 512  # all that the base can read
    monkeypatch.setattr(token_cache, "tokenise", None)
    token_cache.load_or_tokenise(RawData(config), task)


@pytest.mark.parametrize("change", ["data", "max_length", "template", "split"])
def test_a_change_of_data_settings_or_template_is_another_entry(configure, chats, change):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)
    before, _, _ = token_cache.load_or_tokenise(RawData(config), task)
    if change == "data":
        chats.write_text(chats.read_text().replace("say 7", "say 8"))
    elif change == "template":
        task.tokenizer.chat_template = task.tokenizer.chat_template.replace(
            "<|im_start|>", "<|im_start|>the "
        )
    else:
        config.data.max_length, config.data.eval_fraction = {
            "max_length": (20, 0.1),
            "split": (256, 0.5),
        }[change]
    after, _, facts = token_cache.load_or_tokenise(RawData(config), task)
    assert not equal(before, after)
    examples = list(RawData(config).split_data().examples(held_out=False))
    fresh, _ = token_cache.tokenise_examples(examples, task.tokenizer, task.causal, config, "train")
    assert equal(fresh, after) and facts["train"]["rows"] == len(after)


OTHER_VALUES = {str: "other", bool: True, int: 7, float: 0.25}


@pytest.mark.parametrize("table", ["model", "data"])
def test_the_key_has_every_setting_that_may_change_a_token(configure, chats, table):
    sums = defaultdict(lambda: "the same bytes")
    before = cache_key(settings(configure, chats), sums)
    for field in dataclasses.fields(getattr(settings(configure, chats), table)):
        config = settings(configure, chats)
        container, kind = kind_of(field.type)
        value = OTHER_VALUES[kind]
        if container is list:
            value = [value]
        elif container is dict:
            value = {"step": "other"}
        if field.name == "train_data":
            value = [str(chats.with_name("other.jsonl"))]
        elif field.name == "eval_data":
            continue  # the bytes of held-out files are hashed: the next test
        setattr(getattr(config, table), field.name, value)
        changed = cache_key(config, sums) != before
        assert changed == (field.name not in NOT_IN_KEY), field.name


def test_held_out_files_are_hashed_and_not_their_paths(configure, chats):
    config = settings(configure, chats)
    keys = set()
    for name, content in (("a.jsonl", "one"), ("b.jsonl", "one"), ("a.jsonl", "two")):
        config.data.eval_data = [name]
        keys.add(cache_key(config, {str(chats): "chats", name: content}))
    assert len(keys) == 2


def test_the_same_bytes_under_another_suffix_are_another_entry(configure, chats):
    """The suffix chooses the reader: a text file is one document, a table has one in each row."""
    table, renamed = chats.with_suffix(".csv"), chats.with_suffix(".txt")
    for path in (table, renamed):
        path.write_text("text\n" + "".join(f"Document {i}.\n" for i in range(40)))
    task = load_task(settings(configure, chats), torch.float32)
    counts = [
        token_cache.load_or_tokenise(RawData(settings(configure, path)), task)[2]["train"][
            "examples"
        ]
        for path in (renamed, table)
    ]
    assert counts == [1, 36]


def test_processes_that_start_at_once_share_one_entry(configure, chats, own_cache):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)
    fork = multiprocessing.get_context("fork")
    start, found = fork.Barrier(3), fork.SimpleQueue()

    def tokenise():
        start.wait(60)
        rows, _, facts = token_cache.load_or_tokenise(RawData(config), task)
        found.put((len(rows), int(rows.tokens.sum()), facts["train"]["targets"]))

    processes = [fork.Process(target=tokenise) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    said = {found.get() for _ in processes}
    assert len(said) == 1 and said.pop()[0] == 36
    assert len(list(own_cache.glob("*/[!.]*/facts.json"))) == 1 and not list(
        own_cache.glob("*/.tmp*")
    )


def test_an_interrupted_entry_is_made_again(configure, chats, monkeypatch, own_cache):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)

    def fail(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # With everything written, but for the last
        patch.setattr("lora.common.atomic_files.fsync_folder", fail)
        with pytest.raises(KeyboardInterrupt):
            token_cache.load_or_tokenise(RawData(config), task)
    assert not list(own_cache.glob("*/[!.]*/facts.json"))
    rows, _, _ = token_cache.load_or_tokenise(RawData(config), task)
    assert len(rows) == 36 and not list(own_cache.glob("*/.tmp_*"))


def test_where_the_cache_cannot_be_written_the_run_goes_on(
    configure, chats, own_cache, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own_cache.write_text("a file stands where the folder would be")
    config = settings(configure, chats)
    rows, _, _ = token_cache.load_or_tokenise(RawData(config), load_task(config, torch.float32))
    assert len(rows) == 36 and "tokenised data is not kept" in capsys.readouterr().out
    assert rows.tokens.sum() > 0 and not list(tmp_path.glob("plainlora_*"))  # nor left behind


def test_gz_hub_and_plain_files_give_the_same_rows(configure, chats, tmp_path, monkeypatch):
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(chats.read_bytes()))
    snapshot = tmp_path / "hub" / "datasets--someone--chats" / "snapshots" / "abc"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "chats.jsonl").write_bytes(chats.read_bytes())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    import huggingface_hub.file_download

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    paths = [str(chats), str(packed), "hf://datasets/someone/chats/data/chats.jsonl"]
    task = load_task(settings(configure, chats), torch.float32)
    tables = [
        token_cache.load_or_tokenise(RawData(settings(configure, path)), task)[0] for path in paths
    ]
    assert equal(tables[0], tables[1]) and equal(tables[0], tables[2])
    assert hub_revisions(paths) == {paths[2]: "abc"}


def test_cut_rows_and_rows_without_a_target_are_counted_and_said(configure, chats):
    config = settings(configure, chats, max_length=24)
    task = load_task(config, torch.float32)
    examples = list(RawData(config).split_data().examples(held_out=False))
    rows, facts = token_cache.tokenise_examples(
        examples, task.tokenizer, task.causal, config, "train"
    )
    lengths = np.diff(rows.offsets)
    assert (
        facts["cut"] and facts["rows"] == len(rows) == facts["examples"] - facts["without_target"]
    )
    assert (
        lengths.max() == facts["lengths"][2] == 24
        and facts["targets"] == (rows.targets != NO_TOKEN).sum()
    )
    line = counts.describe_data("train", facts)
    assert f"{facts['cut']} examples (" in line and "cut off at max_length" in line
    of_shards = counts.Counts()
    for unprinted in ({"tools": 1}, {"tools": 1, "developer messages": 1}):
        shard = counts.Counts(unprinted=unprinted)
        of_shards.add(shard)
        of_shards = counts.Counts(**json.loads(json.dumps(vars(of_shards))))  # as it is continued
    line = counts.describe_data("train", {**facts, "unprinted": of_shards.unprinted})
    said = "left out, as the chat template does not print it: tools (2), developer messages (1)"
    assert line.endswith(said)


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv("PLAINLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "plainlora"


# ------------------------------------------------------------------------------------------ shards


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(split, "SHARD_SIZE", 1000)  # of characters: a few of the chats
    monkeypatch.setattr(split, "KEPT_SIZE", 0)


def in_one_shard(config, task):
    source = RawData(config)
    assert len(source.split.shard_sizes) == 1
    *tables, facts = token_cache.load_or_tokenise(source, task)
    copies = [[np.array(getattr(rows, name)) for name in ARRAYS] for rows in tables]
    shutil.rmtree(source.folder)
    return copies, facts


def same_entry(tables, facts, expected):
    copies, expected_facts = expected
    arrays = [[getattr(rows, name) for name in ARRAYS] for rows in tables]
    for of_part, copies_of_part in zip(arrays, copies, strict=True):
        for array, copy in zip(of_part, copies_of_part, strict=True):
            assert array.tobytes() == copy.tobytes()  # NaN is where no score is
    assert facts == expected_facts  # with the hashes of all arrays


@pytest.mark.parametrize("num_processes", [1, 2])
def test_many_shards_in_any_number_of_processes_are_one_table(
    configure, chats, request, monkeypatch, num_processes
):
    config = settings(configure, chats, max_length=40)
    task = load_task(config, torch.float32)
    expected = in_one_shard(config, task)
    request.getfixturevalue("small_shards")
    monkeypatch.setattr(token_cache, "MANY_SHARDS", 2 if num_processes > 1 else 10**9)
    monkeypatch.setattr(os, "cpu_count", lambda: num_processes)
    source = RawData(config)
    assert len(source.split.shard_sizes) > 4
    *tables, facts = token_cache.load_or_tokenise(source, task)
    same_entry(tables, facts, expected)


def test_scores_in_many_shards_have_the_same_facts(configure, request):
    config = configure(False, train_data=["arithmetic:train:60"], eval_data=[])
    task = load_task(config, torch.float32)
    expected = in_one_shard(config, task)
    request.getfixturevalue("small_shards")
    *tables, facts = token_cache.load_or_tokenise(RawData(config), task)
    for part in ("train", "eval"):  # a sum in another order
        total = expected[1][part].pop("target_sum")
        assert facts[part].pop("target_sum") == pytest.approx(total, rel=1e-12)
    same_entry(tables, facts, expected)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_tokenisation_goes_on_where_it_stopped(
    configure, chats, request, own_cache, monkeypatch, damaged
):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)
    expected = in_one_shard(config, task)
    request.getfixturevalue("small_shards")
    append = EntryWriter.append
    num_shards = len(RawData(config).split.shard_sizes)

    def killed_in_the_third(writer, shard):
        if writer.num_shards == 2:
            for file in writer.files.values():
                file.write(b"half of a shard")
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        append(writer, shard)

    with monkeypatch.context() as patch:
        patch.setattr(EntryWriter, "append", killed_in_the_third)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=token_cache.load_or_tokenise, args=(RawData(config), task))
        process.start()
        process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (tokens,) = own_cache.glob("*/.tmp_*/train_tokens.bin")
    if damaged:  # a power cut may lose what was not yet on the disk
        damage(tokens, place=0)

    done = []
    monkeypatch.setattr(
        EntryWriter, "append", lambda writer, shard: (done.append(1), append(writer, shard))
    )
    source = RawData(config)
    assert source.split is not None  # half an entry is none
    *tables, facts = token_cache.load_or_tokenise(source, task)
    assert len(done) == num_shards - (0 if damaged else 2)
    same_entry(tables, facts, expected)
    assert not list(own_cache.glob("*/.tmp_*"))


def test_an_error_in_a_process_is_the_users_and_leaves_nothing(
    configure, chats, own_cache, small_shards, monkeypatch
):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)
    template = task.tokenizer.chat_template
    refusal = "{% if 'say 30' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    task.tokenizer.chat_template = refusal + template
    monkeypatch.setattr(token_cache, "MANY_SHARDS", 2)
    with pytest.raises(UserError, match="chats.jsonl:31: the chat template of .* refuses it: no"):
        token_cache.load_or_tokenise(RawData(config), task)
    assert not list(own_cache.glob("*/*/"))


def test_a_killed_process_is_a_want_of_resources(
    configure, chats, own_cache, small_shards, monkeypatch
):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)
    monkeypatch.setattr(token_cache, "MANY_SHARDS", 2)
    monkeypatch.setattr(
        "lora.data.token_cache.tokenise", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(ResourceExhausted, match="is kept: start again"):
        token_cache.load_or_tokenise(RawData(config), task)


def test_the_data_is_read_only_a_few_shards_ahead_of_the_processes():
    read = 0

    def arguments():
        nonlocal read
        for i in range(40):
            read += 1
            yield i

    results = []
    for result in in_processes(str, arguments(), 2):
        results.append(result)
        assert read - len(results) < 2 * AHEAD
    assert results == [str(i) for i in range(40)]


def test_a_resumed_run_on_many_shards_is_the_uninterrupted_one_on_one(
    configure, chats, request, own_cache
):
    config = settings(
        configure, chats, max_steps=4, eval_steps=2, save_steps=2, save_optimizer="all"
    )
    folders = {}
    for name in ("one shard", "many shards"):
        config.output.experiment_name = name
        folders[name] = run(config)
        shutil.rmtree(own_cache)
        request.getfixturevalue("small_shards")
    config.output.experiment_name = "resumed"
    resumed = run(config, folders["many shards"] / "checkpoints" / "checkpoint_step_2")
    (entry,) = own_cache.glob("*/*/facts.json")
    progress = json.loads(entry.with_name("progress.json").read_text())
    assert progress["shards"] > 4
    last = "checkpoints/checkpoint_step_4"
    for folder in (folders["many shards"], resumed):
        files = sorted((folder / last).rglob("*.safetensors"))
        assert len(files) > 1
        for path in files:
            other = folders["one shard"] / last / path.relative_to(folder / last)
            assert path.read_bytes() == other.read_bytes()


# ------------------------------------------------------------------------------------------ damage


def damage(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.unlink()  # it may be mapped
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train_tokens", "train_offsets", "eval_loss_weights"])
def test_a_changed_bit_ends_the_run_before_its_first_checkpoint(
    configure, chats, own_cache, tmp_path, name
):
    config = settings(configure, chats, max_steps=2, save_steps=1)
    token_cache.load_or_tokenise(RawData(config), load_task(config, torch.float32))
    (path,) = own_cache.glob(f"*/*/{name}.bin")
    damage(path)
    with pytest.raises(UserError, match=f"{path.parent}: {name} changed since .* is removed"):
        run(config)
    assert not path.parent.exists() and not list((tmp_path / "run" / "checkpoints").glob("*"))
    config.output.experiment_name = "again"
    run(config)


@pytest.mark.parametrize("kind", ["short", "empty", "without facts", "bad facts", "absent"])
def test_a_damaged_entry_is_tokenised_again(configure, chats, own_cache, capsys, kind):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)
    before, *_ = token_cache.load_or_tokenise(RawData(config), task)
    tokens = before.tokens.copy()
    before.check.require_undamaged()  # it is read no more
    (path,) = own_cache.glob("*/*/train_tokens.bin")
    facts = path.with_name("facts.json")
    if kind == "short":
        path.unlink()  # it is mapped
        tokens[:-1].tofile(path)
    elif kind == "empty":
        path.unlink()
        path.write_bytes(b"")
    elif kind == "without facts":
        facts.unlink()
    elif kind == "bad facts":
        facts.write_text("{}")
    else:
        path.unlink()
    after, *_ = token_cache.load_or_tokenise(RawData(config), task)
    assert np.array_equal(after.tokens, tokens)
    said = [line for line in capsys.readouterr().out.splitlines() if "tokenised again" in line]
    assert len(said) == 1 and said[0].startswith(f"note: {path.parent}: damaged (")


def test_a_limit_of_file_sizes_is_a_full_disk_and_leaves_no_entry(configure, chats, own_cache):
    config = settings(configure, chats)
    task = load_task(config, torch.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(ResourceExhausted, match="no room for it"):
            token_cache.load_or_tokenise(RawData(config), task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(own_cache.glob("*/[!.]*/facts.json"))


def test_the_hash_of_a_data_file_is_taken_again_when_the_file_changes(chats, monkeypatch):
    os.utime(chats, (1, 1))
    first = content_sha256(str(chats))
    with monkeypatch.context() as patch:
        patch.setattr(raw_data, "file_sha256", None)
        assert content_sha256(str(chats)) == first
    chats.write_text(chats.read_text().replace("say 7", "say 8"))
    assert content_sha256(str(chats)) != first
