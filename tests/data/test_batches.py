"""batch_at is a pure function; how a step is cut and packed changes nothing; nothing is lost on the
way to the targets.
"""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    MistralConfig,
    MistralModel,
    RobertaConfig,
    RobertaModel,
)

from lora import inject
from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.batches import Rows
from lora.data.examples import Example
from lora.data.hold_out import chosen_by_hash
from lora.data.readers import read
from lora.data.sampler import TrainingData
from lora.data.split import Split, hash64
from lora.data.tokenise import NO_TOKEN, Row, split_text, tokenise
from lora.evaluation.predict import predict
from lora.model.attention import Documents, packed_attention
from lora.model.load import load_task
from lora.model.task import Task
from tests.conftest import run, tiny_llama
from tests.lora.test_layer import randomise


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_BASE)


def rows_of(path, task, tokenizer, causal=True):
    return as_rows(
        [
            row
            for e in tokenise(
                read([path], task), tokenizer, task, DataConfig(max_length=256), causal
            )
            for row in e.rows
        ],
        task,
    )


def as_rows(rows, task):
    return Rows.from_rows(((row, 0) for row in rows), task)


def rows_for(example, tokenizer, task, max_length=256, causal=True):
    return tokenise([example], tokenizer, task, DataConfig(max_length=max_length), causal)[0].rows


def training_data(configure, tokenizer, rank=0, world=1, examples=None, **values):
    config = configure(lora=False, **values)
    rows = rows_of("arithmetic:train:60", config.model.task, tokenizer)
    before = examples and {
        "examples_per_step": examples,
        "max_tokens": config.training.batch_size * config.data.max_length,
    }
    return TrainingData(rows, rows, config, rank=rank, world_size=world, layout=before)


def gradients(task, batches):
    """The gradient of (sum of the losses) / (number of targets), as the loop makes it."""
    task.zero_grad()
    num_targets = sum(batch.num_targets for batch in batches)
    for batch in batches:
        (task(batch)[0] / num_targets).backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def assert_equal_gradients(one, other):
    """Equal to 1e-6 of the whole gradient's norm: fp32 sums in another order."""
    norm = torch.sqrt(sum(g.square().sum() for g in one.values()))
    assert one.keys() == other.keys() and norm > 1e-3
    for name in one:
        assert (one[name] - other[name]).norm() <= 1e-6 * norm, name


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_gradients_of_all_processes_sum_to_that_of_one(configure, tokenizer, world):
    """Also of processes that get no row, and with as many micro-batches for each."""
    task = load_task(configure(False), torch.float32)
    whole = training_data(configure, tokenizer, batch_size=6, gradient_accumulation_steps=1)
    shape = dict(batch_size=2, gradient_accumulation_steps=1, max_length=100)
    parts = [
        training_data(configure, tokenizer, **shape, rank=rank, world=world, examples=6)
        for rank in range(world)
    ]
    for step in (0, 11):
        dealt = [part.batch_at(step) for part in parts]
        assert len({len(batches) for batches in dealt}) == 1
        assert {part.num_targets_at(step) for part in parts} == {
            sum(b.num_targets for b in whole.batch_at(step))
        }
        together = [batch for batches in dealt for batch in batches]
        assert_equal_gradients(gradients(task, together), gradients(task, whole.batch_at(step)))


def test_batch_at_depends_on_seed_and_step_alone(configure, tokenizer):
    one, other = (training_data(configure, tokenizer) for _ in range(2))
    later = [batch.input_ids for batch in one.batch_at(20)]
    for step in (3, 0, 20):
        other_batches = other.batch_at(step)
    assert all(torch.equal(a, b.input_ids) for a, b in zip(later, other_batches, strict=True))
    reseeded = training_data(configure, tokenizer, seed=1)
    assert not torch.equal(
        torch.cat([b.input_ids for b in reseeded.batch_at(0)], 1),
        torch.cat([b.input_ids for b in one.batch_at(0)], 1),
    )


