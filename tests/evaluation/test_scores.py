"""Scores are learned as their labels say: soft, null, weighted; and read where the layout puts
them.
"""

import json

import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.common.toml_json import read_file
from lora.config.command_line import read_command_line
from lora.config.schema import DataConfig, get_lora_config
from lora.config.set_keys import from_dict
from lora.data.batches import Rows
from lora.data.examples import Example
from lora.data.raw_data import RawData
from lora.data.readers import read
from lora.data.tokenise import tokenise
from lora.evaluation.generate import step_scores
from lora.model.heads import MLPHead
from lora.model.load import load_task
from lora.tools import preview
import merge as merging
from tests.conftest import run, tiny_llama
from tests.data.test_step_readers import prm800k_row, prm800k_step, rating, write
from tests.model.test_families import PACKED, base
import train_lora

TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED_BASE)


def batch_of(examples, data=None):
    rows = [
        row
        for e in tokenise(examples, TOKENIZER, "score", data or DataConfig(max_length=256), True)
        for row in e.rows
    ]
    return Rows.from_rows(((row, 0) for row in rows), "score").batch(range(len(rows)))


def chain(labels, weight=1.0, prompt="From left to right: 7+8"):
    return Example(
        "x",
        prompt=prompt,
        steps=["7+8=15", "15-6=9", "9+1=10"][: len(labels)],
        labels=labels,
        weight=weight,
    )


@pytest.fixture
def task(configure):
    return load_task(configure(False), torch.float32)


