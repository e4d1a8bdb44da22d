"""One training after another: weights of an earlier stage with a fresh schedule, and tokens that
were added.
"""

import json
import shutil

from peft import LoraConfig, PeftModel, get_peft_model
import pytest
from safetensors.torch import load_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora.adapter import load_adapter
from lora.common.errors import UserError
from lora.config.command_line import read_command_line
from lora.config.earlier_stage import require_stage
from lora.config.schema import DataConfig, get_lora_config
from lora.data.chat_template import use_chatml
from lora.data.examples import Example
from lora.data.tokenise import NO_TOKEN, tokenise
from lora.layer import inject, lora_layers, merge
from lora.model.load import load_task
import merge as merging
from tests.conftest import run, tiny_llama
from tests.lora.test_layer import randomise

LM = dict(
    task="lm",
    max_steps=4,
    eval_steps=4,
    train_data=["arithmetic:train:60"],
    eval_data=["arithmetic:validation:8"],
)


def losses(folder):
    lines = [
        json.loads(line)
        for line in (folder / "logs" / "train_metrics.jsonl").read_text().splitlines()
    ]
    return [line["val/loss"] for line in lines if "val/loss" in line]


@pytest.mark.parametrize("first", [True, False], ids=["from lora", "from full"])
@pytest.mark.parametrize("second", [True, False], ids=["to lora", "to full"])
def test_a_stage_begins_where_the_one_before_ended(configure, first, second):
    one = run(configure(first, "one", **LM))
    if second and not first:
        with pytest.raises(
            UserError,
            match="holds a whole model, not an adapter; name .*final_artifact as the base_model",
        ):
            run(configure(second, "two", init_from=str(one / "final_artifact"), **LM))
        return
    two = run(configure(second, "two", init_from=str(one / "final_artifact"), **LM))
    # Merged: sums in another order
    assert losses(two)[0] == pytest.approx(losses(one)[-1], abs=1e-5)
    assert losses(two)[-1] < losses(one)[-1] < losses(one)[0]
    settings = [
        json.loads(line) for line in (two / "logs" / "train_metrics.jsonl").read_text().splitlines()
    ]
    # A schedule of its own
    assert [line["step"] for line in settings if "train/loss" in line] == [1, 2, 3, 4]


def test_a_scorer_starts_from_an_adapter_of_language_modelling(configure):
    one = run(configure(True, "one", **LM))
    two = run(
        configure(
            True,
            "two",
            init_from=str(one / "checkpoints" / "checkpoint_step_4"),
            max_steps=1,
            learning_rate=1e-9,
        )
    )
    before = load_file(one / "final_artifact" / "adapter_model.safetensors")
    after = load_file(two / "final_artifact" / "adapter_model.safetensors")
    assert (
        before.keys() == after.keys()
        and max((after[k] - before[k]).abs().max().item() for k in after) < 1e-6
    )


def test_full_stages_of_both_tasks_follow_each_other(configure, tmp_path):
    text = run(configure(False, "text", **LM)) / "final_artifact"
    run(configure(False, "scores", init_from=str(text), max_steps=1))
    base = tmp_path / "untied"
    tiny_llama(tie_word_embeddings=False).save_pretrained(base)
    AutoTokenizer.from_pretrained(configure(True).model.base_model).save_pretrained(base)
    scorer = run(configure(False, "scorer", base_model=str(base), max_steps=1)) / "final_artifact"
    # Not random ones
    with pytest.raises(UserError, match="final_artifact: no weights, .* for: lm_head.weight"):
        run(configure(False, "later", base_model=str(base), init_from=str(scorer), **LM))


def test_full_fine_tuning_of_an_encoder_starts_from_its_adapter(configure, tiny_encoder):
    shape = dict(base_model=str(tiny_encoder), max_length=128, max_steps=2)
    one = run(configure(True, "one", **shape))
    two = run(configure(False, "two", init_from=str(one / "final_artifact"), **shape))
    assert losses(two)[0] == pytest.approx(losses(one)[-1], abs=1e-5)


