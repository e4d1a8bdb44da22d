"""Words, tables and values of other trainers: ours where they mean the same, else one line."""

import json
import re

import pytest

from lora.common.base_model_files import locate_base
from lora.common.errors import UserError, library_errors
from lora.common.paths import ROOT
from lora.config.command_line import read_command_line
from lora.config.other_trainers import why_unknown
from lora.config.other_words import AUTOMATIC, MEANINGS, SAME, UNSUPPORTED, VALUES
from lora.config.schema import Config, fields_by_key, get_lora_config
from lora.config.set_keys import from_file, set_tables
from lora.config.table import ALIASES, DTYPE_SWITCHES
from lora.target_modules import matches_target

NAMED = ["--base_model=embedded", "--train_data=arithmetic:train:9"]


def read(*flags, lora=True):
    config = get_lora_config() if lora else Config()
    return read_command_line(list(flags), config, "", "").config


def read_text(folder, text, name="c.yaml", flags=NAMED, lora=True):
    (folder / name).write_text(text)
    return read("--config", str(folder / name), *flags, lora=lora)


def code(*words):
    return ", ".join(f"`{word}`" for word in words)


def value_text(value):
    """A value as TOML and JSON write it."""
    return value if isinstance(value, str) else json.dumps(value)


def words_by_meaning(table):
    """{the meaning: the words that have it, for the page}."""
    words = {}
    for word, meaning in table.items():
        words.setdefault(meaning, []).append(word)
    return {meaning: code(*names) for meaning, names in words.items()}


def meaning_text(value, meaning):
    if isinstance(meaning, tuple):
        meaning = f"{meaning[0]} = {value_text(meaning[1])}"
    return f"`{value_text(value)}` {f'is `{meaning}`' if meaning else 'needs nothing'}"


def documented_rows():
    """The rows that the tables of docs/other_trainers.md must have."""
    rows = [f"| `{key}` | {words} |" for key, words in words_by_meaning(SAME).items()]
    for word, meanings in MEANINGS.items():
        texts = [meaning_text(value, meaning) for value, meaning in meanings.items()]
        rows += [f"| `{word}` | {', '.join(texts)} |"]
    rows += [f"| `{value}` | {words} |" for value, words in words_by_meaning(VALUES).items()]
    rows += [f"| {words} | {reason} |" for reason, words in words_by_meaning(AUTOMATIC).items()]
    for word, (so_here, advice) in UNSUPPORTED.items():
        values = code(*[value_text(value) for value in so_here]) or "none"
        rows += [f"| `{word}` | {values} | {advice} |"]
    return rows


def test_the_page_has_the_tables_of_the_code():
    page = (ROOT / "docs" / "other_trainers.md").read_text(encoding="utf-8")
    section = page.partition("## Their words")[2].partition("\n## Defaults")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    headings = [line for line in rows if "`" not in line]
    assert [line for line in rows if line not in headings] == documented_rows()
    for block in section.split("\n\n"):
        widths = {line.count(" | ") for line in block.splitlines() if line.startswith("| ")}
        assert len(widths) <= 1, block


def test_each_word_means_one_thing_and_a_key_that_there_is():
    keys = fields_by_key(get_lora_config())
    own = {*keys, *ALIASES, *DTYPE_SWITCHES}
    groups = [own, {*SAME}, {*MEANINGS}, {*AUTOMATIC}, {*UNSUPPORTED}]
    for number, group in enumerate(groups):
        for other in groups[number + 1 :]:
            assert not group & other
    assert {*SAME.values()} <= keys.keys()
    for meanings in MEANINGS.values():
        for meaning in meanings.values():
            if isinstance(meaning, tuple):
                assert meaning[0] in keys
            else:
                assert meaning in ("train.py", "train_lora.py", None)
    choices = [choice for _, field in keys.values() for choice in field.metadata["choices"] or ()]
    assert {*VALUES.values()} <= {*choices}


