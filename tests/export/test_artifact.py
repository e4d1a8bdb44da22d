"""final_artifact/: whatever changes in it is found, its card's commands work, and the base is
measured to be unchanged.
"""

import json
from pathlib import Path
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from lora import verify_artifact
from lora.common.checksums import checksums_to_bytes, file_sha256
from lora.common.errors import Stopped, UserError
from lora.common.paths import ROOT
from lora.config.command_line import read_command_line
from lora.config.schema import Config
from lora.export import final_artifact
from lora.export.model_card import model_card
from lora.model.load import load_task
from lora.model.task import Task
from lora.training import base_integrity, description
from lora.training.checkpoint import trainable_parameters
from tests.conftest import configuration, run, script
from tests.preflight.test_check import chat, write

VERSION_1 = ROOT / "tests" / "fixtures" / "written_by_0_1_0" / "final_artifact"


@pytest.fixture(scope="module")
def made_once(tiny_base, tmp_path_factory):
    """The final artifact of a small LoRA run of a scorer."""
    folder = tmp_path_factory.mktemp("made")
    return run(configuration(tiny_base, folder, True, max_steps=2)) / "final_artifact"


@pytest.fixture
def made(made_once, tmp_path):
    """A copy of it, which a test may damage."""
    return shutil.copytree(made_once, tmp_path / "run" / "final_artifact")


# ------------------------------------------------------------------------------------- verification


def test_every_change_of_any_file_is_found(made, tmp_path):
    draw = random.Random(0)
    files = sorted(path for path in made.rglob("*") if path.is_file())
    assert len(files) >= 9

    def found(what, path):
        with pytest.raises(UserError, match=what) as error:
            verify_artifact(made)
        # A hash that flipped is another file's
        assert path.name in str(error.value) or path.name == "checksums.json"
        assert "\n" not in str(error.value)

    assert verify_artifact(made) == json.loads((made / "metadata.json").read_text())
    for i in range(200):
        path = files[i % len(files)]
        content = path.read_bytes()
        position, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
        )
        found("changed|damaged|missing|no such", path)
        path.write_bytes(content)
    for path in files * 4:
        content = path.read_bytes()
        path.write_bytes(
            content[: draw.choice([0, len(content) - 1, draw.randrange(len(content))])]
        )
        found("changed|damaged", path)
        path.write_bytes(content)
    for path in files:
        aside = tmp_path / "aside"
        path.rename(aside)
        found("missing|no such file", path)
        path.symlink_to(aside)
        found("link", path)
        path.unlink()
        other = aside.rename(path.with_name("other"))
        found("'[^']*other': extra|no such file", path)
        other.rename(path)
        (path.parent / ".hidden").write_text("")
        found(r"'[^']*\.hidden': extra", Path(".hidden"))
        (path.parent / ".hidden").unlink()
    verify_artifact(made)
    verify_artifact(shutil.copytree(made, tmp_path / "copy"))


def test_a_copy_from_the_hub_is_whole(made, tmp_path):
    downloaded = shutil.copytree(made, tmp_path / "downloaded")
    (downloaded / ".gitattributes").write_text("*.safetensors filter=lfs")
    (downloaded / ".cache" / "huggingface").mkdir(parents=True)
    (downloaded / ".cache" / "huggingface" / "CACHEDIR.TAG").write_text("")
    verify_artifact(downloaded)

    repository = tmp_path / "models--me--mine"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(made, snapshot)
    (repository / "blobs").mkdir()
    for path in snapshot.iterdir():
        if path.is_file():
            blob = path.rename(repository / "blobs" / path.name)
            path.symlink_to(Path("../../blobs") / blob.name)
    verify_artifact(snapshot)