@pytest.mark.parametrize(
    "first, second, message",
    [
        (
            dict(lora_r=4),
            dict(lora_r=8),
            "init_from .*: made with other settings; add --lora_r 4.",
        ),
        (
            {},
            dict(target_modules=["q_proj"]),
            "not among what is trained .see target_modules.*: model.layers.0.mlp.down",
        ),
        (dict(target_modules=["q_proj"]), {}, "no tensors for: model.layers.0.mlp.down_proj"),
        (
            dict(lora_alpha=8),
            {},
            "made with other settings; add --lora_alpha 8.",
        ),
        ({}, dict(use_rslora=True), "add --use_rslora false."),
        (
            dict(rank_pattern={"q_proj": 4}),
            {},
            r"q_proj.lora_A.weight is \[4, 32\], its place is \[16, 32\]",
        ),
        (
            dict(alpha_pattern={"q_proj": 4.0}),
            {},
            "lora_alpha, alpha_pattern or use_rslora differ from the model's for: model.layers.0",
        ),
        (
            dict(modules_to_save=["norm"]),
            {},
            "not among what is trained .see .* use_dora.: model.norm.weight",
        ),
    ],
)
def test_an_adapter_of_another_make_is_an_error(configure, first, second, message):
    one = run(configure(True, "one", **LM | first))
    config = configure(True, "two", init_from=str(one / "final_artifact"), **LM | second)
    with pytest.raises(UserError, match=message):
        require_stage(config)  # before torch is loaded
        run(config)


def test_a_stage_after_one_that_added_tokens_must_add_them_first(configure, tmp_path):
    one = run(configure(True, "one", **LM | ADDED)) / "final_artifact"
    flags = [
        "--base_model=embedded",
        "--train_data=arithmetic:train:9",
        "--modules_to_save",
        "embed_tokens",
        "lm_head",
    ]
    for tokens in ([], ["--add_special_tokens", "</step>", "<step>"]):
        with pytest.raises(
            UserError,
            match="it has tokens of its own; begin with --add_special_tokens <step> </step>",
        ):
            read_command_line(
                [*flags, *tokens, f"--init_from={one}"], get_lora_config(), "none.toml", ""
            )
    alone = one.parent / "checkpoints" / "checkpoint_step_4" / "lora_adapter"
    for again in (ADDED | dict(add_special_tokens=[]), {}):
        with pytest.raises(
            UserError, match="has embeddings of 2050 tokens, not 2048|not among what is trained"
        ):
            run(configure(True, f"two{len(again)}", init_from=str(alone), **LM | again))
    two = run(configure(True, "three", init_from=str(one), **LM | ADDED))
    assert losses(two)[0] == pytest.approx(losses(one.parent)[-1], abs=1e-5)


@pytest.mark.parametrize(
    "target, task", [("embed_tokens", "score"), ("embed_tokens", "lm"), ("lm_head", "lm")]
)
def test_full_fine_tuning_folds_factors_of_embeddings_in_unless_they_untie_the_head(
    configure, tmp_path, target, task
):
    settings = LoraConfig(
        r=2, target_modules=["q_proj", target], task_type="CAUSAL_LM", init_lora_weights=False
    )
    theirs = get_peft_model(tiny_llama(tie_word_embeddings=True), settings)
    theirs.save_pretrained(tmp_path / "theirs")
    config = configure(
        False, **LM | dict(task=task, max_steps=1), init_from=str(tmp_path / "theirs")
    )
    if task == "lm":
        with pytest.raises(
            UserError,
            match="gives the model a head of its own; merge it .merge.py., and train the result",
        ):
            run(config)
    else:
        begun = load_task(config, torch.float32)
        begun.start_from(config.model.init_from)
        merged = theirs.merge_and_unload().get_input_embeddings().weight
        torch.testing.assert_close(
            begun.model.get_input_embeddings().weight, merged, rtol=0, atol=1e-6
        )
        run(config)


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_init_from_names_an_earlier_stage_or_is_an_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    flags = [
        "--base_model=embedded",
        "--train_data=arithmetic:train:9",
        f"--init_from={tmp_path / name}",
    ]
    with pytest.raises(UserError, match="no checkpoint, artifact or adapter; a whole"):
        read_command_line(flags, get_lora_config(), "none.toml", "")


def test_a_stage_begins_with_an_adapter_beside_another_trainers_state(configure, tmp_path):
    one = run(configure(True, "one", **LM))
    theirs = shutil.copytree(one / "checkpoints/checkpoint_step_4/lora_adapter", tmp_path / "500")
    (theirs / "trainer_state.json").write_text('{"global_step": 500}')
    config = configure(True, "two", init_from=str(theirs), **LM)
    require_stage(config)
    assert losses(run(config))[0] == pytest.approx(losses(one)[-1], abs=1e-5)