def gradients(task, batch):
    task.zero_grad()
    loss, count = task(batch)
    loss.backward()
    return (
        loss,
        count,
        {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("label", [0.3, 0.0, 1.0])
def test_a_score_is_pulled_towards_its_label(loss, label):
    torch.manual_seed(0)
    head, hidden = MLPHead(8, loss=loss), torch.randn(1, 8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        head(hidden, torch.tensor([label]), torch.ones(1)).backward()
        optimizer.step()
    assert abs(head.predict(hidden, None).item() - label) < 0.01  # 0 and 1 are approached for ever


def test_a_score_that_is_rounded_to_1_has_a_loss_of_the_logits_size():
    logits = torch.tensor([17.4])
    scores = torch.sigmoid(logits)
    assert scores.item() == 1.0
    loss = MLPHead(8, loss="bce").metrics(scores, torch.zeros(1))["loss"]
    assert loss == pytest.approx(logits.item(), rel=0.06)


def test_binary_cross_entropy_is_that_of_the_score_and_is_what_is_validated(task):
    task.head.loss = "bce"
    batch = batch_of([chain([0.3, 1.0, 0.0])])
    loss, _ = task(batch)
    scores = task.predict(batch)
    plain = -(batch.targets * scores.log() + (1 - batch.targets) * (1 - scores).log())
    torch.testing.assert_close(loss, plain.sum(), rtol=1e-5, atol=0)
    assert task.head.metrics(scores, batch.targets)["loss"] == pytest.approx(
        plain.mean().item(), rel=1e-5
    )


def test_a_null_label_gives_exactly_no_gradient(task):
    """What a step without a label would have been scored does not matter: the loss is that of the
    other one alone.
    """
    batch = batch_of([chain([None, 0.3, None])])
    assert batch.num_targets == 1
    loss, _, with_nulls = gradients(task, batch)
    # The step after it is seen by nobody
    _, _, alone = gradients(task, batch_of([chain([None, 0.3])]))
    assert loss == (task.predict(batch) - 0.3).square().sum()
    for name, gradient in alone.items():
        # Sums in another order
        torch.testing.assert_close(with_nulls[name], gradient, rtol=0, atol=1e-7)
    data = DataConfig(max_length=256)
    assert tokenise([chain([None, None])], TOKENIZER, "score", data, True)[0].rows == []


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_a_weight_multiplies_the_loss_of_its_row_and_not_the_count_of_targets(task, loss):
    task.head.loss = loss
    one, two = [0.3, 1.0], [0.0, 1.0, 0.5]
    first, _, of_first = gradients(task, batch_of([chain(one)]))
    second, _, of_second = gradients(task, batch_of([chain(two, prompt="other")]))
    mixed, count, of_mixed = gradients(
        task, batch_of([chain(one, weight=3.0), chain(two, weight=0.5, prompt="other")])
    )
    assert count == 5
    torch.testing.assert_close(mixed, 3 * first + 0.5 * second, rtol=1e-5, atol=0)
    for name, gradient in of_mixed.items():
        torch.testing.assert_close(
            gradient, 3 * of_first[name] + 0.5 * of_second[name], rtol=0, atol=1e-5
        )


def test_a_weight_scales_a_language_models_loss_as_well(configure, tmp_path):
    task = load_task(configure(False, task="lm"), torch.float32)
    rows = [
        {"text": "hello there"},
        {"prompt": "p", "completion": "world", "weight": 0.0},
        {"text": "you", "weight": 2.5},
    ]
    examples = read([write(tmp_path / "t.jsonl", [rows[0], rows[2]])], "lm")
    assert [e.weight for e in examples] == [1.0, 2.5]
    assert read([write(tmp_path / "c.jsonl", rows[1:2])], "lm")[0].weight == 0.0

    def batch(chosen):
        rendered = tokenise(chosen, TOKENIZER, "lm", DataConfig(max_length=64), True)
        return Rows.from_rows(((row, 0) for e in rendered for row in e.rows), "lm").batch(
            range(len(chosen))
        )

    first, _, of_first = gradients(task, batch(examples[:1]))
    second, _, of_second = gradients(task, batch(examples[1:]))
    both, _, of_both = gradients(task, batch(examples))
    assert second.item() == pytest.approx(
        2.5 * task.predict(batch(examples[1:]))[:, 0].sum().item(), rel=1e-5
    )
    torch.testing.assert_close(both, first + second, rtol=1e-5, atol=0)
    for name, gradient in of_both.items():
        sum_of_both = of_first[name] + of_second[name]
        torch.testing.assert_close(
            gradient, sum_of_both, rtol=0, atol=1e-5 * sum_of_both.abs().max().item()
        )


# ------------------------------------------------------------------------------------------ layouts


def text_and_targets(data, tokenizer=TOKENIZER, labels=(0.25, None, 1.0)):
    (row,) = tokenise([chain(list(labels), prompt="P")], tokenizer, "score", data, True)[0].rows
    ends = [i for i, target in enumerate(row.targets) if target == target]
    return tokenizer.decode(row.tokens), [
        (tokenizer.decode(row.tokens[i]), row.targets[i]) for i in ends
    ]


def test_the_plain_layout_is_a_line_each():
    text, targets = text_and_targets(DataConfig(max_length=256))
    assert text == "P\n7+8=15\n15-6=9\n9+1=10\n" and targets == [("\n", 0.25), ("\n", 1.0)]


@pytest.mark.parametrize(
    "name, marker, expected",
    [
        ("qwen_math_prm", "<extra_0>",
         "<|im_start|>system\nPlease reason step by step, and put your final answer within "
         "\\boxed{}.<|im_end|>\n<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
         "7+8=15<extra_0>15-6=9<extra_0>9+1=10<extra_0>"),
        ("skywork_prm", "\n", "<s>P\n7+8=15\n15-6=9\n9+1=10\n"),
        ("math_shepherd_prm", "ки", "P Step 1: 7+8=15ки\nStep 2: 15-6=9ки\nStep 3: 9+1=10ки"),
    ],
)  # fmt: skip
def test_the_layouts_of_known_scorers_are_presets(name, marker, expected):
    """The tokenizer's way with blanks is not tested here: Mistral's puts one before ки."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<extra_0>"], special_tokens=True)
    tokenizer.add_tokens(["ки"])
    tokenizer.add_special_tokens({"bos_token": "<s>"})  # which it does not write by itself
    data = from_dict(read_file(ROOT / "configs" / f"{name}.toml"), name).data
    assert data.step_marker == marker
    assert text_and_targets(data, tokenizer) == (expected, [(marker, 0.25), (marker, 1.0)])


def test_a_marker_is_one_token_or_has_to_be_added():
    with pytest.raises(
        UserError,
        match="step_marker '<step>' is . tokens, expected one; add --add_special_tokens '<step>'",
    ):
        tokenise([chain([1.0])], TOKENIZER, "score", DataConfig(step_marker="<step>"), True)


def test_an_encoder_has_no_layout():
    with pytest.raises(UserError, match="an encoder reads a pair of texts; leave them out"):
        tokenise([chain([1.0])], TOKENIZER, "score", DataConfig(step_marker="."), False)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt_format=x"], "prompt_format 'x': expected {prompt} in it"),
        (["--step_format={marker}"], "step_format '{marker}': expected {step} in it"),
        (
            ["--step_format={step}\\n"],
            "a backslash and an n; for a line break write",
        ),
        (
            ["--step_format={step}{marker}"],
            "step_format '{step}{marker}' has a {marker}; add --step_marker TOKEN",
        ),
        (
            ["--step_marker=<s>", "--step_format={marker} {step}"],
            "{step} behind the first {marker}, where the score is read; write it before",
        ),
    ],
)
def test_a_format_without_its_place_is_an_error(flags, message):
    with pytest.raises(UserError) as error:
        read_command_line(["--base_model=m", "--train_data=x", *flags], get_lora_config(), "", "")
    assert message in str(error.value)
    with pytest.raises(UserError) as error:
        preview.main(["arithmetic:test:1", "--task=score", *flags])
    assert message in str(error.value)


def test_a_prompt_that_begins_with_bos_has_no_other(monkeypatch):
    bos = TOKENIZER.convert_tokens_to_ids("\n")
    monkeypatch.setattr("lora.data.tokenise.bos_tokens", lambda tokenizer: [bos])
    for prompt_format in ("\n{prompt}", "{prompt}"):
        data = DataConfig(max_length=64, prompt_format=prompt_format)
        (row,) = tokenise([chain([1.0])], TOKENIZER, "score", data, True)[0].rows
        assert row.tokens[0] == bos != row.tokens[1]


def test_the_head_computes_in_fp32_under_autocast_too():
    torch.manual_seed(0)
    head, hidden = MLPHead(8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = head.predict(hidden, None)
    assert torch.equal(in_autocast, head.predict(hidden, None))


# ---------------------------------------------------------------------------------- heads of others


def other_base(tmp_path, **tensors):
    """A folder with the tiny model's weights, the embedded tokenizer, and some more tensors."""
    model = tiny_llama(tie_word_embeddings=False)
    torch.manual_seed(7)
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | tensors)
    TOKENIZER.save_pretrained(tmp_path)
    return str(tmp_path)


def scores_and_hidden(configure, base, **values):
    task = load_task(configure(False, base_model=base, **values), torch.float32)
    batch = batch_of([chain([0.0, 0.0, 0.0])])
    return task.predict(batch).detach(), task.target_hidden_states(batch).detach(), task


def test_a_two_class_head_among_the_bases_weights_is_gone_on_from(configure, tmp_path):
    names = {
        "score.0.weight": (32, 32),
        "score.0.bias": (32,),
        "score.2.weight": (2, 32),
        "score.2.bias": (2,),
    }
    t = {name: torch.randn(shape) for name, shape in names.items()}
    scores, hidden, task = scores_and_hidden(configure, other_base(tmp_path, **t))
    assert not task.head_is_random  # or eval.py would say so
    logits = (
        torch.relu(hidden @ t["score.0.weight"].T + t["score.0.bias"]) @ t["score.2.weight"].T
        + t["score.2.bias"]
    )
    torch.testing.assert_close(scores, logits.softmax(-1)[:, 1], rtol=0, atol=1e-5)
    random, _, task = scores_and_hidden(configure, other_base(tmp_path, **t), init_from="scratch")
    assert task.head_is_random
    assert (random - scores).abs().max() > 1e-3


def test_a_linear_head_among_the_bases_weights_is_gone_on_from_and_all_of_the_head_can_learn(
    configure, tmp_path
):
    one = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    two = {"score.weight": torch.randn(2, 32), "score.bias": torch.randn(2)}
    scores, hidden, task = scores_and_hidden(configure, other_base(tmp_path / "one", **one))
    plain = torch.sigmoid(hidden @ one["v_head.summary.weight"][0] + one["v_head.summary.bias"])
    torch.testing.assert_close(scores, plain, rtol=0, atol=1e-5)
    task(batch_of([chain([0.0, 1.0, 0.0])]))[0].backward()
    assert task.head.layers[3].weight.grad.count_nonzero() > 16  # a ReLU is off at some units
    scores, hidden, _ = scores_and_hidden(configure, other_base(tmp_path / "two", **two))
    plain = (hidden @ two["score.weight"].T + two["score.bias"]).softmax(-1)[:, 1]
    torch.testing.assert_close(scores, plain, rtol=0, atol=1e-5)


def test_two_tokens_of_the_output_layer_make_a_head(configure, tmp_path):
    base = other_base(tmp_path)
    scores, hidden, _ = scores_and_hidden(configure, base, head_tokens=["+", "-"])
    good, bad = (TOKENIZER(token).input_ids[0] for token in "+-")
    logits = hidden @ AutoModelForCausalLM.from_pretrained(base).lm_head.weight[[good, bad]].T
    torch.testing.assert_close(scores, logits.softmax(-1)[:, 0].detach(), rtol=0, atol=1e-5)
    with pytest.raises(
        UserError, match="head_tokens [+] [+]-: expected two, each of them one token"
    ):
        scores_and_hidden(configure, base, head_tokens=["+", "+-"])


@pytest.mark.parametrize(
    "family, changes",
    [("GPTNeoX", {}), ("Phi", {}), ("Granite", {"logits_scaling": 8.0})],
)
def test_the_two_tokens_are_read_from_whatever_is_the_output_layer(
    configure, tmp_path, family, changes
):
    folder = base(family, PACKED[family] | changes, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    if theirs.lm_head.bias is not None:
        torch.nn.init.normal_(theirs.lm_head.bias)
    theirs.save_pretrained(folder)
    if family == "GPTNeoX":
        assert "embed_out.weight" in load_file(folder / "model.safetensors")
    config = configure(True, base_model=str(folder), head_tokens=["+", "-"], max_length=64)
    task = load_task(config, torch.float32).eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        scores = task.head.predict(task.model(tokens).last_hidden_state[0], None)
        logits = theirs.eval()(tokens).logits[0]
    ids = [TOKENIZER(token).input_ids[0] for token in "+-"]
    torch.testing.assert_close(scores, logits[:, ids].softmax(-1)[:, 0], rtol=0, atol=1e-5)


def test_two_tokens_do_not_take_the_place_of_a_head_that_was_trained(configure, tmp_path):
    folder = run(configure(False, max_steps=1)) / "final_artifact"
    config = configure(False, base_model=str(folder), head_tokens=["+", "-"])
    with pytest.raises(UserError, match="the base has a score head of its own; leave them out"):
        load_task(config, torch.float32)


def test_a_head_that_began_with_two_tokens_is_evaluated_and_merged(configure, tmp_path):
    folder = run(configure(False, max_steps=1, head_tokens=["+", "-"])) / "final_artifact"
    arguments = evaluation.read_arguments(["--checkpoint", str(folder), "--prompt", "1+1\n=2"])
    evaluation.main(*arguments, evaluation.read_request(*arguments))
    lora = run(configure(True, "lora", max_steps=1, head_tokens=["+", "-"])) / "final_artifact"
    merged = tmp_path / "merged"
    flags = ["--adapter", str(lora), "--output", str(merged), "--dtype=float32"]
    merging.main(merging.read_arguments(flags))
    arguments = evaluation.read_arguments(["--checkpoint", str(merged), "--prompt", "1+1\n=2"])
    evaluation.main(*arguments, evaluation.read_request(*arguments))


def test_the_backbone_of_a_scorers_checkpoint_brings_its_head_along(configure):
    checkpoint = run(configure(False, max_steps=1)) / "checkpoints" / "checkpoint_step_1"
    config = configure(True, base_model=str(checkpoint / "backbone"))
    task = load_task(config, torch.float32)
    head = load_file(checkpoint / "mlp_head.safetensors")
    assert all(torch.equal(tensor, head[name]) for name, tensor in task.head.state_dict().items())


def test_a_head_that_is_not_finite_is_refused(task, tmp_path):
    tensors = task.head.state_dict()
    tensors["layers.3.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "mlp_head.safetensors")
    with pytest.raises(UserError, match="mlp_head.safetensors: not finite numbers: layers.3.bias"):
        task.load_head(tmp_path)


# ---------------------------------------------------------------------------------- phases, serving


def test_the_two_phases_of_the_recipe_follow_each_other(tiny_base, tmp_path):
    texts = [f" Step 1: 3+4=7 {right}\nStep 2: 7-2=9 {wrong}" for right, wrong in ("кк", "+-")]
    texts[0] = texts[0].replace("к", "ки")
    shepherd = [
        {"input": f"From {i}?{texts[0]}", "label": f"From {i}?{texts[1]}", "task": "GSM8K"}
        for i in range(20)
    ]
    rated = [
        prm800k_row(
            [prm800k_step([rating("a", 1), rating("b", 0)], chosen=0)], problem=f"problem {i}"
        )
        for i in range(20)
    ]
    row = "1\t1\tt\tA thing {}\twind\tIt turns.\twind renews\t49.8\tyes\tyes fact1 yes\tNIL\t"
    row += "so it is\n"
    table = "QID\tChain#\tTag\tQuestion\tAnswer\tFact1\tFact2\tWOL score\tTurk\tTurks\t"
    table += "Extra Facts\tDF\n"
    (tmp_path / "e.tsv").write_text(table + "".join(row.format(i) for i in range(20)))
    common = [
        "--base_model",
        str(tiny_base),
        "--max_length=128",
        f"--output_dir={tmp_path}",
        "--batch_size=2",
    ]

    def phase(name, *flags):
        config = ["--config", str(ROOT / "configs" / f"{name}.toml"), f"--experiment_name={name}"]
        command = read_command_line([*config, *common, *flags], get_lora_config(), "", "")
        train_lora.main(command, RawData(command.config))
        lines = [
            json.loads(line)
            for line in (command.run_dir / "logs" / "train_metrics.jsonl").read_text().splitlines()
        ]
        return command.run_dir, [line for line in lines if "val/loss" in line]

    first, _ = phase(
        "prm_phase1",
        "--train_data",
        write(tmp_path / "shepherd.jsonl", shepherd),
        "--learning_rate=1e-2",
    )
    sets = [
        "--eval_fraction=0.4",
        "--prm800k_path",
        write(tmp_path / "phase2.jsonl", rated),
        "--eqasc_path",
        str(tmp_path / "e.tsv"),
    ]
    _, one = phase(
        "prm_phase2", *sets, "--init_from", str(first / "final_artifact"), "--experiment_name=with"
    )
    _, other = phase("prm_phase2", *sets, "--experiment_name=without")
    assert {"val/phase2/loss", "val/e/loss"} < one[0].keys() and one[0]["val/loss"] != other[0][
        "val/loss"
    ]


def test_who_pools_at_the_marker_gets_our_scores(configure, tmp_path):
    """FORMATS of others: softmax of two classes at every position of the step's tag, as vLLM's
    pooling STEP has it.
    """
    marker = dict(add_special_tokens=["<extra_0>"], step_marker="<extra_0>", step_format="{step}")
    config = configure(True, modules_to_save=["embed_tokens"], learning_rate=3e-2, **marker)
    folder, merged = run(config), tmp_path / "merged"
    merging.main(
        merging.read_arguments(
            ["--adapter", str(folder / "final_artifact"), "--output", str(merged)]
        )
    )
    tokenizer, model = (
        AutoTokenizer.from_pretrained(merged),
        AutoModel.from_pretrained(merged).eval(),
    )
    assert model.config.num_labels == 2 and model.config.architectures == [
        "LlamaForProcessRewardModel"
    ]
    tag, tensors = (
        tokenizer.convert_tokens_to_ids("<extra_0>"),
        load_file(merged / "model.safetensors"),
    )
    ids = tokenizer(
        "From left to right: 3+4-2\n3+4=7<extra_0>7-2=6<extra_0>", return_tensors="pt"
    ).input_ids
    hidden = model(ids).last_hidden_state[0]
    hidden = torch.relu(hidden @ tensors["score.0.weight"].T + tensors["score.0.bias"])
    served = (hidden @ tensors["score.2.weight"].T + tensors["score.2.bias"]).softmax(-1)[
        ids[0] == tag, 1
    ]
    flags = ["--checkpoint", str(merged), "--prompt", "From left to right: 3+4-2\n3+4=7\n7-2=6"]
    arguments, config = evaluation.read_arguments(flags)
    task = evaluation.load(arguments.checkpoint, config, torch.device("cpu"))
    examples = evaluation.read_request(arguments, config).examples
    (ours,) = step_scores(examples, task, config, torch.float32)
    torch.testing.assert_close(torch.from_numpy(ours).float(), served, rtol=0, atol=1e-5)