def test_a_key_in_another_table_or_in_none_is_put_where_it_belongs(tmp_path):
    texts = {
        "c.toml": 'seed = 3\n[data]\nlora-r = 4\n[any.table]\nmax_length = "99"\n',
        "c.json": '{"seed": 3, "data": {"lora-r": 4}, "any": {"table": {"max_length": "99"}}}',
        "c.yaml": "seed: 3\ndata: {lora-r: 4}\nany: {table: {max_length: '99'}}\n",
    }
    for name, text in texts.items():
        config = read_text(tmp_path, text, name)
        assert (config.training.seed, config.lora.lora_r, config.data.max_length) == (3, 4, 99)


def test_yaml_numbers_with_an_exponent_and_keys_without_a_value(tmp_path):
    text = "a: &a {learning_rate: 2e-4, max_steps: null}\ntraining: {<<: *a, seed: 2}\n"
    with pytest.raises(UserError, match="training.learning_rate: learning_rate is given twice"):
        read_text(tmp_path, text)
    config = read_text(tmp_path, "training: {learning_rate: 2e-4, max_steps: }\n")
    assert (config.training.learning_rate, config.training.max_steps) == (2e-4, None)
    for word in ("max_steps", "max_iters"):  # as in Transformers
        assert read_text(tmp_path, f"{word}: -1").training.max_steps is None
        assert read(*NAMED, f"--{word}", "-1").training.max_steps is None


def test_words_whose_absence_or_false_means_something(tmp_path, capsys):
    assert read_text(tmp_path, "cutoff_len: null").data.max_length == "auto"
    assert "cutoff_len (null: the default, 2048 tokens at most)" in capsys.readouterr().out
    assert read_text(tmp_path, "clip_grad_norm: null").training.max_grad_norm == 0
    config = read_text(tmp_path, "max_grad_norm: 0.5\ngradient_clipping:\n")
    assert config.training.max_grad_norm == 0.5
    assert "gradient_clipping (null: the default, 1.0; 0 is no" in capsys.readouterr().out
    assert read_text(tmp_path, "mixed_precision: no").training.dtype == "float32"
    assert read_text(tmp_path, "lora_target: all").lora.target_modules == ["all-linear"]
    qlora = read_text(tmp_path, "adapter: qlora\nload_in_4bit: true")
    assert qlora.lora.load_in_4bit
    full = Config()
    set_tables(full, {"load_in_4bit": False, "lora_r": None, "learning_rate": 1e-5}, "c.yaml")
    assert full.lora is None
    with pytest.raises(UserError, match="packing: not supported: a step has batch_size x gradient"):
        read_text(tmp_path, "packing: true")
    assert read_text(tmp_path, "packing: false").training.batch_size == 4


def test_the_expression_that_is_advised_matches_layers():
    (expression,) = re.findall(r"expression: (\S+)", UNSUPPORTED["layers_to_transform"][1])
    assert matches_target("model.layers.3.mlp.up_proj", expression)
    assert not matches_target("model.layers.4.mlp.up_proj", expression)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nseed: 2\n", "c.yaml: cannot be read .'seed' is given twice"),
        ("training:\n  seed: 1\n  seed: 2\n", "'seed' is given twice"),
        ("training: [\n", "c.yaml: cannot be read .while parsing"),
        ("a: &a {b: *a}\n", "c.yaml: cannot be read"),
        ("seed: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("", "c.yaml: expected a table of keys, found a NoneType"),
        ("training: {seed: 2026-01-01}", "training.seed = '2026-01-01': expected an integer"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_text(tmp_path, text)
    assert "\n" not in str(error.value)


def test_all_words_without_a_key_are_told_in_one_line(tmp_path, capsys):
    text = """
        {deepspeed: ds.json, load_in_8bit: true, save_total_limit: 2, trainin: {lerning_rate: 1},
         evaluation: {max_samples: 5, batch_size: 1, temperature: 0.2}, loss: {alpha: 2},
         adapter: full, model_name: crisis_agent_v2, lora: {r: 4, lora_r: 8}}
    """
    with pytest.raises(UserError) as error:
        read_text(tmp_path, text)
    for part in (
        "c.yaml: deepspeed: not supported: torchrun shards",
        "load_in_8bit: not supported: a base is quantised to 4 bits",
        "trainin.lerning_rate: no such key. Did you mean learning_rate?",
        "evaluation.max_samples: max_samples is that of training; if it is meant, give it outside",
        "loss.alpha: lora_alpha is LoRA's; if it is meant, give it in [lora].",
        "adapter = 'full': use train.py.",
        "model_name crisis_agent_v2: no folder, no Hub name OWNER/NAME; is base_model or",
        "lora.lora_r: lora_r is given twice.",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and "batch_size" not in str(error.value)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        ("eval: {bits: 4}", "eval.bits: load_in_4bit is that of training; if it is meant, give it"),
        ("inference: {mixed_precision: bf16}", "inference.mixed_precision: dtype is that of train"),
        ("test: {model_name: embedded}", "test.model_name: base_model is that of training"),
        (
            "eval_strategy: no",
            "eval_strategy: not supported: .*; evaluation cannot be switched off",
        ),
        (
            "val_set_size: 0",
            "val_set_size = 0: some examples are held out, or eval_data names them; evaluation",
        ),
    ],
)
def test_a_word_that_means_something_else_here_is_named(text, message, tmp_path):
    with pytest.raises(UserError, match=f"c.yaml: {message}"):
        read_text(tmp_path, text)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("num_layers", "See --help."),
        ("global_batch_size", "See --help."),
        ("template", "See --help."),
        ("fused", "See --help."),
        ("learning_rat", "Did you mean learning_rate?"),
        ("batchsize", "Did you mean batch_size?"),
        ("max_lenght", "Did you mean max_length?"),
        ("val_set_siz", "Did you mean eval_fraction?"),
        ("epoch", "Did you mean num_train_epochs?"),
    ],
)
def test_only_a_slip_of_the_keys_has_a_nearest_word(name, hint):
    assert why_unknown(get_lora_config(), name) == f"no such key. {hint}"