def test_the_adapter_in_a_checkpoint_of_ours_is_not_taken_without_the_head_beside_it(configure):
    checkpoint = run(configure(True, max_steps=4)) / "checkpoints/checkpoint_step_4"
    config = configure(True, "two", init_from=str(checkpoint / "lora_adapter"))
    with pytest.raises(UserError, match="lora_adapter: a part of .*checkpoint_step_4, which holds"):
        require_stage(config)


def test_tokens_do_not_name_a_head_for_a_stage_that_brings_its_own(configure):
    checkpoint = run(configure(True, max_steps=4)) / "checkpoints/checkpoint_step_4"
    config = configure(True, "two", init_from=str(checkpoint), head_tokens=["+", "-"])
    with pytest.raises(UserError, match="it brings its score head; leave --head_tokens out"):
        require_stage(config)


def test_a_scorer_goes_on_with_the_layout_that_it_was_trained_on(configure):
    formats = dict(prompt_format="{prompt}:\n", step_format="{step}\n", step_marker=".")
    one = run(configure(True, "one", max_steps=1, **formats)) / "final_artifact"
    require_stage(configure(True, "two", init_from=str(one), **formats))
    with pytest.raises(UserError) as error:
        require_stage(configure(True, "two", init_from=str(one)))
    found = 'prompt_format = "{prompt}:\\n", step_marker = "."'
    mend = "set the same; to change it, name the merged scorer as base_model"
    assert str(error.value) == f"init_from {one}: it was trained with {found}; {mend}."


def test_a_stage_on_a_base_that_is_quantised_otherwise_says_so(configure, capsys):
    one = run(configure(True, "one", **LM)) / "final_artifact"
    capsys.readouterr()
    settings = LM | dict(init_from=str(one), bnb_4bit_quant_type="fp4")  # not read
    require_stage(configure(True, "two", **settings))
    assert not capsys.readouterr().out
    require_stage(configure(True, "two", load_in_4bit=True, **settings))
    said = f"note: init_from {one}: it was trained with --load_in_4bit false; on a base"
    assert capsys.readouterr().out.startswith(said)


def test_a_stage_is_verified_before_a_check_or_a_dry_run(configure):
    artifact = run(configure(True, **LM)) / "final_artifact"
    path = artifact / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for flag in ("--check", "--dry_run"):
        flags = ["--base_model=embedded", "--train_data=arithmetic:train:9", flag]
        with pytest.raises(UserError, match="changed"):
            read_command_line([*flags, f"--init_from={artifact}"], get_lora_config(), "", "")


def test_a_run_is_resumed_without_the_stage_it_began_with(configure):
    one = run(configure(True, "one", **LM))
    two = run(configure(True, "two", init_from=str(one / "final_artifact"), **LM))
    shutil.rmtree(one)
    last = two / "checkpoints" / "checkpoint_step_4"
    command = read_command_line(
        [f"--resume_from={last}", "--max_steps=5"], get_lora_config(), "none.toml", ""
    )
    assert (run(command.config, last) / "checkpoints" / "checkpoint_step_5").is_dir()


# ------------------------------------------------------------------------------------- added tokens

