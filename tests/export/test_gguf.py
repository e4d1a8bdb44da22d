"""GGUF: what is written is the merged model, rounded to the file's type and nothing else; what is
not known is refused.
"""

from heapq import heappop, heappush
import json
import random
import unicodedata

import gguf
from packaging.version import Version
import pytest
from tokenizers import Tokenizer, models, normalizers, trainers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.errors import UserError
from lora.export.gguf import write_gguf
from lora.export.gguf_tokenizer import BYTES, SENTENCE_PIECE
import merge as merging
from tests.conftest import run
from tests.model.test_families import GROUPED, base

LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "Llama": GROUPED | dict(head_dim=16),
    # More rows than tokens
    "Llama tied": GROUPED | dict(tie_word_embeddings=True, vocab_size=2060),
    "Mistral": GROUPED | dict(head_dim=8, sliding_window=None),
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | dict(head_dim=128),  # transformers reads no other from a GGUF
}
WORDS = "the don't we'll I'M they'RE hello Straße naïve Ünïcödé привет Ελλάδα".split()
WORDS += "مرحبا नमस्ते こんにちは 世界 한국어".split()
MARKS = [
    *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "...",
    "—",
    "“",
    "€",
    "½",
    "²",
    "٣",
    "Ⅷ",
    "🙂",
    "👩‍👩‍👧",
    "\u200b",
    "\ufeff",
]
SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n",
    "\u00a0",
    "\u3000",
    "\x0b",
    " " * 7,
    " " * 17,
]


def texts(count, special):
    """Seeded mixtures of words, digits, marks, spaces, any characters at all and `special` tokens,
    in NFC.
    """
    draw = random.Random(0)
    kinds = [
        lambda: draw.choice(WORDS),
        lambda: draw.choice(SPACES),
        lambda: str(draw.randrange(10 ** draw.randrange(1, 10))),
        lambda: "".join(draw.choices(MARKS, k=draw.randrange(1, 4))),
        lambda: "".join(draw.choices("abcdefgHIJKLMNOP", k=draw.randrange(1, 8))),
        lambda: chr(draw.choice([draw.randrange(32, 0xD800), draw.randrange(0xE000, 0x1FFFF)])),
        lambda: draw.choice(special),
    ]
    for _ in range(count):
        yield unicodedata.normalize(
            "NFC", "".join(draw.choice(kinds)() for _ in range(draw.randrange(1, 25)))
        )


def folder_of(family, shape, folder):
    """A folder with a random model, whose vectors and attention are not at rest, and the embedded
    tokenizer.
    """
    base(family, shape, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder)
    return folder


def keys_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def rounded(weight, kind):
    """A matrix as the type holds it. q8_0: blocks of 32 in a row, whole steps of the f16 of
    (largest / 127).
    """
    if kind == "q8_0" and weight.shape[-1] % 32 == 0:
        blocks = weight.unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return ((blocks / step).round() * step.half().float()).flatten(-2)
    stored = {
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "q8_0": torch.float16,
    }[kind]
    return weight.to(stored).float()


