import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may look for a network
os.environ["OMP_NUM_THREADS"] = "1"  # small matrices: a second thread only waits

from functools import cache, partial
from pathlib import Path
import runpy
import sys
import tempfile

import pytest

# torch and transformers are imported where they are used: this file is also read by the process
# that only hands the tests out, before it starts the others.
from lora.common.base_model_files import EMBEDDED_BASE
from lora.config.command_line import Command
from lora.config.schema import Config, fields_by_key, get_lora_config
from lora.data.raw_data import RawData

os.environ["PLAINLORA_CACHE"] = tempfile.mkdtemp(prefix="plainlora_tests_")
os.fsync = lambda descriptor: None  # no test cuts the power, and each takes milliseconds


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """Ask once for the commit, and make intervals and baselines of scorers of less: all this takes
    most of the time of a tiny run. Scripts that run as programs do as they do for users.
    """
    from lora.common import checksums
    from lora.evaluation import step_metrics, trivial_scorers
    from lora.export import final_artifact
    from lora.training import base_integrity

    def hash_one_by_one(function, arguments):
        return {name: function(argument) for name, argument in arguments.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_metrics, "report", partial(step_metrics.report, draws=50))
        patch.setattr(trivial_scorers, "NUM_WEIGHTS", 2**14)
        patch.setattr(final_artifact, "git_commit", cache(final_artifact.git_commit))
        for module in (checksums, base_integrity):  # starting threads takes longer than hashing
            patch.setattr(module, "map_in_threads", hash_one_by_one)
        yield


def tiny_llama(**changes):
    """A random Llama of a few thousand parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = dict(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(
        LlamaConfig(**shape | dict(num_key_value_heads=2, max_position_embeddings=512) | changes)
    ).eval()


def pytest_collection_modifyitems(items):
    """Start the longest of the slow tests first, so that no worker is left alone with one."""
    items.sort(key=lambda item: item.path.stem not in ("test_slow", "test_reliability"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a random tiny Llama and the embedded tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("base")
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """A folder with a random tiny BERT and a word-level tokenizer of its kind."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(1)
    shape = dict(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    BertForSequenceClassification(BertConfig(**shape)).bert.save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def configuration(base, folder, lora, name="run", **values):
    """A small configuration of a run in folder/name."""
    config = get_lora_config() if lora else Config()
    settings = dict(
        base_model=str(base),
        task="score",
        max_length=256,
        train_data=["arithmetic:train:60"],
        eval_data=["arithmetic:validation:8"],
        learning_rate=1e-2,
        batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=12,
        eval_steps=3,
        logging_steps=1,
        save_steps=4,
        experiment_name=name,
        output_dir=str(folder),
    )
    for key, value in (settings | values).items():
        table, _ = fields_by_key(config)[key]
        setattr(table, key, value)
    return config


@pytest.fixture
def configure(tiny_base, tmp_path):
    """`configure(lora=True, task="score", learning_rate=1e-2, ...)`: a small configuration of a run
    in tmp_path.
    """
    return partial(configuration, tiny_base, tmp_path)


def run(config, resume_from="", auto=False):
    """A whole training run in this process; returns its folder."""
    import train
    import train_lora

    folder = Path(config.output.output_dir) / config.output.experiment_name
    script = train_lora if config.lora else train
    command = Command(config, folder, str(resume_from), auto)
    script.main(command, RawData(config))
    command.status.write(0)
    return folder


def script(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of a script, run as a program in this process, which has torch
    loaded already.
    """
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    capsys.readouterr()
    status = 0
    try:
        runpy.run_path(str(arguments[0]), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    return status, *capsys.readouterr()
