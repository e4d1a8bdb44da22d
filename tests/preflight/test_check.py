"""--check: on a healthy run every line passes; of each planted fault the right line says FAIL, and
the exit status is 3.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from lora import adapter
from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import ResourceExhausted, Stopped
from lora.common.paths import ROOT
from lora.config.command_line import Command
from lora.data import tokenise
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.layer import LoRALinear, lora_layers
from lora.model.attention import Documents
import lora.model.compatibility
from lora.model.heads import LMHead, MLPHead
import lora.model.load
import lora.model.task
import lora.model.weights
from lora.preflight import check, data_checks, model_checks, trial
from lora.training import checkpoint
from lora.training.optimizer import init_state
from tests.conftest import script, tiny_llama
from tests.model.test_families import PACKED, PADDED, base
import train
import train_lora


@pytest.fixture
def lines(capsys, monkeypatch, tmp_path):
    """config -> {line: PASS, WARN or FAIL} of the check of a run."""
    # A planted fault must not be tokenised for others
    monkeypatch.setenv("PLAINLORA_CACHE", str(tmp_path / "cache"))

    def of(config):
        capsys.readouterr()
        stopped = False
        try:
            (train_lora if config.lora else train).main(
                Command(config, Path("none"), check=True), RawData(config)
            )
        except Stopped as error:
            stopped = error.status == 3
        printed = capsys.readouterr().out
        found = [
            line.split("  ", 1)
            for line in printed.splitlines()
            if line[:6] in ("PASS  ", "WARN  ", "FAIL  ")
        ]
        statuses = {text.partition(":")[0]: status for status, text in found}
        assert stopped == ("FAIL" in statuses.values()), printed
        return statuses

    return of


def check_only(monkeypatch, *lines):
    """Leave out the other checks of the model, and what no line of these needs before it."""
    needed = {"adapter has an effect", *lines}  # it gives B an effect
    if "base unchanged" in lines:
        needed.add("trained tensors")  # a step of training
    kept = {name: check for name, check in model_checks.MODEL.items() if name in needed}
    last = max((i for i, name in enumerate(kept) if name in lines), default=-1)
    monkeypatch.setattr(check, "MODEL", dict(list(kept.items())[: last + 1]))


def chat(i, question="How many are {} boxes of seven pears?", answer="There are {} pears in all."):
    messages = [("user", question.format(i)), ("assistant", answer.format(7 * i))]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def chain(i, labels=(1, 0)):
    steps = [f"{i}+1={i + 1}", f"so it is {i}"]
    return {"prompt": f"How many are {i} and one?", "steps": steps, "labels": list(labels)}


def write(path, rows):
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


DORA = {"use_dora": True, "modules_to_save": ["norm"]}


# Texts and chats are rows of one kind to the checks of the model: each kind of training has one.
@pytest.mark.parametrize(
    "lora, task",
    [
        (DORA, "lm"),
        (DORA, "score"),
        ({"lora_r": 4}, "chats"),
        ({"lora_r": 4}, "score"),
        ({}, "chats"),
        ({}, "score"),
    ],
    ids=str,
)
def test_a_healthy_run_passes_every_line(configure, lines, tmp_path, lora, task):
    settings = {"task": "score" if task == "score" else "lm", **lora}
    if task == "chats":
        settings["train_data"] = write(tmp_path / "train.jsonl", map(chat, range(40)))
        settings["eval_data"] = write(tmp_path / "eval.jsonl", map(chat, range(50, 60)))
    found = lines(configure(bool(lora), **settings))
    assert {*found.values()} == {"PASS"}, found
    skipped = {"lm": {"labels"}, "score": {"tied embeddings", "end token learned", "target mask"}}[
        settings["task"]
    ]
    if not lora:
        skipped |= {
            "fresh adapter changes nothing",
            "adapter has an effect",
            "saved and loaded as PEFT",
            "base unchanged",
            "merging changes nothing",
        }
    assert found.keys() == {*data_checks.DATA, *model_checks.MODEL} - skipped


@pytest.mark.parametrize("lora", [True, False])
def test_a_scorer_of_the_first_layer_passes_every_line(configure, lines, lora):
    found = lines(configure(lora, score_layer=1))
    assert {*found.values()} == {"PASS"}, found


def test_on_a_gpu_resuming_is_checked_with_and_without_deterministic_algorithms(
    configure, capsys, monkeypatch
):
    resumed, modes = model_checks.resumed, []

    def on_a_gpu(trial):
        trial.device = torch.device("cuda")  # its tensors stay where they are
        result = resumed(trial)
        trial.device = torch.device("cpu")
        return result

    def recorded(trial, weights=model_checks.weights_after_resuming):
        modes.append(torch.are_deterministic_algorithms_enabled())
        return weights(trial)

    monkeypatch.setitem(model_checks.MODEL, "resuming is exact", on_a_gpu)
    monkeypatch.setattr(model_checks, "weights_after_resuming", recorded)
    check_only(monkeypatch, "resuming is exact")
    config = configure(True)
    train_lora.main(Command(config, Path("none"), check=True), RawData(config))
    line = "PASS  resuming is exact: with --deterministic, largest difference of the weights 0 (0"
    assert line in capsys.readouterr().out
    assert modes == [False, True] and not torch.are_deterministic_algorithms_enabled()


def test_a_head_alone_passes(configure, lines):
    found = lines(configure(True, lora_r=0))
    assert {*found.values()} == {"PASS"}, found
    assert (
        "base unchanged" in found
        and not {
            "fresh adapter changes nothing",
            "adapter has an effect",
            "merging changes nothing",
        }
        & found.keys()
    )


@pytest.mark.parametrize(
    "settings",
    [
        # In bfloat16, which many CPUs only emulate, this takes half a minute.
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32", "task": "lm"},
        {"optimizer": "adamw_8bit"},
    ],
    ids=["4-bit base", "8-bit optimizer"],
)
def test_4_bit_bases_and_8_bit_optimizers_pass_on_the_embedded_base(
    configure, lines, monkeypatch, settings
):
    monkeypatch.setattr(trial, "MAX_PARAMETERS", 1)  # two of its layers
    found = lines(configure(True, base_model="embedded", learning_rate=2e-3, **settings))
    assert {*found.values()} == {"PASS"}, found


def test_a_4_bit_base_with_biases_is_unchanged(configure, lines, tmp_path, monkeypatch):
    """bitsandbytes gives the biases another dtype in its first forward pass."""
    base = tmp_path / "base"
    tiny_llama(attention_bias=True).save_pretrained(base)
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(base)
    config = configure(True, base_model=str(base), load_in_4bit=True, target_modules=["q_proj"])
    check_only(monkeypatch, "base unchanged")
    assert lines(config)["base unchanged"] == "PASS"


def test_an_encoder_passes(configure, lines, tiny_encoder, tmp_path):
    words = "abcdefghij"
    rows = [
        {"sentence1": f"{a} {b}", "sentence2": b, "score": (a < b) / 2}
        for a in words
        for b in words
    ]
    data = write(tmp_path / "pairs.jsonl", rows)
    found = lines(
        configure(
            True, base_model=str(tiny_encoder), train_data=data, eval_data=[], eval_fraction=0.2
        )
    )
    assert {*found.values()} == {"PASS"}, found


@pytest.mark.parametrize("family", ["GPT2", "Gemma2", "Mpt", "GptOss"])
def test_other_families_pass(configure, lines, tmp_path, family):
    folder = base(family, (PACKED | PADDED)[family], tmp_path)
    found = lines(
        configure(
            family != "GptOss",
            task="lm",
            base_model=str(folder),
            max_length=100,
            learning_rate=1e-3,
        )
    )
    odd = {line: status for line, status in found.items() if status != "PASS"}
    # A router that chooses one expert weighs it with 1, whatever it says: it has nothing to learn.
    assert odd == ({"trained tensors": "WARN"} if family == "GptOss" else {})


def test_of_a_large_model_the_first_layers_are_checked(configure, monkeypatch):
    monkeypatch.setattr(trial, "MAX_PARAMETERS", 1)
    task = lora.model.load.load_task(configure(False, base_model="embedded"), torch.float32)
    layers = len(task.model.layers)
    assert f"only the first 2 of its {layers} layers" in trial.keep_layers_to_check(task)
    assert (
        len(task.model.layers) == task.model.config.num_hidden_layers == 2
        and lora.model.compatibility.find_incompatibility(task) is None
    )


# ------------------------------------------------------------------------------- faults in the data

DATA_FAULTS = {
    "the same prompts in both": (
        "overlap with held-out data",
        dict(eval_data=lambda p: write(p / "e", [chat(1)] * 2)),
    ),
    "every row twice": (
        "duplicates",
        dict(train_data=lambda p: write(p / "t", [chat(i // 2) for i in range(40)])),
    ),
    "every row in two files": (
        "duplicates",
        dict(
            train_data=lambda p: [
                path for name in "tu" for path in write(p / name, map(chat, range(40)))
            ]
        ),
    ),
    "answers beyond max_length": ("examples cut off", dict(max_length=28)),
    "questions beyond max_length": (
        "examples without a target",
        dict(
            train_data=lambda p: write(
                p / "t", [chat(i, "again " * 300 * (i > 3) + "{}") for i in range(20)]
            )
        ),
    ),
    "two BOS": (
        "doubled BOS token",
        dict(
            train_data=lambda p: write(
                p / "t", [{"text": "<|im_start|><|im_start|>pears"}, {"text": "apples"}]
            )
        ),
    ),
    "one label only": (
        "labels",
        dict(
            task="score", train_data=lambda p: write(p / "t", [chain(i, (1, 1)) for i in range(20)])
        ),
    ),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_a_fault_in_the_data_is_found(configure, lines, tmp_path, monkeypatch, fault):
    line, settings = DATA_FAULTS[fault]
    settings = {
        key: value(tmp_path) if callable(value) else value for key, value in settings.items()
    }
    task = settings.setdefault("task", "lm")
    make = chat if task == "lm" else chain
    default = {"train_data": write(tmp_path / "train", map(make, range(40)))}
    default["eval_data"] = write(tmp_path / "eval", map(make, range(50, 60)))
    if line == "doubled BOS token":
        load = lora.model.weights.load_tokenizer
        monkeypatch.setattr(lora.model.weights, "load_tokenizer", lambda base: with_bos(load(base)))
    check_only(monkeypatch, line)
    assert lines(configure(True, **default | settings))[line] == "FAIL"


def with_bos(tokenizer):
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def test_what_may_be_meant_is_a_warning(configure, lines, tmp_path, monkeypatch):
    check_only(monkeypatch)  # the data
    rows = [chat(i) for i in range(40)]
    rows += [chat(41, "What does <|im_end|> mean?"), chat(3), chat(42, answer="yes " * 200)]
    data = write(tmp_path / "rows.jsonl", rows)
    found = lines(
        configure(
            True,
            task="lm",
            train_data=data,
            eval_data=write(tmp_path / "e", map(chat, range(50, 60))),
        )
    )
    assert {line for line, status in found.items() if status != "PASS"} == {
        "special tokens in texts", "duplicates", "examples cut off"
    }  # fmt: skip


# ----------------------------------------------------------------------- faults in what is computed
# Each takes the monkeypatch, and plants its fault for all that is called after it, or in the task
# that is checked.


def in_task(plant):
    """A fault in the loaded task, beyond what loading it refuses."""

    def planted(patch):
        undisturbed = check.check

        def with_fault(run, *others):
            with torch.no_grad():
                plant(run.task)
            return undisturbed(run, *others)

        patch.setattr(check, "check", with_fault)

    return planted


def halved(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


def first_lora(task):
    return next(iter(lora_layers(task.model).values()))


def all_but_first_lora(model):
    return dict(list(lora_layers(model).items())[1:])


def one_document(lengths, device):
    return Documents([sum(lengths)], device)


def wrapped(owner, name, change):
    """A fault: what owner.name returns goes through `change`."""
    original = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *a, **k: change(original(*a, **k)))


def change_row(patch, change):
    original = tokenise.chat_row

    def changed(tokens, mask, max_length):
        rendered = original(tokens, mask, max_length)
        for row in rendered.rows:
            row.targets = change(row)
        return rendered

    patch.setattr(tokenise, "chat_row", changed)


def untie(task):
    task.model.lm_head.weight = nn.Parameter(task.model.lm_head.weight.clone(), requires_grad=False)


def mean_of_means(run, batches, num_targets, step, scaler):
    for batch in batches:
        loss, count = run.task(batch)
        (loss / count / len(batches)).backward()
    return torch.tensor(loss.item() / count), False


def training_moves_the_base(patch):
    original = LoRALinear.forward

    def forward(self, x):
        if torch.is_grad_enabled():
            self.base_layer.weight.data.mul_(1 - 1e-6)
        return original(self, x)

    patch.setattr(LoRALinear, "forward", forward)


def evaluation_rounds_the_weights(patch):
    original = model_checks.evaluate

    def evaluate(run):
        run.task.bfloat16().float()
        return original(run)

    patch.setattr(model_checks, "evaluate", evaluate)


def own_targets_only(self, step):
    return max(1, sum(batch.num_targets for batch in self.batch_at(step)))


def without_scale(self):
    return self.base_layer.weight + self.lora_B.weight @ self.lora_A.weight


def fresh_state(path, parameters, optimizer):
    init_state(optimizer)


FAULTS = {
    "the user's words are targets": (
        "target mask",
        lambda p: change_row(p, lambda row: [*row.tokens[1:], -100]),
    ),
    "targets are not shifted": ("target mask", lambda p: change_row(p, lambda row: row.tokens)),
    "answers are not targets": (
        "target mask",
        lambda p: change_row(p, lambda row: [-100] * (len(row.targets) - 4) + row.targets[-4:]),
    ),
    "the end of a turn is not a target": (
        "end token learned",
        lambda p: change_row(p, lambda row: [-100 if t < 20 else t for t in row.targets]),
    ),
    "a NaN among the weights": (
        "loss on a repeated batch",
        in_task(lambda t: first_lora(t).lora_A.weight[0, :1].fill_(torch.nan)),
    ),
    "an untied head": ("tied embeddings", in_task(untie)),
    "attention leaks across documents": (
        "packing changes nothing",
        in_task(lambda t: setattr(lora.model.task, "Documents", one_document)),
    ),
    "attention to what is to come": (
        "model compatibility",
        in_task(lambda t: setattr(t.model.model.layers[0].self_attn, "is_causal", False)),
    ),
    "logits at another scale": (
        "model compatibility",
        in_task(lambda t: setattr(t.head, "scale", 1.5)),
    ),
    "B is not drawn as zero": (
        "fresh adapter changes nothing",
        in_task(lambda t: first_lora(t).lora_B.weight.fill_(0.1)),
    ),
    "the learning rate is absurd": ("loss on a repeated batch", {"learning_rate": 1e3}),
    "nothing is updated": (
        "loss on a repeated batch",
        lambda p: p.setattr(torch.optim.AdamW, "step", lambda self: None),
    ),
    "an adapter with no effect": (
        "adapter has an effect", lambda p: p.setattr(LoRALinear, "scaling", 0.0)
    ),
    "a frozen factor": (
        "trained tensors",
        in_task(lambda t: first_lora(t).lora_A.weight.requires_grad_(False)),
    ),
    "a trained base": (
        "trained tensors",
        in_task(lambda t: first_lora(t).base_layer.weight.requires_grad_(True)),
    ),
    "a detached adapter": (
        "trained tensors",
        lambda p: p.setattr(LoRALinear, "forward", lambda self, x: self.base_layer(x)),
    ),
    "sum of losses": (
        "loss is the mean over targets",
        lambda p: p.setattr(TrainingData, "num_targets_at", lambda *_: 1),
    ),
    "mean of means": (
        "gradient accumulation is exact", lambda p: p.setattr(trial, "backward", mean_of_means)
    ),
    "each process divides by its own targets": (
        "two processes equal one",
        lambda p: p.setattr(TrainingData, "num_targets_at", own_targets_only),
    ),
    "an evaluation that rounds": ("evaluation changes nothing", evaluation_rounds_the_weights),
    "optimizer state is not restored": (
        "resuming is exact", lambda p: p.setattr(checkpoint, "load_optimizer", fresh_state)
    ),
    "weights are not restored": (
        "resuming is exact",
        lambda p: p.setattr(lora.model.task.Task, "load", lambda self, folder: None),
    ),
    "the export forgets a layer": (
        "saved and loaded as PEFT",
        lambda p: p.setattr(adapter, "lora_layers", all_but_first_lora),
    ),
    "the export rounds": ("saved and loaded as PEFT", wrapped(adapter, "factors", halved)),
    "training moves the base": ("base unchanged", training_moves_the_base),
    "a merge without the scale": (
        "merging changes nothing", lambda p: p.setattr(LoRALinear, "merged_weight", without_scale)
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_is_computed_is_found(configure, lines, tmp_path, monkeypatch, fault):
    line, plant = FAULTS[fault]
    settings = {"train_data": write(tmp_path / "t", map(chat, range(40)))}
    settings["eval_data"] = write(tmp_path / "e", map(chat, range(50, 60)))
    # Some faults set it; this puts it back
    monkeypatch.setattr(lora.model.task, "Documents", Documents)
    if callable(plant):
        plant(monkeypatch)
    else:
        settings |= plant
    check_only(monkeypatch, line)
    found = lines(configure(True, task="lm", **settings))
    assert found[line] == "FAIL", found


@pytest.mark.parametrize(
    "line, owner, name, change",
    [
        (
            "labels",
            tokenise,
            "chain_row",
            lambda rendered: [r.targets.reverse() for r in rendered.rows] and rendered,
        ),
        ("loss is the mean over targets", MLPHead, "forward", lambda loss: loss * 1.5),
        ("resuming is exact", lora.model.task, "load_tensors", halved),
    ],
)
def test_a_fault_in_scores_is_found(configure, lines, monkeypatch, line, owner, name, change):
    wrapped(owner, name, change)(monkeypatch)
    check_only(monkeypatch, line)
    assert lines(configure(True))[line] == "FAIL"


def test_a_check_that_ends_in_an_error_has_failed(configure, lines, monkeypatch):
    monkeypatch.setattr(LMHead, "predict", lambda self, hidden, targets: hidden[999_999])
    check_only(monkeypatch, "fresh adapter changes nothing", "merging changes nothing")
    found = lines(configure(True, task="lm"))
    assert found["fresh adapter changes nothing"] == found["merging changes nothing"] == "FAIL"


def test_the_script_exits_with_3_and_writes_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_only(monkeypatch)  # the data
    rows = write(tmp_path / "rows.jsonl", map(chain, range(40)))[0]
    flags = [
        "--base_model",
        "embedded",
        "--task",
        "score",
        "--train_data",
        rows,
        "--eval_data",
        rows,
    ]
    flags += ["--max_length", 512, "--check"]
    status, out, err = script(monkeypatch, capsys, ROOT / "train_lora.py", *flags)
    assert status == 3, err
    assert "FAIL  overlap with held-out data: 40 of 40" in out
    assert err.startswith("error: --check: 1 failed: overlap with held-out data.") and {
        *tmp_path.iterdir()
    } == {Path(rows)}


def test_answers_that_are_not_to_be_learned_are_no_fault(configure, lines, tmp_path, monkeypatch):
    check_only(monkeypatch)  # the data
    rows = []
    for i in range(40):
        first, second = chat(i), chat(i + 50)
        first["messages"][1]["train"] = False
        rows.append({"messages": first["messages"] + second["messages"]})
    data = {"train_data": write(tmp_path / "train", rows), "eval_data": write(tmp_path / "e", rows)}
    assert lines(configure(True, task="lm", **data))["target mask"] == "PASS"


def test_an_output_layer_that_is_tied_may_be_trained(configure, lines, monkeypatch):
    check_only(monkeypatch, "trained tensors")
    found = lines(configure(True, task="lm", modules_to_save=["lm_head"]))
    assert found["trained tensors"] == "PASS"


def test_a_difference_that_is_no_number_is_found():
    zeros, broken = torch.zeros(3), torch.tensor([0.0, torch.nan, 0.0])
    for values in ((zeros, broken), (broken, zeros)):
        result = trial.same_tensors(values, (torch.ones(3), torch.ones(3)), 1e9, "difference")
        assert result.status == "FAIL"


def test_memory_that_runs_out_in_a_check_ends_it(configure, lines, monkeypatch):
    monkeypatch.setattr(trial, "backward", lambda *arguments: (torch.zeros(()), True))
    with pytest.raises(ResourceExhausted, match="out of memory in a check"):
        lines(configure(True, task="lm"))