def test_each_row_is_seen_once_per_pass(configure, tokenizer):
    data = training_data(configure, tokenizer)  # 60 rows, 8 a step: 15 steps are exactly two passes
    seen = []
    for step in range(15):
        for batch in data.batch_at(step):
            seen += [
                tuple(document.tolist()) for document in batch.input_ids[0].split(batch.seq_lens)
            ]
    every = sorted(
        tuple(data.rows.tokens[a:b]) for a, b in zip(data.rows.offsets, data.rows.offsets[1:])
    )
    assert sorted(seen[:60]) == sorted(seen[60:]) == every and seen[:60] != seen[60:]


def test_a_micro_batch_holds_at_most_batch_size_times_max_length_tokens(configure, tokenizer):
    data = training_data(configure, tokenizer, batch_size=1, gradient_accumulation_steps=8)
    batches = data.batch_at(0)
    assert sum(len(batch.seq_lens) for batch in batches) == 8 and len(batches) > 1
    assert all(
        batch.input_ids.numel() <= 256 and sum(batch.seq_lens) == batch.input_ids.numel()
        for batch in batches
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_no_micro_batch_is_larger_than_the_one_that_is_tried_first(configure, packed, world):
    """Also where two of the longest rows do not fit together, and a long and a short one do; and
    where a step has more rows than there are.
    """
    draw = random.Random(0)
    for _ in range(10):
        longest, count = draw.randint(5, 90), draw.choice([3, 40])
        lengths = [draw.randint(2, longest) for _ in range(count)]
        rows = as_rows([Row([5] * n, [5] * (n - 1) + [NO_TOKEN]) for n in lengths], "lm")
        settings = dict(batch_size=1, max_length=100)
        settings["gradient_accumulation_steps"] = draw.choice([1, 6, 20])
        config = configure(lora=False, task="lm", **settings)
        ranks = [TrainingData(rows, rows, config, packed, rank, world) for rank in range(world)]

        def largest(batches):
            return max(batch.input_ids.numel() for batch in batches)

        tried = max(largest(data.largest_batches()) for data in ranks)
        met = [largest(data.batch_at(step)) for step in range(20) for data in ranks]
        assert max(met) <= tried <= 100
        assert largest(ranks[0].evaluation()) <= tried
        assert len({len(data.largest_batches()) for data in ranks}) == 1
        layout = ranks[0].layout
        again = TrainingData(rows, rows, config, packed, 0, world, layout)
        assert again.layout == layout and again.max_tokens == ranks[0].max_tokens


@pytest.mark.parametrize("task", ["lm", "score"])
@pytest.mark.parametrize("lora", [False, True])
def test_accumulating_1x8_equals_8x1_with_ragged_targets(configure, tokenizer, task, lora):
    config = configure(lora=lora, task=task)
    model = load_task(config, torch.float32)
    if lora:
        inject(model.model, r=4)
        randomise(model.model)  # with B = 0, A has no gradient
    whole = training_data(
        configure, tokenizer, task=task, batch_size=8, gradient_accumulation_steps=1
    ).batch_at(0)
    cut = training_data(
        configure, tokenizer, task=task, batch_size=1, gradient_accumulation_steps=8
    ).batch_at(0)
    assert len(whole) == 1 and len({batch.num_targets for batch in cut}) > 1
    assert_equal_gradients(gradients(model, whole), gradients(model, cut))


def test_the_loop_gives_the_same_losses_however_a_step_is_cut(configure):
    """Mean of means, the best-known fault of this field, would show in the second step's gradient
    norm.
    """
    curves = []
    for name, batch_size in (("whole", 8), ("cut", 1)):
        config = configure(
            True,
            name,
            batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_length=100,
            max_steps=6,
        )
        lines = map(
            json.loads, (run(config) / "logs" / "train_metrics.jsonl").read_text().splitlines()
        )
        curves.append(
            [
                line[key]
                for line in lines
                for key in ("train/loss", "train/grad_norm")
                if key in line
            ]
        )
    # fp32 sums in another order, carried through 6 updates
    assert curves[1] == pytest.approx(curves[0], rel=1e-3) and len(curves[0]) == 12


def test_gradients_are_clipped(configure):
    """AdamW's step has the size of the learning rate whatever the gradient's, unless that is far
    below its eps of 1e-8.
    """
    sizes = []
    for name, norm in (("clipped", 1e-12), ("free", 0.0)):
        folder = run(configure(True, name, max_grad_norm=norm, max_steps=1, warmup_steps=0))
        weights = load_file(
            folder
            / "checkpoints"
            / "checkpoint_step_1"
            / "lora_adapter"
            / "adapter_model.safetensors"
        )
        sizes.append(
            max(tensor.abs().max().item() for key, tensor in weights.items() if "lora_B" in key)
        )
    assert sizes[0] < 1e-5 and sizes[1] == pytest.approx(1e-2, rel=1e-2)


def test_evaluation_is_without_dropout_and_leaves_training_mode_on(configure, tokenizer):
    config = configure(True, head_dropout=0.5)
    task = load_task(config, torch.float32)
    inject(task.model, r=4, dropout=0.5)
    batches = training_data(configure, tokenizer).evaluation()
    cpu = torch.device("cpu")
    one, other = (predict(task.train(), batches, cpu, torch.float32) for _ in range(2))
    assert torch.equal(one.values, other.values) and task.training


# ------------------------------------------------------------------------------------------ packing

SHAPE = dict(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def scorer(make, config, **arguments):
    torch.manual_seed(1)
    model = make(config, **arguments).eval()
    model.set_attn_implementation("packed")
    return Task(model, tokenizer=None)


@pytest.mark.parametrize(
    "make, config",
    [
        (lambda c: tiny_llama().model, None),
        (MistralModel, MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=20)),
        (BertModel, BertConfig(**SHAPE)),
        (RobertaModel, RobertaConfig(**SHAPE, pad_token_id=1)),
    ],
    ids=["llama", "mistral with a window shorter than the documents", "bert", "roberta"],
)
def test_packed_equals_unpacked_and_transformers_own_forward(make, config, tokenizer):
    task = scorer(make, config)
    rows = rows_of("arithmetic:train:6", "score", tokenizer)
    packed = rows.batch(range(6))
    apart = [rows.batch([i]) for i in range(6)]
    assert_equal_gradients(gradients(task, [packed]), gradients(task, apart))
    with torch.no_grad():
        together = task.predict(packed)
        torch.testing.assert_close(
            together, torch.cat([task.predict(b) for b in apart]), rtol=0, atol=1e-6
        )
        task.model.set_attn_implementation("eager")
        plain = [task.model(b.input_ids).last_hidden_state[0][b.target_positions] for b in apart]
        said = [task.head.predict(hidden, b.targets) for hidden, b in zip(plain, apart)]
    torch.testing.assert_close(together, torch.cat(said), rtol=0, atol=1e-6)


def test_a_later_step_does_not_change_the_score_of_an_earlier_one(tokenizer):
    """All steps of a chain are scored in one forward pass; the score of each is what a pass of its
    own would give.
    """
    task = scorer(lambda c: tiny_llama().model, None)
    example = read(["arithmetic:train:1"], "score")[0]
    whole = as_rows(rows_for(example, tokenizer, "score"), "score")
    with torch.no_grad():
        together = task.predict(whole.batch([0]))
        for k in range(1, len(example.steps) + 1):
            prefix = Example(
                "", prompt=example.prompt, steps=example.steps[:k], labels=example.labels[:k]
            )
            alone = task.predict(as_rows(rows_for(prefix, tokenizer, "score"), "score").batch([0]))
            torch.testing.assert_close(alone[-1], together[k - 1], rtol=0, atol=1e-6)


def test_attention_honours_scaling_causality_and_dropout():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 4)
    for causal in (True, False):
        module = SimpleNamespace(is_causal=causal)
        out, _ = packed_attention(
            module, query, key, value, None, scaling=0.3, documents=Documents([4, 5])
        )
        for a, b in ((0, 4), (4, 9)):
            scores = query[:, :, a:b] @ key[:, :, a:b].mT * 0.3
            scores = (
                scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
                if causal
                else scores
            )
            expected = scores.softmax(-1) @ value[:, :, a:b]
            torch.testing.assert_close(out[:, a:b].transpose(1, 2), expected, rtol=0, atol=1e-6)
        dropped, _ = packed_attention(
            module, query, key, value, None, scaling=0.3, documents=Documents([4, 5]), dropout=0.5
        )
        assert not torch.allclose(dropped, out)