# How two bytes are written does not depend on the family; q8_0 depends on the shapes.
@pytest.mark.parametrize(
    "family, kind",
    [
        *((family, kind) for family in FAMILIES for kind in ("f32", "q8_0")),
        *((next(iter(FAMILIES)), kind) for kind in ("f16", "bf16")),
    ],
)
def test_the_file_holds_the_model_rounded_to_its_type_and_nothing_else(family, kind, tmp_path):
    """Read by transformers, it says what the model with rounded matrices says: the same sums of the
    same numbers.

    A weight is then off by what its type leaves off: of its own size 2^-11 (f16) or 2^-8 (bf16); of
    the largest in its block half a step, 1 / 254, and 2^-11 for the step itself (q8_0).
    """
    folder = folder_of(family, FAMILIES[family], tmp_path / "model")
    write_gguf(folder, tmp_path / "model.gguf", kind)
    # And no temporary
    assert [path.name for path in tmp_path.glob("*model.gguf")] == ["model.gguf"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    tokens = torch.randint(2048, (2, 40), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits
    for parameter in model.parameters():
        if parameter.dim() == 2:
            exact = parameter.data.clone()
            parameter.data = rounded(exact, kind)
            off, unit = (
                (parameter - exact).abs(),
                {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11}[kind],
            )
            assert (
                off
                <= unit * (exact.abs().amax(-1, keepdim=True) if kind == "q8_0" else exact.abs())
                + 1e-7
            ).all()
    after = model(tokens).logits
    torch.testing.assert_close(
        read(tokens).logits, after, rtol=0, atol=1e-6 * after.abs().max().item()
    )
    assert torch.equal(before, after) == (kind == "f32")


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_trained_model_says_the_same_from_the_file(kind, tmp_path):
    write_gguf(EMBEDDED_BASE, tmp_path / "base.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="base.gguf", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    for prompt in (
        "From left to right: 7+8-6*5-9\n",
        "From left to right: 12*3+",
        "The king said to",
    ):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        greedy = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert torch.equal(read.generate(tokens, **greedy), model.generate(tokens, **greedy))


def test_vectors_are_f32_and_rows_that_are_no_blocks_are_f16(tmp_path):
    folder = folder_of("Llama", GROUPED | dict(intermediate_size=48), tmp_path / "model")
    write_gguf(folder, tmp_path / "model.gguf", "q8_0")
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    assert {kind for name, kind in types.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in types.items() if "ffn_down" in name} == {"F16"}  # rows of 48
    assert {
        kind for name, kind in types.items() if "norm" not in name and "ffn_down" not in name
    } == {"Q8_0"}


def test_merge_writes_the_merged_model_with_its_tokenizer(configure, tmp_path):
    artifact = run(configure(True, task="lm", max_steps=3)) / "final_artifact"
    file = tmp_path / "new" / "m.gguf"
    flags = [
        "--adapter",
        str(artifact),
        "--output",
        str(tmp_path / "m"),
        "--gguf",
        str(file),
        "--gguf_type",
        "f32",
    ]
    merging.main(merging.read_arguments(flags))
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    tokens = torch.arange(30)[None]
    assert torch.equal(
        read(tokens).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "m")(tokens).logits
    )
    if Version(transformers.__version__) < Version("5.24"):
        return  # 5.17 reads the tokenizer of every GGUF file with GPT-2's split
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in texts(1000, tokenizer.all_special_tokens + ["<|im_start|>"]):
        assert theirs(text).input_ids == tokenizer(text).input_ids, text
    chat = [{"role": "user", "content": "1+1"}]
    assert theirs.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)


def test_the_tokens_are_those_of_tokenizer_json(tmp_path):
    folder = folder_of("Llama", GROUPED | dict(vocab_size=2060), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "f16")
    facts = json.loads((folder / "tokenizer.json").read_text())
    keys = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in keys_of(tmp_path / "model.gguf").items()
    }
    texts_of = {id: text for text, id in facts["model"]["vocab"].items()} | {2048: "<think>"}
    assert keys["tokens"] == [texts_of.get(id, f"[PAD{id}]") for id in range(2060)]
    assert [tuple(merge.split(" ")) for merge in keys["merges"]] == [
        tuple(merge) for merge in facts["model"]["merges"]
    ]
    normal, control, user, unused = 1, 3, 4, 5
    assert keys["token_type"] == [control] * 3 + [normal] * 2045 + [user] + [unused] * 11
    assert keys["model"] == "gpt2" and keys["pre"] == "qwen2"
    assert not keys["add_bos_token"] and not keys["add_eos_token"]
    # 2 ends a turn
    assert (keys["eos_token_id"], keys["padding_token_id"], keys["eot_token_id"]) == (0, 0, 2)
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template