def test_a_list_that_leads_out_of_the_folder_and_linked_folders_are_refused(made, tmp_path):
    path = made / "checksums.json"
    sums = json.loads(path.read_text())
    secret = tmp_path / "secret"
    secret.write_text("x")
    one = {"sha256": file_sha256(secret), "bytes": 1}
    for name in ("../../secret", str(secret), "./README.md", "a\\b", ""):
        path.write_bytes(checksums_to_bytes(sums | {name: one}))
        with pytest.raises(UserError, match="missing"):
            verify_artifact(made)
    for content in (b"[]", b"null", b'{"a": 1}\n', b"[" * 100_000, b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"checksums.json: damaged"):
            verify_artifact(made)
    path.write_bytes(checksums_to_bytes({"README.md": 1}))
    with pytest.raises(UserError, match="'README.md': changed"):
        verify_artifact(made)
    path.write_bytes(checksums_to_bytes({}))
    with pytest.raises(UserError, match="'metadata.json': extra"):
        verify_artifact(made)
    path.write_bytes(checksums_to_bytes(sums))
    made = shutil.copytree(VERSION_1, tmp_path / "version_1")
    (made / "lora_adapter").rename(tmp_path / "elsewhere")
    (made / "lora_adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match="'lora_adapter': a link.*adapter_model.safetensors': missing"
    ):
        verify_artifact(made)


