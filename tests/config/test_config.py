"""One schema for file, flags and saved configuration; a mistake in it is one line."""

import copy
import dataclasses
import json
import pickle
import re
import tomllib

import pytest

from lora.common.checksums import write_checksums
from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.common.toml_json import to_toml
from lora.config.command_line import read_command_line
from lora.config.earlier_stage import require_stage
from lora.config.retired import RETIRED
from lora.config.run_folder import newest_checkpoint
from lora.config.schema import Config, ModelConfig, fields_by_key, get_lora_config
from lora.config.set_keys import from_dict, from_file, saved_config
from lora.model.device import choose_device

NAMED = ["--base_model=m", "--train_data=d"]


def read(*flags, lora=True):
    config = get_lora_config() if lora else Config()
    return read_command_line(list(flags), config, ROOT / "configs" / "tiny_lora.toml", "").config


@pytest.mark.parametrize("name", fields_by_key(get_lora_config()))
def test_each_key_is_read_somewhere(name):
    """A key that no line of the product reads is a dead flag."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("lora/**/*.py")]
    owners = r"(self|settings|data|lora|model|output|training|evaluation)"
    assert any(re.search(rf"\b{owners}\.{name}\b", file.read_text()) for file in files)


def test_the_defaults_are_those_the_requirements_name():
    full, lora = Config(), get_lora_config()
    assert (full.training.learning_rate, lora.training.learning_rate) == (2e-5, 1e-4)
    assert (lora.lora.lora_r, lora.lora.lora_alpha, lora.lora.lora_dropout) == (16, 32, 0.0)
    assert (
        full.training.batch_size,
        full.training.gradient_accumulation_steps,
        full.data.max_length,
    ) == (4, 4, "auto")
    assert full.lora is None


def test_flag_beats_file_beats_default(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        '[model]\nbase_model = "m"\n[data]\ntrain_data = ["d"]\n'
        "[training]\nseed = 1\nmax_steps = 5\n"
    )
    config = read("--config", str(file), "--max_steps", "7")
    assert (config.training.seed, config.training.max_steps, config.training.batch_size) == (
        1,
        7,
        4,
    )


def test_with_nothing_named_the_tiny_config_is_used_with_a_model_and_data_the_general_defaults():
    assert read("--lora_r=4").model.base_model == "embedded"
    assert read(*NAMED).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    "alias, name, value",
    [
        ("--per-device-train-batch-size", "batch_size", 3),
        ("--num_epochs", "num_train_epochs", 2.0),
        ("--max_seq_length", "max_length", 99),
        ("--r", "lora_r", 5),
        ("--alpha", "lora_alpha", 7.0),
        ("--dropout", "lora_dropout", 0.5),
    ],
)
def test_an_alias_is_its_key_as_a_flag_and_in_a_file(alias, name, value, tmp_path):
    table, _ = fields_by_key(read(*NAMED, alias, str(value)))[name]
    assert getattr(table, name) == value
    title = {"max_length": "data"}.get(name, "lora" if name.startswith("lora") else "training")
    file = tmp_path / "c.toml"
    file.write_text(f"[{title}]\n{alias[2:].replace('-', '_')} = {value}\n")
    table, _ = fields_by_key(read("--config", str(file), *NAMED))[name]
    assert getattr(table, name) == value


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ([], "auto"),
        (["--bf16"], "bfloat16"),
        (["--bf16", "true"], "bfloat16"),
        (["--fp16", "true"], "float16"),
        (["--bf16", "false"], "float32"),
        (["--bf16=false", "--fp16=true"], "float16"),
        (["--bf16=true", "--fp16=false"], "bfloat16"),
        (["--bf16=auto"], "auto"),
        (["--bf16=false", "--dtype=bfloat16"], "bfloat16"),
        (["--dtype=bfloat16", "--bf16"], "bfloat16"),
    ],
)
def test_bf16_and_fp16_are_real_booleans(flags, dtype):
    assert read(*NAMED, *flags).training.dtype == dtype


def test_bf16_false_overrides_a_file(tmp_path):
    (tmp_path / "c.toml").write_text('[training]\ndtype = "bfloat16"\n')
    assert (
        read("--config", str(tmp_path / "c.toml"), *NAMED, "--bf16=false").training.dtype
        == "float32"
    )


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_saved_configuration_reads_back_equal(tmp_path, suffix):
    config = read(
        *NAMED,
        "--train_data",
        'a "quoted" näme\n\x7f.jsonl',
        "b\\c",
        "--learning_rate=3e-4",
        "--max_samples=5",
    )
    config.lora.rank_pattern, config.lora.alpha_pattern = (
        {r"layers\.1\..*": 4, 'a "q"': 2},
        {"q_proj": 3.5},
    )
    path = tmp_path / f"training_config.{suffix}"
    config.save(path)
    again = read("--config", str(path))
    assert again == config
    if suffix == "toml":
        assert tomllib.loads(path.read_text()) == config.as_dict()
        assert saved_config(tmp_path) == from_dict(config.as_dict(), "") == config


def state_with(tables):
    """The trainer_state.json of version 0.1.0 with another configuration."""
    saved = ROOT / "tests" / "fixtures" / "written_by_0_1_0" / "checkpoint_step_4"
    state = json.loads((saved / "trainer_state.json").read_text())
    return json.dumps(state | {"config": tables})


def test_resume_from_auto_looks_at_script_and_stage_as_a_run_that_is_named_does(tmp_path):
    flags = [*NAMED, "--resume_from=auto", "--experiment_name=a", f"--output_dir={tmp_path}"]
    with pytest.raises(UserError, match="no checkpoint, artifact or adapter; a whole"):
        read(*flags, f"--init_from={tmp_path}")
    newest = tmp_path / "a" / "checkpoints" / "checkpoint_step_4"
    begun = {lora: read(*flags, lora=lora) for lora in (True, False)}
    newest.mkdir(parents=True)
    (newest / "optimizer.safetensors").touch()
    for lora, name in ((True, "train_lora.py"), (False, "train.py")):
        (newest / "trainer_state.json").write_text(state_with(begun[lora].as_dict()))
        write_checksums(newest)
        assert read(*flags, lora=lora) == begun[lora]
        with pytest.raises(UserError, match=f"checkpoint_step_4: {name} made it"):
            read(*flags, lora=not lora)


ERRORS = [  # and those of tests/scripts/test_inputs.py
    (
        ["--rank_pattern=4"],
        "--rank_pattern = '4': expected a table, which only a config file can hold.",
    ),
    (["--load_in_4bit=maybe"], "--load_in_4bit = 'maybe': expected true or false."),
    (["--use_dora=2"], "--use_dora = '2': expected true or false."),
    (["--lorar=8"], "--lorar: no such key. Did you mean lora_r?"),
    (["--lora_r=2.5"], "--lora_r = '2.5': expected an integer."),
    (["--lora_r=-1"], "--lora_r = -1: expected an integer >= 0."),
    (
        ["--lora_r=0", "--base_model=m", "--train_data=d"],
        "lora_r = 0: nothing would be trained of a language model",
    ),
    (
        ["--lora_r=0", "--use_dora", "--modules_to_save=norm"],
        "the score head alone is trained; leave modules_to_save, use_dora",
    ),
    (
        ["--lora_r=0", "--add_special_tokens=<a>"],
        "the score head alone is trained; leave add_special_tokens out",
    ),
    (["--learning_rate=0"], "--learning_rate = 0.0: expected a number > 0."),
    (["--dtype=float31"], "Did you mean float32?"),
    (["--bf16=maybe"], "--bf16 = 'maybe': expected true, false or auto."),
    (["--lora_r"], "expected one argument"),
    (["--dtype=float32", "--bf16"], "flags: dtype and bf16 both choose the dtype"),
    (["--seed=100000000000000000000"], "expected an integer <= 9223372036854775807"),
    (["stray"], "stray: not expected here"),
    (["--base_model=m"], "add --train_data FILE"),
    (["--train_data=d"], "add --base_model FOLDER"),
    (["--eval_data=d"], "neither a model nor training data is named"),
    (["--config=/nowhere.toml"], "/nowhere.toml: No such file or directory."),
]


@pytest.mark.parametrize("flags, message", ERRORS, ids=[" ".join(flags) for flags, _ in ERRORS])
def test_a_wrong_flag_is_one_line(flags, message):
    with pytest.raises(UserError) as error:
        read(*flags)
    assert message in str(error.value) and "\n" not in str(error.value)


FILE_ERRORS = [
    ("[lora]\nrank_pattern = 4", "lora.rank_pattern = 4: expected a table"),
    (
        "[lora]\nrank_pattern = {q_proj = 0}",
        "lora.rank_pattern.q_proj = 0: expected an integer >= 1",
    ),
    ("[training]\nmax_stepz = 3", "training.max_stepz: no such key. Did you mean max_steps?"),
    ("sed = 3", "sed: no such key. Did you mean seed?"),
    ("seed = 3\n[training]\nseed = 4", "training.seed: seed is given twice."),
    ("[lora]\nr = 4\nlora_r = 4", "lora_r is given twice"),
    ("[training\nseed = 3", "line 1, column 10"),
    ("[training]\nbf16 = {a = 1}", "training.bf16.a: no such key"),
]


@pytest.mark.parametrize("text, message", FILE_ERRORS, ids=[text for text, _ in FILE_ERRORS])
def test_a_mistake_in_a_file_names_the_file_and_the_key(text, message, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read("--config", str(path), *NAMED)
    assert (
        str(error.value).startswith(f"{path}: ")
        and message in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", '{"config": 5}', '{"config": {"lora": 5}}'], ids=len
)
def test_a_state_that_is_none_of_ours_is_one_line(text, tmp_path):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(UserError, match="trainer_state.json: "):
        saved_config(tmp_path)


def as_of_an_older_version(folder, name, config, value):
    """`name` in `folder`, as a run saved it that still had the retired keys."""
    tables = config.as_dict()
    tables["data"] |= RETIRED | {"share_prompts": value}
    text = to_toml(tables) if name.endswith(".toml") else state_with(tables)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_a_checkpoint_in_parts_and_one_of_a_newer_version_are_one_line(tmp_path):
    state = {"config": Config().as_dict(), "format_version": 3}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="format_version 3; expected 2 at most"):
        saved_config(tmp_path)  # to which resume, eval, merge and init_from come
    (tmp_path / "shards.json").write_text("{}")
    write_checksums(tmp_path)
    with pytest.raises(UserError, match="written by plainlora 0.1, which reads it"):
        read_command_line(["--resume_from", str(tmp_path)], Config(), "", "")
    with pytest.raises(UserError, match="written by plainlora 0.1, which reads it"):
        require_stage(Config(model=ModelConfig(init_from=str(tmp_path))))


@pytest.mark.parametrize("name", ["trainer_state.json", "training_config.toml"])
def test_a_retired_key_in_a_saved_configuration_is_left_out_at_its_default_and_refused_else(
    tmp_path, name
):
    config = read(*NAMED)
    as_of_an_older_version(tmp_path, name, config, False)
    assert saved_config(tmp_path) == config
    as_of_an_older_version(tmp_path, name, config, True)
    with pytest.raises(UserError) as error:
        saved_config(tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path / name}: data.share_prompts = true was retired; plainlora 0.1.0 reads it."
    )


def test_a_checkpoint_of_an_older_version_is_resumed(tmp_path):
    flags = [*NAMED, "--experiment_name=a", f"--output_dir={tmp_path}"]
    config, checkpoint = read(*flags), tmp_path / "a" / "checkpoints" / "checkpoint_step_4"
    for value in (False, True):
        as_of_an_older_version(checkpoint, "trainer_state.json", config, value)
        (checkpoint / "optimizer.safetensors").touch()
        write_checksums(checkpoint)
        for resumed in ([f"--resume_from={checkpoint}"], [*flags, "--resume_from=auto"]):
            if value:
                with pytest.raises(UserError, match="data.share_prompts = true was retired"):
                    read(*resumed)
            else:
                assert read(*resumed) == config


def test_a_retired_key_that_a_user_writes_is_an_unknown_one(tmp_path):
    assert not RETIRED.keys() & fields_by_key(get_lora_config()).keys()
    path = tmp_path / "c.toml"
    path.write_text("[data]\nshare_prompts = false\n")
    for reading in (lambda: read("--config", str(path), *NAMED), lambda: from_file(str(path))):
        with pytest.raises(UserError, match="data.share_prompts: no such key"):
            reading()
    with pytest.raises(UserError, match="--share_prompts: no such key"):
        read(*NAMED, "--share_prompts")


def test_full_fine_tuning_refuses_lora_keys(tmp_path):
    with pytest.raises(
        UserError,
        match="--lora_r: train.py trains all weights and has no such key; use train_lora.py",
    ):
        read("--lora_r=4", lora=False)
    (tmp_path / "c.toml").write_text("[lora]\nlora_r = 4\n")
    with pytest.raises(
        UserError,
        match=r"\[lora\]: train.py trains all weights and has no such table; use train_lora.py",
    ):
        read("--config", str(tmp_path / "c.toml"), lora=False)


def test_a_named_folder_that_exists_is_never_written_into(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine exists; choose another --experiment_name"):
        read(*NAMED, "--output_dir", str(tmp_path), "--experiment_name=mine")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_config_reads_and_names_nothing_outside_the_repository(path):
    config = from_file(path)
    assert config.model.base_model in ("", "embedded", "assets/char")
    assert all(
        data.startswith("arithmetic:") for data in [*config.data.train_data, *config.data.eval_data]
    )


def test_every_key_has_a_line_of_help_and_stands_in_one_table():
    names = [
        f.name for table in vars(get_lora_config()).values() for f in dataclasses.fields(table)
    ]
    assert len(names) == len(set(names)) and all(
        f.metadata["help"] for _, f in fields_by_key(get_lora_config()).values()
    )


def test_help_says_what_a_value_is_and_the_everyday_flags_come_first(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "--task {lm,score} ",
        "--train_data FILE [FILE ...] ",
        "--learning_rate RATE ",
        "--batch_size N|auto ",
        "--use_dora [{true,false}] ",
        "--gradient_checkpointing [{true,false,auto}] ",
        "--data_weights WEIGHT [WEIGHT ...] ",
        "(default: 16; also --r)",
    ):
        assert part in shown, part
    assert not re.search(r"--\w+ (X|BOOL)\b", shown)
    flags = re.findall(r" (--\w+)", shown.partition(" options: ")[2].partition("[model]:")[0])
    everyday = ("base_model", "task", "train_data", "lora_r", "learning_rate", "max_steps")
    positions = [flags.index(f"--{name}") for name in (*everyday, "config", "check")]
    assert positions == sorted(positions)


def test_a_list_flag_given_twice_keeps_both():
    assert read(
        "--base_model=m", "--train_data", "a", "b", "--train_data", "c"
    ).data.train_data == ["a", "b", "c"]


def test_from_python_aliases_and_keys_of_the_whole_are_set_and_read():
    config = get_lora_config()
    config.training.per_device_train_batch_size = 2
    config.experiment_name = "x"
    config.lora.r = 4
    assert (config.training.batch_size, config.output.experiment_name, config.lora_r) == (2, "x", 4)
    assert config.training.per_device_train_batch_size == 2
    config.training.bf16 = True
    assert config.training.dtype == "bfloat16" and config.training.bf16
    config.bf16 = False
    assert config.training.dtype == "float32" and not config.training.fp16
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    "table, name, hint",
    [
        ("training", "learning_rat", "learning_rate"),
        ("lora", "lora_rr", "lora_r"),
        ("training", "epochs", "num_train_epochs"),
        ("data", "train_dta", "train_data"),
        ("", "experiment_nam", "experiment_name"),
    ],
)
def test_from_python_a_name_that_is_no_key_is_refused(table, name, hint):
    config = get_lora_config()
    owner = getattr(config, table) if table else config
    for use in (lambda: setattr(owner, name, 1), lambda: getattr(owner, name)):
        with pytest.raises(AttributeError, match=f"no key {name}. Did you mean {hint}?"):
            use()


def test_a_key_that_json_gives_twice_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"training": {"seed": 1, "seed": 2}}')
    with pytest.raises(UserError, match="c.json: cannot be read .'seed' is given twice"):
        read("--config", str(path), *NAMED)


def test_a_device_that_is_named_is_taken_without_a_look_at_the_preference(monkeypatch):
    monkeypatch.setenv("DEVICE_PREFERENCE", "tpu")
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="DEVICE_PREFERENCE tpu is not available here"):
        choose_device("auto")


@pytest.mark.parametrize(
    "flags, value",
    [
        ([], "auto"),
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "false"], False),
        (["--gradient_checkpointing=auto"], "auto"),
    ],
)
def test_gradient_checkpointing_is_true_false_or_auto(tmp_path, flags, value):
    assert read(*NAMED, *flags).training.gradient_checkpointing == value
    path = tmp_path / "c.toml"
    path.write_text(to_toml({"training": {"gradient_checkpointing": value}}))
    assert from_file(str(path)).training.gradient_checkpointing == value


def test_what_is_neither_true_nor_false_nor_auto_is_refused():
    expected = "--gradient_checkpointing = 'often': expected true, false or auto"
    with pytest.raises(UserError, match=expected):
        read(*NAMED, "--gradient_checkpointing=often")


def test_layers_that_were_checkpointed_or_not_by_an_older_version_may_be_chosen_for_on_resume(
    tmp_path,
):
    """Its configuration says true or false, where a file without the key says auto now."""
    flags = [*NAMED, "--experiment_name=a", f"--output_dir={tmp_path}"]
    config, checkpoint = read(*flags), tmp_path / "a" / "checkpoints" / "checkpoint_step_4"
    config.training.gradient_checkpointing = False
    as_of_an_older_version(checkpoint, "trainer_state.json", config, False)
    (checkpoint / "optimizer.safetensors").write_bytes(b"")
    write_checksums(checkpoint)
    assert read(f"--resume_from={checkpoint}") == config
    assert read(*flags, "--resume_from=auto").training.gradient_checkpointing == "auto"


@pytest.mark.parametrize(
    "flags, note",
    [
        (["--head_dropout", "0.1"], "head_dropout (task is lm)"),
        (
            ["--label_max=5", "--neutral_label=0", "--max_steps_per_example=3"],
            "label_max (task is lm), neutral_label (task is lm), max_steps_per_example (task is lm",
        ),
        (["--prm800k_path", "a.jsonl"], "prm800k_path (no use_prm800k)"),
        (
            ["--eval_data", "arithmetic:test:9", "--eval_fraction", "0.2"],
            "eval_fraction (eval_data",
        ),
        (["--warmup_steps", "1", "--warmup_ratio", "0.2"], "warmup_ratio (warmup_steps is given)"),
        (["--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type (no load_in_4bit)"),
        (["--bnb_4bit_quant_type", "fp4", "--load_in_4bit"], ""),
        (["--head_dropout", "0.1", "--task", "score"], ""),
    ],
)
def test_a_key_that_is_set_and_not_read_is_named(flags, note, capsys):
    named = ["--base_model", "embedded", "--train_data", "arithmetic:train:9", *flags]
    read_command_line(named, get_lora_config(), "", "")
    printed = capsys.readouterr().out
    assert printed.startswith("note: set, but not read: " + note) if note else not printed


def test_auto_does_not_begin_anew_where_no_checkpoint_has_an_optimizer(tmp_path):
    config = get_lora_config()
    config.output.output_dir, config.output.experiment_name = str(tmp_path), "run"
    assert newest_checkpoint(config) == ""
    (tmp_path / "run" / "checkpoints" / "checkpoint_step_4").mkdir(parents=True)
    with pytest.raises(UserError, match="every checkpoint in .*run is damaged or has no optimizer"):
        newest_checkpoint(config)


@pytest.mark.parametrize("other", [[], ["--gradient_checkpointing=auto"]])
def test_offloading_asks_for_checkpointed_layers(other):
    with pytest.raises(UserError, match="offload_activations: .* add --gradient_checkpointing."):
        read(*NAMED, "--offload_activations", *other)
    read(*NAMED, "--offload_activations", "--gradient_checkpointing")


@pytest.mark.parametrize("name", ["..", "../a", "a/../../b", "/tmp/a", "a/..", "a\0b"])
@pytest.mark.parametrize("resume", [[], ["--resume_from=auto"]])
def test_the_name_of_a_run_does_not_lead_out_of_output_dir(tmp_path, name, resume):
    with pytest.raises(
        UserError, match="experiment_name .*: (it leads out of output_dir|a NUL character)"
    ):
        read(*NAMED, f"--experiment_name={name}", f"--output_dir={tmp_path}", *resume)
    with pytest.raises(
        UserError, match="experiment_name .*: (it leads out of output_dir|a NUL character)"
    ):
        path = tmp_path / "a.json"
        path.write_text(json.dumps({"experiment_name": name}))
        read(*NAMED, "--config", str(path), *resume)


def test_the_size_of_a_step_is_kept_on_resume_whatever_is_allowed(tmp_path):
    flags = [*NAMED, "--experiment_name=a", f"--output_dir={tmp_path}"]
    checkpoint = tmp_path / "a" / "checkpoints" / "checkpoint_step_4"
    as_of_an_older_version(checkpoint, "trainer_state.json", read(*flags), False)
    (checkpoint / "optimizer.safetensors").write_bytes(b"")
    write_checksums(checkpoint)
    kept = "batch_size 8: a resumed run keeps its 4; start another run with --init_from"
    with pytest.raises(UserError, match=kept):
        read(*flags, "--resume_from=auto", "--batch_size=8", "--allow_change=batch_size")


def test_a_named_data_set_is_data_that_is_named():
    with pytest.raises(UserError, match="base_model"):  # and not the built-in example beside it
        read("--use_prm800k", "--prm800k_path=phase1_train.jsonl")