def highest_score(text, ids, scores):
    """llama.cpp's rule for its "llama" tokenizers: join the neighbours whose union scores highest,
    the left ones first.
    """
    parts, queue = dict(enumerate("▁" + text.replace(" ", "▁"))), []

    def offer(left):
        following = [place for place in sorted(parts) if place > left]
        if left is not None and following and parts[left] + parts[following[0]] in ids:
            union = parts[left] + parts[following[0]]
            heappush(queue, (-scores[ids[union]], left, following[0], union))

    for place in list(parts):
        offer(place)
    while queue:
        _, left, right, union = heappop(queue)
        if left in parts and right in parts and parts[left] + parts[right] == union:
            parts[left] = union
            del parts[right]
            offer(left)
            before = [place for place in sorted(parts) if place < left]
            if before:
                offer(before[-1])
    pieces = [parts[place] for place in sorted(parts)]
    return [
        id
        for p in pieces
        for id in ([ids[p]] if p in ids else [ids[f"<0x{byte:02X}>"] for byte in p.encode()])
    ]


def sentence_piece(folder, change=lambda facts: None):
    """A tokenizer made as Llama 2's and Mistral's are, of a few hundred pieces, over the one in the
    folder.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    lines = [
        f"{a} + {b} is  {a + b},\nand   {word} or {word}s"
        for a in range(30)
        for b, word in enumerate(WORDS)
    ]
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    vocab = {
        piece: id for id, piece in enumerate(["<unk>", "<s>", "</s>", *sorted(BYTES), *pieces])
    }
    flags = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    facts = json.loads(trained.to_str()) | dict(
        normalizer=SENTENCE_PIECE,
        added_tokens=[
            dict(id=id, content=text) | flags for id, text in enumerate(["<unk>", "<s>", "</s>"])
        ],
    )
    merges = generate_merges(vocab, skip_tokens=["<unk>", "<s>", "</s>"])
    facts["model"] |= dict(
        vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    change(facts)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_pieces_get_scores_that_make_the_same_tokens(tmp_path):
    folder = folder_of("Mistral", GROUPED | dict(sliding_window=64), tmp_path / "model")
    tokenizer = sentence_piece(folder)
    write_gguf(folder, tmp_path / "model.gguf", "f16")
    keys = keys_of(tmp_path / "model.gguf")
    # The window
    assert keys["tokenizer.ggml.model"] == "llama" and keys["llama.context_length"] == 64
    assert keys["tokenizer.ggml.token_type"][:300] == [3] * 3 + [6] * 256 + [1] * 41
    ids = {token: id for id, token in enumerate(keys["tokenizer.ggml.tokens"])}
    for text in texts(300, ["  and   "]):
        assert tokenizer(text).input_ids == highest_score(
            text, ids, keys["tokenizer.ggml.scores"]
        ), text


def test_positions_that_are_scaled_are_written_as_llama_cpp_has_them(tmp_path):
    rope = LLAMA3 | dict(original_max_position_embeddings=64)
    folder = folder_of(
        "Llama", GROUPED | dict(head_dim=16, rope_parameters=rope), tmp_path / "llama3"
    )
    write_gguf(folder, tmp_path / "llama3.gguf", "f16")
    tensors = {
        tensor.name: torch.tensor(tensor.data)
        for tensor in gguf.GGUFReader(tmp_path / "llama3.gguf").tensors
    }
    slowed = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    plain = 1e4 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(plain / tensors["rope_freqs.weight"], slowed)
    assert not torch.allclose(plain, slowed)

    folder = folder_of(
        "Qwen2", GROUPED | dict(rope_parameters=YARN | dict(beta_fast=16.0)), tmp_path / "yarn"
    )
    write_gguf(folder, tmp_path / "yarn.gguf", "f16")
    keys = {
        name.removeprefix("qwen2.rope."): value
        for name, value in keys_of(tmp_path / "yarn.gguf").items()
    }
    assert (
        keys["scaling.type"] == "yarn" and keys["scaling.factor"] == 4 and keys["freq_base"] == 1e4
    )
    assert keys["scaling.original_context_length"] == 64 and keys["scaling.yarn_beta_fast"] == 16


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "family, change, message",
    [
        (
            "Gemma",
            {},
            "GemmaForCausalLM is not written for llama.cpp here; LlamaForCausalLM, Mistral",
        ),
        ("Llama", dict(hidden_act="gelu"), "hidden_act is gelu"),
        (
            "Qwen2",
            dict(head_dim=16),
            "head_dim is 16; llama.cpp's qwen2 has hidden_size / num_attention_heads",
        ),
        ("Qwen3", dict(attention_bias=True), "attention_bias is true; llama.cpp's qwen3 has none"),
        (
            "Qwen2",
            dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=64)),
            "default, linear, yarn in",
        ),
        ("Llama", dict(rope_parameters=YARN | dict(attention_factor=1.5)), "in their plain form"),
        (
            "Llama",
            dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            "in their plain form",
        ),
        (
            "Llama",
            dict(vocab_size=2000),
            "the tokenizer has 2048 tokens, the model 2000 embeddings",
        ),
    ],
)
def test_a_model_that_llama_cpp_would_read_otherwise_is_refused(family, change, message, tmp_path):
    folder = folder_of(family, GROUPED | change, tmp_path / "model")
    with pytest.raises(UserError, match=message) as error:
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


def edit(folder, change):
    file = folder / "tokenizer.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda facts: facts.update(pre_tokenizer=dict(type="Whitespace")),
            "llama.cpp knows no tokenizer like this one",
        ),
        (
            lambda facts: facts["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
                Regex=r"\p{N}{1,2}"
            ),
            "no tokenizer like",
        ),
        (lambda facts: facts.update(normalizer=dict(type="NFKC")), "llama.cpp knows no tokenizer"),
        (lambda facts: facts["model"].update(ignore_merges=True), "llama.cpp knows no tokenizer"),
        (
            lambda facts: facts["added_tokens"][1].update(lstrip=True),
            "'<.im_start.>' depends on the text around it",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(change, message, tmp_path):
    folder = folder_of("Llama", GROUPED, tmp_path / "model")
    edit(folder, change)
    with pytest.raises(UserError, match=message) as error:
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["model"]["merges"].pop(10),  # llama.cpp would still join the two
        # Pairs of one union are parted
        lambda facts: facts["model"]["merges"].sort(key=lambda pair: len(pair[0])),
        lambda facts: facts.update(
            normalizer=None, pre_tokenizer=dict(type="Metaspace", replacement="▁")
        ),
    ],
)
def test_pieces_that_scores_cannot_order_are_refused(change, tmp_path):
    folder = folder_of("Llama", GROUPED, tmp_path / "model")
    sentence_piece(folder, change)
    with pytest.raises(UserError, match="llama.cpp knows no tokenizer like this one"):
        write_gguf(folder, tmp_path / "model.gguf", "f16")


def test_merge_refuses_a_scorer_an_absent_package_and_a_file_that_is_there(
    configure, tmp_path, monkeypatch
):
    artifact = run(configure(True, max_steps=1)) / "final_artifact"
    flags = [
        "--adapter",
        str(artifact),
        "--output",
        str(tmp_path / "m"),
        "--gguf",
        str(tmp_path / "m.gguf"),
    ]
    monkeypatch.setattr(merging, "load_shape", None)  # nothing is loaded
    with pytest.raises(UserError, match="is a step scorer"):
        merging.main(merging.read_arguments(flags))
    with pytest.raises(UserError, match="--gguf_type says how"):
        merging.read_arguments([*flags[:4], "--gguf_type", "f32"])
    monkeypatch.setattr(merging, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'plainlora\[gguf\]'"):
        merging.read_arguments(flags)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match="m.gguf exists"):
        merging.read_arguments(flags)