def varlen(
    query, key, value, ends, key_ends, longest, longest_key, *, scale, window_size, enable_gqa=None
):
    """What torch documents of `varlen_attn`, which it has for GPUs alone. query [T, heads, width],
    ends [documents + 1].
    """
    assert ends.equal(key_ends) and ends.dtype == torch.int32
    assert longest == longest_key == ends.diff().max()
    in_groups = query.shape[1] != key.shape[1]
    assert enable_gqa in (None, in_groups)  # torch 2.11 has no such argument
    place = torch.arange(len(query))
    document = torch.bucketize(place, ends[1:], right=True)
    behind, ahead = (len(query) if side == -1 else side for side in window_size)
    distance = place[:, None] - place
    seen = (document[:, None] == document) & (distance <= behind) & (-distance <= ahead)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=in_groups
    )[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_all_documents_in_one_call_of_flash_attention_are_each_document_in_one_of_its_own(
    monkeypatch, causal, window
):
    window = window if causal else None
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 20, 8) for heads in (4, 2, 2))
    settings = {"scaling": 0.3, "sliding_window": window, "documents": Documents([7, 1, 8, 4])}
    apart, _ = packed_attention(
        SimpleNamespace(is_causal=causal), query, key, value, None, **settings
    )
    settings["documents"].has_flash = True
    monkeypatch.setattr("lora.model.attention.flash_takes", lambda *widths: True)
    monkeypatch.setattr("lora.model.attention.varlen_attn", varlen)
    together, _ = packed_attention(
        SimpleNamespace(is_causal=causal), query, key, value, None, **settings
    )
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_in_bfloat16_is_that_in_fp32_but_for_rounding(window):
    """Under autocast, the rotary embeddings of fp32 weights have made queries and keys fp32."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 12, 8).requires_grad_() for heads in (4, 2, 2)]

    def attend():
        settings = {"documents": Documents([7, 5]), "sliding_window": window}
        out, _ = packed_attention(SimpleNamespace(is_causal=True), *inputs, None, **settings)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    exact = attend()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attend()
    assert rounded[0].dtype == torch.bfloat16
    for one, other in zip(rounded, exact, strict=True):  # three products in 8 bits
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.02 * other.abs().max().item())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_values_may_be_narrower_than_queries(kind):
    """As in DeepSeek's models."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 9, width).to(kind) for width in (8, 8, 6))
    out, _ = packed_attention(
        SimpleNamespace(is_causal=True), query, key, value, None, documents=Documents([9])
    )
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6 if kind == torch.float32 else 0.02)