def test_a_file_that_cannot_be_read_is_named(made, monkeypatch):
    def unreadable(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lora.common.checksums.file_sha256", unreadable)
    with pytest.raises(
        UserError, match=r"'mlp_head.safetensors': cannot be read \(Input/output error\)"
    ):
        verify_artifact(made)


def test_verify_only_answers_without_torch(made):
    blocked = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    blocked += (
        "import lora; assert lora.verify_artifact; runpy.run_path('eval.py', run_name='__main__')"
    )
    command = [
        sys.executable,
        "-c",
        blocked,
        "eval.py",
        "--verify_only",
        "--artifact_dir",
        str(made),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 0
        and done.stdout
        == f"{made}: verified: every file is as it was written\n"
        f"sha256 of its checksums.json: {file_sha256(made / 'checksums.json')}\n"
    )
    (made / "README.md").unlink()
    (made / "new").write_text("")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert "'README.md': missing; 'new': extra" in done.stderr


@pytest.mark.parametrize(
    "lora, name",
    [
        (True, "adapter_model"),
        (True, "mlp_head"),
        (False, "model"),
        (False, "mlp_head"),
    ],
)
def test_truncated_weights_are_one_line_of_eval(configure, monkeypatch, capsys, lora, name):
    path = run(configure(lora, max_steps=1)) / "final_artifact" / f"{name}.safetensors"
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        flags = ["--checkpoint", path.parent]
        status, _, said = script(monkeypatch, capsys, ROOT / "eval.py", *flags)
        assert status == 2 and re.findall("^error: .*", said, re.MULTILINE) == [
            said.strip().split("\n")[-1]
        ]
        assert "Traceback" not in said


# ------------------------------------------------------------------------------------ what is in it


def test_metadata_says_what_the_run_was_made_of(configure, tiny_base, tmp_path, monkeypatch):
    data = tmp_path / "steps.jsonl"
    data.write_text(
        json.dumps({"prompt": "1+1+1", "steps": ["1+1=2", "2+1=4"], "labels": [1, 0]}) + "\n"
    )
    monkeypatch.chdir(tmp_path)  # paths in the artifact are whole
    folder = run(configure(True, max_steps=2, train_data=["steps.jsonl", "arithmetic:train:9"]))
    facts = verify_artifact(folder / "final_artifact")
    assert facts["format_version"] == 2 and facts["task"] == "score" and facts["seed"] == 42
    assert facts["base_files"] == {
        "model.safetensors": file_sha256(tiny_base / "model.safetensors")
    }
    assert facts["base_unchanged"] is True
    assert facts["train_data"] == {"steps.jsonl": file_sha256(data), "arithmetic:train:9": None}
    assert facts["best"] == json.loads((folder / "logs" / "final_results.json").read_text())["best"]
    without_build = [
        version.partition("+")[0] for version in (facts["versions"]["torch"], torch.__version__)
    ]
    assert without_build[0] == without_build[1] and facts["seconds"] > 0
    assert (
        facts["hardware"]["threads"] == 1
        and facts["hardware"]["memory_gb"] > 0.1
        and facts["hardware"]["cpu"]
    )
    assert facts["git_commit"] is None or re.fullmatch(
        r"[0-9a-f]{40}(-dirty)?", facts["git_commit"]
    )
    config = (folder / "final_artifact" / "training_config.toml").read_text()
    assert f'train_data = ["{data}", "arithmetic:train:9"]' in config
    assert facts["trainable_parameters"] < facts["parameters"]


def test_the_artifacts_version_is_the_users(configure, tmp_path, capsys):
    """It stands in metadata and card, may change with a resume, and is never dropped in silence."""
    label = "v1.1.0-more-citations"
    (tmp_path / "flat.json").write_text(
        json.dumps({"artifact_version": "v1", "base_model": "embedded"})
    )
    flags = ["--config", str(tmp_path / "flat.json"), f"--artifact-version={label}"]
    command = read_command_line([*flags, "--train_data=arithmetic:train:9"], Config(), "", "")
    assert command.config.output.artifact_version == label

    values = dict(max_steps=1, dtype="float32")
    folder = run(configure(True, artifact_version=label, **values))
    artifact = folder / "final_artifact"
    assert verify_artifact(artifact)["artifact_version"] == label
    assert f"\n\nVersion {label}.\n\n" in (artifact / "README.md").read_text()
    checkpoint = folder / "checkpoints" / "checkpoint_step_1"
    run(configure(True, artifact_version=label, **values), checkpoint, auto=True)
    assert "complete since step 1" in capsys.readouterr().out
    for other in ("", "v2"):
        with pytest.raises(UserError, match=f"artifact_version '{other}', and .* as '{label}'; "):
            run(configure(True, artifact_version=other, **values), checkpoint, auto=True)
    assert verify_artifact(artifact)["artifact_version"] == label
    run(configure(True, artifact_version="v2", max_steps=2, dtype="float32"), checkpoint, auto=True)
    assert verify_artifact(artifact)["artifact_version"] == "v2"


def test_code_outside_of_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(final_artifact, "ROOT", tmp_path)
    git_commit = final_artifact.git_commit.__wrapped__  # not the remembered one
    assert git_commit() is None
    (tmp_path / ".git").mkdir()  # which git calls no checkout
    assert git_commit() is None


CARDS = {
    "lora lm without a template": (True, dict(task="lm", base_model="without_template")),
    "lora lm on chats": (True, dict(task="lm", train_data="chats", eval_data=[])),
    "lora lm with a token": (
        True, dict(task="lm", add_special_tokens=["<step>"], modules_to_save=["embed_tokens"])
    ),
    "lora scorer of the embedded base": (True, dict(base_model="embedded")),
    "lora scorer of an encoder": (True, dict(base_model="tiny_encoder")),
    "lora scorer with markers": (
        True, dict(step_marker="?", prompt_format="{prompt}", step_format="{number}{step}{marker};")
    ),
    "lora on random weights": (True, dict(init_from="scratch")),
    "head alone": (True, dict(lora_r=0)),
    "lora scorer of the first layer": (True, dict(base_model="embedded", score_layer=1)),
    "full lm": (False, dict(task="lm")),
    "full scorer": (False, {}),
    "full lm on random weights": (False, dict(task="lm", init_from="scratch")),
}  # fmt: skip


@pytest.mark.parametrize("kind", CARDS)
def test_the_cards_commands_and_its_code_work_as_they_stand(
    configure, request, monkeypatch, capsys, tmp_path, kind
):
    lora, values = CARDS[kind]
    if values.get("train_data") == "chats":
        values = values | dict(train_data=write(tmp_path / "chats", map(chat, range(40))))
    if values.get("base_model") == "tiny_encoder":
        values = values | dict(base_model=str(request.getfixturevalue("tiny_encoder")))
    if values.get("base_model") == "without_template":
        folder = shutil.copytree(request.getfixturevalue("tiny_base"), tmp_path / "base")
        (folder / "chat_template.jinja").unlink()
        values = values | dict(base_model=str(folder))
    config = configure(lora, "a run's name", max_steps=2, dtype="float32", **values)
    folder = run(config)
    card = (folder / "final_artifact" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == (
        "peft" if (folder / "final_artifact" / "adapter_config.json").is_file() else "transformers"
    )
    # No path of this machine, but that of the base in the code
    base = json.dumps(config.model.base_model)
    assert str(tmp_path) not in card.replace(base, "") and str(ROOT) not in card
    monkeypatch.chdir(folder)
    shell = re.search("```sh\n(.*?)```", card, re.S)[1]
    # A shell reads the lines, and hands each call of plainlora to this process, which need not load
    # torch again.
    catch = "set -e; plainlora() { printf '%s\\0' \"$@\" CALL; }\n"
    words = subprocess.run(
        ["bash", "-c", catch + shell], capture_output=True, text=True, check=True
    ).stdout
    calls = [call.split("\0")[:-1] for call in words.split("CALL\0")[:-1]]
    is_merged = lora and values.get("init_from") != "scratch" and "score_layer" not in values
    assert len(calls) == 3 + is_merged
    for command, *flags in calls:
        status, said, errors = script(monkeypatch, capsys, ROOT / f"{command}.py", *flags)
        assert status == 0, errors
        if "--prompt" in flags:
            of_eval, prompt = said, flags[-1]
    assert (folder / "merged" / "config.json").is_file() == (len(calls) == 4)
    if values.get("init_from") == "scratch":
        assert "random weights in the shape of `" in card
    if kind == "lora on random weights":
        assert "```python" not in card
        return

    exec(re.search("```python\n(.*?)```", card, re.S)[1], {})
    printed = capsys.readouterr().out
    if config.model.task == "lm":
        if "without" in kind:
            flags = ["--checkpoint", "final_artifact", "--prompt", prompt, "--ignore_chat_template"]
            _, of_eval, _ = script(monkeypatch, capsys, ROOT / "eval.py", *flags)
        assert printed and of_eval.startswith(printed.removesuffix("\n"))
    else:
        lines, lines_of_eval = printed.splitlines(), of_eval.splitlines()
        assert len(lines) == 2
        for line, line_of_eval in zip(lines, lines_of_eval):
            score, step = line.split(maxsplit=1)
            assert step == "A step" and step in line_of_eval
            # The card's code computes in the embedded base's bfloat16, eval.py in float32.
            assert float(score) == pytest.approx(float(line_of_eval.split()[0]), abs=0.01)
    verify_artifact("final_artifact")


@pytest.mark.parametrize("init_from", ["", "scratch"])
def test_a_card_names_a_base_of_the_hub_unless_only_its_shape_was_taken(configure, init_from):
    config = configure(False, task="lm")
    task = load_task(config, torch.float32)
    config.model.base_model, config.model.init_from = "owner/name", init_from
    facts = {"best": {"step": 1}, "train_data": {}, "eval_data": {}, "seconds": 1}
    card = model_card(task, config, facts | {"trainable_parameters": 1, "parameters": 1})
    what = "model from random weights in the shape" if init_from else "full fine-tuning"
    assert f"A {what} of `owner/name`, trained with plainlora" in card
    assert ('base_model: "owner/name"' in card) == (not init_from)


def test_an_artifact_is_whole_or_absent(configure, monkeypatch):
    config = configure(True, max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(final_artifact, "write_checksums", interrupted)
        run(config)
    folder = Path(config.output.output_dir) / "run"
    assert not (folder / "final_artifact").exists()
    # Goes on, twice: the artifact of 8 steps is made, and then replaced
    config.training.max_steps = 8
    run(config, folder / "checkpoints" / "checkpoint_step_4")
    first = verify_artifact(folder / "final_artifact")
    config.training.max_steps = 12
    run(config, folder / "checkpoints" / "checkpoint_step_8")
    assert verify_artifact(folder / "final_artifact")["best"]["step"] >= first["best"]["step"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def interrupted(*_):
    raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------- the base


@pytest.fixture
def own_base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def disturb(monkeypatch, change):
    """Call change(task) at the second forward pass of training."""
    undisturbed, calls = Task.forward, []

    def forward(self, batch):
        calls.append(0)
        if len(calls) == 2:
            with torch.no_grad():
                change(self)
        return undisturbed(self, batch)

    monkeypatch.setattr(Task, "forward", forward)


@pytest.mark.parametrize("lora", [True, False])
def test_base_unchanged_is_said_and_recorded(configure, capsys, tiny_base, lora):
    folder = run(configure(lora, max_steps=2))
    said = capsys.readouterr().out
    sums = json.loads((folder / "baseline_checksums.json").read_text())
    assert sums["files"] == {"model.safetensors": file_sha256(tiny_base / "model.safetensors")}
    frozen = (
        rf"{sums['frozen_tensors']} frozen tensors, sha256 {sums['frozen_sha256']}; "
        if lora
        else ""
    )
    assert re.search(rf"base model weights unchanged: {frozen}weight files: 1\n", said)
    assert (
        "only adapter parameters are trainable: 28 LoRA tensors, 4 of the score head\n" in said
    ) == lora
    # 2 layers of 9 weights, the embedding, the last norm
    assert sums["frozen_tensors"] == (20 if lora else 0)


def test_a_frozen_weight_that_changes_stops_the_run(configure, monkeypatch):
    def one_bit(task):
        weight = task.model.get_submodule("layers.1.mlp.up_proj").base_layer.weight
        weight.view(-1)[7:8].view(torch.uint8)[0] ^= 1

    disturb(monkeypatch, one_bit)
    config = configure(True, max_steps=2, dtype="bfloat16")
    with pytest.raises(
        Stopped,
        match=r"changed during training: layers.1.mlp.up_proj.base_layer.weight; no artifact",
    ):
        run(config)
    folder = Path(config.output.output_dir) / "run"
    assert (folder / "checkpoints" / "checkpoint_step_2").is_dir() and not (
        folder / "final_artifact"
    ).exists()


@pytest.mark.parametrize("lora", [True, False])
def test_a_file_of_the_base_that_changes_stops_the_run(configure, monkeypatch, own_base, lora):
    # In place the file must not shrink: the weights in memory are mapped from it
    def replace(task):
        (own_base / "new").write_bytes((own_base / "model.safetensors").read_bytes()[:-1])
        (own_base / "new").replace(own_base / "model.safetensors")

    disturb(monkeypatch, replace)
    with pytest.raises(Stopped, match="changed during training: model.safetensors; no artifact"):
        run(configure(lora, max_steps=2, base_model=str(own_base)))


def test_what_is_trained_beside_the_adapter_stops_the_run(configure, monkeypatch):
    measured = description.only_adapters_train

    def unfrozen(model, modules, head):
        model.norm.weight.requires_grad_(True)
        return measured(model, modules, head)

    monkeypatch.setattr(description, "only_adapters_train", unfrozen)
    config = configure(True, max_steps=1)
    with pytest.raises(Stopped, match="trained beside the adapter: norm.weight; "):
        run(config)
    assert not (Path(config.output.output_dir) / "run").exists()


def test_a_module_to_save_is_part_of_the_adapter(configure, capsys):
    # Tied to the embeddings
    folder = run(configure(True, task="lm", max_steps=1, modules_to_save=["lm_head"]))
    assert "28 LoRA tensors, 1 of modules_to_save\n" in capsys.readouterr().out
    # Without the embedding
    assert json.loads((folder / "baseline_checksums.json").read_text())["frozen_tensors"] == 19


def test_tensors_are_hashed_as_they_lie_in_memory():
    whole = torch.arange(12.0).reshape(3, 4)
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
    ):
        tensor = whole.to(dtype)
        assert base_integrity.sha256_of_tensor(tensor) == base_integrity.sha256_of_tensor(
            tensor.clone()
        )
        assert base_integrity.sha256_of_tensor(tensor) != base_integrity.sha256_of_tensor(
            tensor.reshape(4, 3)
        )
        assert base_integrity.sha256_of_tensor(tensor.T) == base_integrity.sha256_of_tensor(
            tensor.T.contiguous()
        )
    assert base_integrity.sha256_of_tensor(torch.tensor(0.0)) != base_integrity.sha256_of_tensor(
        torch.tensor(-0.0)
    )
    assert len(base_integrity.sha256_of_tensor(torch.empty(0))) == 64


def test_four_bit_weights_are_hashed_with_their_scales():
    import bitsandbytes as bnb

    model = torch.nn.Sequential(
        bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=True)
    ).to("cpu")
    model.requires_grad_(False)
    weight = model[0].weight
    assert weight.dtype == torch.uint8 and not trainable_parameters(model)

    def sums():
        return {
            name: base_integrity.sha256_of_tensor(one)
            for name, one in base_integrity.frozen_tensors(model).items()
        }

    before = sums()
    assert before == sums()
    for tensor in (
        weight.data,
        weight.quant_state.absmax,
        weight.quant_state.state2.absmax,
        model[0].bias.data,
    ):
        flat = tensor.reshape(-1)[:1].view(torch.uint8)
        flat[0] ^= 1
        assert sums() != before
        flat[0] ^= 1
    assert before == sums()