ADDED = dict(add_special_tokens=["<step>", "</step>"], modules_to_save=["embed_tokens", "lm_head"])


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_are_trained_saved_and_loaded_by_us_and_by_peft(configure, tmp_path, tied):
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=tied).save_pretrained(base)
    AutoTokenizer.from_pretrained(configure(True).model.base_model).save_pretrained(base)
    rows = [{"text": f"<step>{i} and {i + 1}</step>"} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(train_data=[str(tmp_path / "texts.jsonl")], eval_data=[])
    modules = ADDED | (dict(modules_to_save=["embed_tokens"]) if tied else {})
    config = configure(True, base_model=str(base), **LM | data | modules)
    artifact = run(config) / "final_artifact"

    saved = json.loads((artifact / "adapter_config.json").read_text())
    # Tied ones under both names, for PEFT
    assert saved["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    (step,) = tokenizer("<step>", add_special_tokens=False).input_ids
    assert step >= 2048 and len(tokenizer) == 2050

    tokens = torch.tensor([[step, 5, 6, step + 1]])
    ours = load_task(config, torch.float32)
    ours.load(artifact)
    base_logits = ours.model(tokens).logits
    peers = AutoModelForCausalLM.from_pretrained(base)
    peers.resize_token_embeddings(2050)
    peers = PeftModel.from_pretrained(peers, artifact).eval()
    torch.testing.assert_close(peers(tokens).logits, ours.model(tokens).logits, rtol=0, atol=1e-5)
    merge(ours.model)
    torch.testing.assert_close(ours.model(tokens).logits, base_logits, rtol=0, atol=1e-5)
    merging.main(
        merging.read_arguments(
            [f"--adapter={artifact}", f"--output={tmp_path / 'merged'}", "--dtype=float32"]
        )
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(tokens).logits, base_logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("<step>").input_ids == [step]
    assert (
        ours.model.get_output_embeddings().weight is ours.model.get_input_embeddings().weight
    ) == tied


@pytest.mark.parametrize("template", [True, False])
def test_added_tokens_are_read_in_chats_unless_the_template_writes_them(
    configure, tmp_path, template
):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(configure(True).model.base_model)
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    config = configure(
        True, base_model=str(base), task="lm", add_special_tokens=["<step>", "<|im_start|>"]
    )
    task = load_task(config, torch.float32)
    use_chatml(task.tokenizer)
    said = "<step>one <|im_start|>"
    example = Example(
        "", messages=[{"role": "user", "content": "go"}, {"role": "assistant", "content": said}]
    )
    (row,) = tokenise([example], task.tokenizer, "lm", DataConfig(max_length=256), True)[0].rows
    step, start = task.tokenizer.convert_tokens_to_ids(["<step>", "<|im_start|>"])
    assert (
        row.targets.count(step) == 1 and row.tokens.count(start) == 2 and start not in row.targets
    )
    targets = [target for target in row.targets if target != NO_TOKEN]
    assert task.tokenizer.decode(targets[:-1], skip_special_tokens=True) == said


def test_an_adapter_that_holds_one_of_two_tied_weights_unties_them(tmp_path):
    """PEFT trains a copy of the module it saves, and leaves the other half of the tie as it was."""
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    peers = get_peft_model(tiny_llama(tie_word_embeddings=True), settings).eval()
    with torch.no_grad():
        for parameter in peers.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    peers.save_pretrained(tmp_path)
    ours = tiny_llama(tie_word_embeddings=True)
    load_adapter(ours, tmp_path)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(ours(tokens).logits, peers(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task, head", [("lm", " lm_head"), ("score", "")])
def test_tokens_without_trained_embeddings_are_refused(task, head):
    flags = [
        "--base_model=embedded",
        "--train_data=arithmetic:train:9",
        "--add_special_tokens",
        "<step>",
        f"--task={task}",
    ]
    mend = f"LoRA trains no embeddings; add --modules_to_save embed_tokens{head}.$"
    with pytest.raises(UserError, match=mend):
        read_command_line(flags, get_lora_config(), "none.toml", "")


@pytest.mark.parametrize("modules, bits", [(["embed_tokens"], False), (["norm"], True)])
def test_modules_to_save_learn_in_fp32_beside_a_base_in_half(configure, modules, bits):
    """bfloat16 is what a GPU computes in unless it is told otherwise."""
    folder = run(
        configure(True, **LM, dtype="bfloat16", load_in_4bit=bits, modules_to_save=modules)
    )
    assert losses(folder)[-1] < losses(folder)[0]
    saved = load_file(folder / "final_artifact" / "adapter_model.safetensors")
    (module,) = (name for name in saved if name.endswith(f"model.{modules[0]}.weight"))
    assert saved[module].dtype == torch.float32 and not torch.equal(
        saved[module], saved[module].bfloat16().float()
    )


def test_modules_to_save_are_trained_in_fp32_and_must_exist():
    model = tiny_llama(tie_word_embeddings=True).bfloat16()
    inject(model, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"])
    randomise(model)
    trained = {
        name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name
    }
    assert (
        trained == {"model.embed_tokens.weight", "model.norm.weight"}
        and len(lora_layers(model)) == 2
    )
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with pytest.raises(
        UserError, match="modules_to_save: 'wte' is not the end of the name of a module"
    ):
        inject(tiny_llama(), r=2, modules_to_save=["wte"])