def test_an_attention_argument_that_would_change_the_result_is_refused(tokenizer):
    task = scorer(lambda c: tiny_llama().model, None)
    batch = rows_of("arithmetic:train:1", "score", tokenizer).batch([0])
    with pytest.raises(ValueError, match="does not support .'bias'."):
        task.model(batch.input_ids, use_cache=False, bias=30.0)


# ---------------------------------------------------------------------------------------- rendering


def test_a_score_is_read_at_the_last_token_of_its_step(tokenizer):
    example = Example(
        "",
        prompt="Start with 1, add 2.",
        steps=["1+2=3", "3+1=4", "4+1=9"],
        labels=[1.0, None, 0.25],
    )
    (row,) = rows_for(example, tokenizer, "score")
    assert tokenizer.decode(row.tokens) == "Start with 1, add 2.\n1+2=3\n3+1=4\n4+1=9\n"
    marked = {tokenizer.decode(row.tokens[: i + 1]): t for i, t in enumerate(row.targets) if t == t}
    assert marked == {
        "Start with 1, add 2.\n1+2=3\n": 1.0,
        "Start with 1, add 2.\n1+2=3\n3+1=4\n4+1=9\n": 0.25,
    }


def test_steps_that_do_not_fit_are_left_out_whole(tokenizer):
    example = read(["arithmetic:train:1"], "score")[0]
    (full,) = rows_for(example, tokenizer, "score")
    (short,) = rows_for(example, tokenizer, "score", len(full.tokens) - 1)
    assert (
        short.tokens == full.tokens[: len(short.tokens)]
        and tokenizer.decode(short.tokens[-1:]) == "\n"
    )
    assert sum(t == t for t in short.targets) == len(example.steps) - 1
    assert rows_for(example, tokenizer, "score", 5) == []