def test_words_that_need_nothing_are_counted_in_one_note(tmp_path, capsys):
    text = """
        {save_total_limit: 2, trust_remote_code: true, load_in_8bit: false, fsdp: [],
         eval: {batch_size: 8}}
    """
    read_text(tmp_path, text)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(
        r"note: .*c.yaml: 5 keys need nothing here: save_total_limit \(the three", line
    )
    assert "load_in_8bit (already so here)" in line and "eval.batch_size (evaluation has" in line


def test_methods_and_trackers(tmp_path):
    text = "adapter: {method: qlora}\nmonitoring: {%s: {enabled: true}}\nreport_to: none\n"
    config = read_text(tmp_path, text % "tensorboard")
    assert config.lora.load_in_4bit and config.output.report_to == ["tensorboard"]
    text = "mixed_precision: bf16\nbits: 4\nadapter: lora\noptim: adamw_torch\n"
    config = read_text(tmp_path, text + "lr_scheduler_type: constant_with_warmup\n")
    assert config.training.dtype == "bfloat16" and config.lora.load_in_4bit
    assert (config.training.optimizer, config.training.lr_scheduler_type) == ("adamw", "constant")
    with pytest.raises(UserError, match="method = 'lora': use train_lora.py"):
        read_text(tmp_path, "method: lora", lora=False)
    with pytest.raises(UserError, match="method: train.py trains all weights and has no such key"):
        read_text(tmp_path, "method: qlora", lora=False)
    with pytest.raises(UserError, match="mixed_precision and bf16|dtype and fp16 both choose"):
        read_text(tmp_path, "mixed_precision: bf16\nfp16: true\n")


@pytest.mark.parametrize(
    "words, dtype",
    [
        ("dtype: bfloat16, bf16: false", "bfloat16"),
        ("torch_dtype: bfloat16, fp16: false, bf16: false", "bfloat16"),
        ("mixed_precision: bf16, bf16: false", "bfloat16"),
        ("torch_dtype: bfloat16, bf16: true", "bfloat16"),
        ("dtype: auto, bf16: true", "bfloat16"),
        ("dtype: auto, bf16: false", "auto"),
        ("bf16: auto, fp16: false", "auto"),
        ("bf16: auto, fp16: true", "float16"),
        ("mixed_precision: no, bf16: false", "float32"),
    ],
)
def test_the_dtype_does_not_depend_on_the_order_of_the_words(words, dtype, tmp_path):
    for text in (words, ", ".join(reversed(words.split(", ")))):
        for config in (f"{{{text}}}", f"{{training: {{{text}}}}}"):
            assert read_text(tmp_path, config).training.dtype == dtype
    flags = [f"--{word.replace(': ', '=')}" for word in words.split(", ")]
    assert read(*NAMED, *flags).training.dtype == dtype


