"""What a checkpoint and an artifact must hold, whoever wrote them, and what protects against
somebody who writes their checksums too.
"""

import hashlib
import json
import math
import shutil

import pytest

import lora
from lora.common.checksums import write_checksums
from lora.common.errors import UserError
from lora.common.paths import ROOT
from lora.common.saved_files import refuse_inside_artifact, verify_artifact
from lora.config.command_line import read_command_line
from lora.config.earlier_stage import require_stage
from lora.config.schema import get_lora_config
from lora.config.set_keys import saved_config
from lora.evaluation.eval_arguments import read_arguments
from lora.training.best_checkpoints import recover
import merge
from tests.conftest import run

SAVED = ROOT / "tests" / "fixtures" / "written_by_0_1_0"


def seal(folder):
    (folder / "checksums.json").unlink(missing_ok=True)
    write_checksums(folder)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of version 0.1.0, in a folder of a run."""
    return shutil.copytree(
        SAVED / "checkpoint_step_4", tmp_path / "run" / "checkpoints" / "checkpoint_step_4"
    )


@pytest.fixture
def artifact(tmp_path):
    return shutil.copytree(SAVED / "final_artifact", tmp_path / "artifact")


ODD_STATES = {
    "step": ["4", None, -1, 1.5, True, 10**30, [4], math.nan],
    "without_best": ["0", None, -1],
    "skipped": ["0", None, -1],
    "scaler": [None, [], {"scale": "x"}, {"scale": math.inf}],
    "examples_per_step": [0, -1, "8", None, 10**9],
    "max_tokens": [0, -1, "8", None, 10**18],
    "config": [None, [], {}, {"model": 5}, {"training": {}}],
    "facts": [None, [], {}, {"train_data": []}],
    "facts.train_data": [None, [], {"x": 5}],
    "facts.base_model": [[], {"x": 5}, "x"],
    "facts.dtype": [None, 5],
    "facts.place": [None, {}, {"processes": 1}],
    "facts.place.threads": [0, -1, "1", None, 10**9],
    "facts.place.processes": [0, "1", None],
    "facts.surprise": [1],
    "totals": [{}, {"seconds": "x", "tokens": 1, "peak_memory": None}, []],
    "save_optimizer": [1, None],
    "val": [[], {}, {"loss": "x"}, {"loss": math.nan}, {"loss": 1e308}],
    "format_version": ["x", 3, [], None],
    "surprise": [1],
}
CASES = [(name, value) for name, values in ODD_STATES.items() for value in values]


@pytest.mark.parametrize("name, value", CASES, ids=str)
def test_an_odd_state_that_was_sealed_again_is_named(checkpoint, name, value):
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    *tables, key = name.split(".")
    place = state
    for table in tables:
        place = place[table]
    place[key] = value
    path.write_text(json.dumps(state))
    seal(checkpoint)
    for read in (
        saved_config,  # of eval.py, merge.py and --init_from
        lambda folder: read_command_line(
            ["--resume_from", str(folder)], get_lora_config(), None, ""
        ),
        lambda folder: recover(folder.parents[1], 4),  # beside the checkpoint that is resumed
    ):
        with pytest.raises(UserError, match="trainer_state.json|checkpoint_step_4: ") as error:
            read(checkpoint)
        assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", json.loads((SAVED / "checkpoint_step_4/trainer_state.json").read_text())
)
def test_a_state_without_one_of_its_keys_is_named(checkpoint, name):
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    del state[name]
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=f"trainer_state.json: .*{name}"):
        saved_config(checkpoint)


# --------------------------------------------------------------------------------------- artifacts


def test_a_folder_of_nothing_is_no_artifact(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    seal(tmp_path)
    with pytest.raises(UserError, match="metadata.json: no task; expected it"):
        verify_artifact(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["lora_adapter/adapter_model.safetensors", "mlp_head.safetensors", "training_config.toml"]
    + ["training_metrics.json", "tokenizer.json", "metadata.json"],
)
def test_an_artifact_without_one_of_its_files_is_none(artifact, name):
    verify_artifact(artifact)
    (artifact / name).unlink()
    seal(artifact)
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        verify_artifact(artifact)


@pytest.mark.parametrize(
    "values",
    [{"method": "full"}, {"task": 5}, {"base_files": []}, {"best": {}}, {"format_version": 9}]
    + [{"versions": None}, {"train_data": {"a": 5}}, {"best": {"step": 1, "loss": math.inf}}],
    ids=str,
)
def test_odd_metadata_are_named(artifact, values):
    path = artifact / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    seal(artifact)
    with pytest.raises(UserError, match="metadata.json: |config.json|format_version 9|no weights"):
        verify_artifact(artifact)


@pytest.mark.parametrize("saved", ["artifact", "checkpoint"])
def test_what_is_ours_has_checksums(saved, request):
    folder = request.getfixturevalue(saved)
    to_merge = merge.read_arguments(["--adapter", str(folder), "--output", "merged"])
    stage = get_lora_config()
    stage.model.init_from = str(folder)
    (folder / "checksums.json").unlink()
    for read in (
        lambda: merge.main(to_merge),
        lambda: read_arguments(["--checkpoint", str(folder)]),
        lambda: require_stage(stage),
    ):
        with pytest.raises(UserError, match="checksums.json: no such file"):
            read()


def test_the_sha256_of_the_checksums_tells_a_sealed_change(configure, capsys):
    artifact = run(configure(True, max_steps=2)) / "final_artifact"
    sha256 = hashlib.sha256((artifact / "checksums.json").read_bytes()).hexdigest()
    assert f"sha256 of its checksums.json: {sha256}\n" in capsys.readouterr().out
    flags = ["--checkpoint", str(artifact), "--expect_sha256"]
    with pytest.raises(SystemExit):
        read_arguments([*flags, sha256.upper(), "--verify_only"])
    assert capsys.readouterr().out.endswith(f"sha256 of its checksums.json: {sha256}\n")
    read_arguments([*flags, sha256])
    lora.verify_artifact(artifact, sha256)

    (artifact / "README.md").write_text("changed")
    seal(artifact)
    lora.verify_artifact(artifact)  # its own list says nothing
    to_merge = ["--adapter", str(artifact), "--output", "merged", "--expect_sha256", sha256]
    for verify in (
        lambda: lora.verify_artifact(artifact, sha256),
        lambda: read_arguments([*flags, sha256, "--verify_only"]),
        lambda: read_arguments([*flags, sha256]),
        lambda: merge.main(merge.read_arguments(to_merge)),
    ):
        with pytest.raises(UserError, match=f"expected {sha256}: not the files that were meant"):
            verify()
    (artifact / "README.md").write_text("changed again")
    with pytest.raises(UserError, match="'README.md': changed"):
        merge.main(merge.read_arguments([*to_merge[:4], "--portable"]))
    with pytest.raises(UserError, match="no artifact is named"):
        read_arguments(["--base_model", "embedded", "--eval_data", "x", "--expect_sha256", sha256])


def test_nothing_is_written_into_an_artifact(artifact, tmp_path):
    (tmp_path / "link").symlink_to(artifact)
    for path in (artifact / "new", artifact / "deeper" / "new", tmp_path / "link" / "new"):
        with pytest.raises(UserError, match="would no longer be as it was written"):
            refuse_inside_artifact("--output", str(path))
        with pytest.raises(UserError, match="would no longer be as it was written"):
            merge.read_arguments(["--adapter", str(artifact), "--output", str(path)])
    for flag in ("--output", "--html"):
        flags = ["--checkpoint", str(artifact), flag, str(artifact / "new")]
        with pytest.raises(UserError, match=f"{flag} .*would no longer be as it was written"):
            read_arguments(flags)
    refuse_inside_artifact("--output", str(tmp_path / "new"))


def test_results_do_not_replace_a_device(artifact):
    with pytest.raises(UserError, match="/dev/null: a folder or a device"):
        read_arguments(["--checkpoint", str(artifact), "--output", "/dev/null"])