def test_an_encoder_gets_a_row_for_each_labelled_step(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    example = Example("", prompt="ab", steps=["cd", "ef", "gh"], labels=[1.0, None, 0.5])
    rows = rows_for(example, tokenizer, "score", causal=False)
    assert [tokenizer.decode(row.tokens) for row in rows] == [
        "[CLS] ab [SEP] cd [SEP]",
        "[CLS] ab [SEP] cd ef gh [SEP]",
    ]
    assert rows[0].token_type_ids == [0] * 4 + [1] * 3 and [row.targets[-1] for row in rows] == [
        1.0,
        0.5,
    ]


@pytest.mark.parametrize("max_length", [7, 64, 1000])
def test_windows_of_a_text_lose_nothing_and_end_with_eos(tokenizer, max_length):
    example = read(["arithmetic:train:1"], "lm")[0]
    rows = rows_for(example, tokenizer, "lm", max_length)
    tokens = [token for row in rows for token in row.tokens]
    targets = [target for row in rows for target in row.targets if target != NO_TOKEN]
    assert tokens[0:1] + targets == tokenizer(example.text).input_ids + [tokenizer.eos_token_id]
    assert all(len(row.tokens) <= max_length for row in rows)
    for row in rows:  # a target is the token that follows
        assert row.targets[:-1] == row.tokens[1:]


def test_a_long_text_is_tokenised_in_stretches_that_are_the_text_and_end_with_a_line_where_one_ends(
    monkeypatch,
):
    monkeypatch.setattr("lora.data.tokenise.MAX_PIECE_LENGTH", 10)
    assert [*split_text("one\ntwo\nthree\n" + "x" * 12)] == [
        "one\ntwo\n",
        "three\n",
        "x" * 10,
        "xx",
    ]


# ---------------------------------------------------------------------------------------- splitting


def split_by_prompt(examples, fraction):
    subjects = np.array([hash64(example.subject) for example in examples], np.uint64)
    pairs = list(zip(examples, chosen_by_hash(subjects, fraction)))
    return [e for e, chosen in pairs if not chosen], [e for e, chosen in pairs if chosen]


def test_rows_that_share_a_prompt_stay_on_one_side():
    examples = [Example("", prompt=f"p{i % 10}", steps=["s"], labels=[1.0]) for i in range(40)]
    training, held_out = split_by_prompt(examples, 0.3)
    assert len({e.prompt for e in held_out}) == 3 and len(training) + len(held_out) == 40
    assert not {e.prompt for e in training} & {e.prompt for e in held_out}


def test_chats_that_the_assistant_opens_are_told_apart_by_what_the_user_says():
    def chat(*texts):
        roles = ["assistant", "user"] * 2
        return Example(
            "", messages=[{"role": role, "content": text} for role, text in zip(roles, texts)]
        )

    examples = [chat("hello", f"q{i % 20}", f"a{i}") for i in range(40)] + [
        chat(f"alone {i}") for i in range(20)
    ]
    training, held_out = split_by_prompt(examples, 0.5)
    assert len({e.subject for e in held_out}) == 20 and len({e.subject for e in examples}) == 40
    assert not {e.subject for e in training} & {e.subject for e in held_out}


def test_evaluation_reads_the_first_n_times_4_rows_whatever_the_batch_size(configure, tokenizer):
    sums = set()
    for batch_size in (1, 3, 8):
        batches = training_data(
            configure, tokenizer, batch_size=batch_size, max_eval_batches=5
        ).evaluation()
        assert sum(len(batch.seq_lens) for batch in batches) == 20
        sums.add(sum(batch.input_ids.sum().item() for batch in batches))
    assert len(sums) == 1
    assert (
        sum(
            len(b.seq_lens)
            for b in training_data(configure, tokenizer, max_eval_batches=0).evaluation()
        )
        == 60
    )


def test_max_samples_takes_the_first_training_examples(configure):
    split = Split(configure(lora=False, max_samples=7))
    training, held_out = ([*split.examples(part)] for part in (False, True))
    assert len(training) == 7 and len(held_out) == 8


# ------------------------------------------------------------------------------------------- mixing


def mixed(configure, weights, counts=(60, 25, 40), **values):
    """Training data of three sets, told apart by their rows' sources."""
    paths = [f"arithmetic:train:{count}" for count in counts]
    rows = Rows.from_rows(
        (
            (Row([source, i, 0], [i, 0, NO_TOKEN]), source)
            for source, n in enumerate(counts)
            for i in range(n)
        ),
        "lm",
    )
    return TrainingData(
        rows, rows, configure(False, task="lm", train_data=paths, data_weights=weights, **values)
    )


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [3.0, 1e-3, 5.0]])
def test_the_shares_of_a_mix_are_its_weights_at_every_point(configure, weights):
    data = mixed(configure, weights)
    # Beyond the schedule's end
    drawn = [int(i) for i in data.rows.dataset_ids[data.rows_of_examples(np.arange(12_000))]]
    for end in (100, 1_000, 12_000):
        for source, weight in enumerate(weights):
            share = drawn[:end].count(source) / end
            assert abs(share - weight / sum(weights)) <= max(0.01, 1.5 / end)