def test_flags_of_other_trainers(capsys):
    flags = "--model embedded --dataset arithmetic:train:9 arithmetic:test:5 --lr 2e-4 --rank=4"
    flags += " --epochs 2 --save_total_limit 2 --use_flash_attention --trust-remote-code True"
    flags += " --dataloader_num_workers=4 --load_in_8bit false --use_qlora --fp16 --seed 3"
    config = read(*flags.split())
    assert config.data.train_data == ["arithmetic:train:9", "arithmetic:test:5"]
    assert (config.training.learning_rate, config.lora.lora_r) == (2e-4, 4)
    assert (config.training.num_train_epochs, config.training.seed) == (2, 3)
    assert config.lora.load_in_4bit and config.training.fp16
    assert "note: flags: 5 keys need nothing here: --save_total_limit (" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        read(*NAMED, "--deepspeed", "a.json", "--load_in_8bit", "--lorar=8")
    assert re.fullmatch(
        r"--deepspeed: not supported: .* --load_in_8bit: not supported: .* --lorar: no such key. "
        r"Did you mean lora_r\?",
        str(error.value),
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lr"], "--learning_rate: expected one argument"),
        (["--lr=1e-4", "--learning_rate=1e-5"], "--learning_rate is given twice"),
        (["--epochs=1", "--max_iters=3", "--num_epochs=2"], "--num_train_epochs is given twice"),
        (["--lr=1e-4", "--max_train_steps=1", "--max_iters=3"], "--max_iters: max_steps is given"),
        (["--wandb=maybe"], "--wandb = 'maybe': expected one of true, false."),
        (["--rank=4", "stray"], "stray: not expected here|--lora_r = '4 stray'"),
    ],
)
def test_a_wrong_flag_of_another_trainer_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        read(*NAMED, *flags)


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--report_to", "tensorboard"], ["tensorboard"]),
        (["--report_to", "none"], []),
        (["--report_to="], []),
    ],
)
def test_report_to_is_a_list(flags, names):
    assert read(*NAMED, *flags).output.report_to == names


def test_names_are_split_at_commas_and_expressions_are_not():
    def names(*values):
        return read(*NAMED, "--target_modules", *values).lora.target_modules

    both = ["q_proj", "v_proj"]
    assert names("q_proj,v_proj") == names("q_proj", "v_proj") == names("q_proj, v_proj") == both
    assert names(r"layers\.\d{1,2}\..*q_proj") == [r"layers\.\d{1,2}\..*q_proj"]


def test_a_model_name_may_be_that_of_the_run():
    with pytest.raises(UserError, match="crisis_agent_v2: no folder, no Hub name OWNER/NAME; is"):
        read("--model-name", "crisis_agent_v2", "--train_data=arithmetic:train:9")
    for base in ("embedded", "OWNER/NAME"):
        assert read("--model-name", base, NAMED[1]).model.base_model == base


def test_a_base_with_code_of_its_own_names_its_conversion():
    with pytest.raises(UserError, match="its own; take allenai/OLMo-7B-Instruct-hf"):
        locate_base("allenai/OLMo-7B-Instruct")
    for base in ("allenai/OLMo-7B-Instruct-hf", "allenai/OLMo-2-1124-7B"):
        assert locate_base(base) == (base, False)
    with pytest.raises(UserError, match="base_model a/b: needs code of its own, which is never"):
        with library_errors("base_model a/b"):
            raise ValueError("The repository a/b contains custom code which must be executed")


def test_a_checkpoint_of_another_trainer_is_told(tmp_path):
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 500}')
    with pytest.raises(UserError, match="another trainer's, which is not read; start from its"):
        read("--resume-from", str(folder))


def test_a_file_of_another_trainer_is_one_of_lora_for_evaluation(tmp_path):
    (tmp_path / "c.yaml").write_text("adapter: {lora: {r: 3}}")
    assert from_file(str(tmp_path / "c.yaml")).lora.lora_r == 3