def test_every_row_of_a_set_is_seen_once_per_pass_whatever_the_weights(configure):
    data = mixed(configure, [5.0, 1.0, 2.0])
    seen = {0: [], 1: [], 2: []}
    for place in range(2_000):
        row = data.rows_of_examples(np.array([place]))[0]
        seen[int(data.rows.dataset_ids[row])].append(int(row))
    for source, count in enumerate((60, 25, 40)):
        members, passes = seen[source], len(seen[source]) // count
        assert passes >= 6
        for k in range(passes):
            assert len(set(members[k * count : (k + 1) * count])) == count
        assert members[:count] != members[count : 2 * count]


def test_without_weights_the_sets_are_one(configure):
    one, other = mixed(configure, []), mixed(configure, [], counts=(125,))
    drawn = [data.rows_of_examples(np.arange(300)).tolist() for data in (one, other)]
    assert drawn[0] == drawn[1]


def test_a_set_too_small_to_be_reached_or_with_nothing_left_is_an_error(configure):
    with pytest.raises(UserError, match="a share below 0.0001 is never reached"):
        mixed(configure, [1.0, 1e-6, 1.0])
    with pytest.raises(UserError, match="arithmetic:train:0: it has no rows left"):
        mixed(configure, [1.0, 1.0, 1.0], counts=(60, 0, 40))


def test_each_set_has_validation_metrics_of_its_own_that_add_up(configure):
    paths = ["arithmetic:train:30", "arithmetic:validation:30"]
    folder = run(
        configure(
            True,
            train_data=paths,
            data_weights=[2.0, 1.0],
            eval_data=[],
            eval_fraction=0.3,
            max_steps=1,
        )
    )
    (line,) = [
        line
        for line in map(json.loads, open(folder / "logs" / "train_metrics.jsonl"))
        if line["step"] == 0
    ]
    parts = [line["val/arithmetic:train:30/mse"], line["val/arithmetic:validation:30/mse"]]
    assert min(parts) <= line["val/mse"] <= max(parts) and parts[0] != parts[1]


def test_padded_rows_are_sorted_and_little_of_them_is_padding(configure, tokenizer):
    config = configure(False, task="lm", batch_size=32, gradient_accumulation_steps=4)
    rows = rows_of("arithmetic:train:600", "lm", tokenizer)
    batches = TrainingData(rows, rows, config, packed=False).batch_at(0)
    assert sum(len(batch.seq_lens) for batch in batches) == 128
    for batch in batches:
        count, longest = batch.input_ids.shape
        assert (
            count * longest <= 32 * 256
            and longest == max(batch.seq_lens)
            and count == len(batch.seq_lens)
        )
        flat = batch.input_ids.flatten()[batch.target_positions + 1]
        # What follows a position is its target, in the same row
        assert torch.equal(flat, batch.targets)
        assert sum(batch.seq_lens) >= 0.95 * batch.input_ids.numel()
    assert len(batches) < 20
