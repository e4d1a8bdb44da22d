"""An installed package works: all of its modules can be imported, and importing changes nothing."""

import json
import os
from pathlib import Path
import subprocess
import sys
import tomllib
import zipfile

from packaging.requirements import Requirement
import pytest
import yaml

import lora
from lora.__main__ import SCRIPT_COMMANDS, TOOL_COMMANDS
from lora.common.paths import ROOT

# The libraries are imported first, so that what they change in the process is not put down to us.
STATE_AFTER_IMPORT = """
import csv, importlib, json, logging, os, signal, sys
import bitsandbytes, gguf, huggingface_hub, jinja2, numpy, safetensors.torch, tokenizers
import torch
import torch.distributed, torch.nn.attention.varlen, tqdm, transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

def state():
    return {
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "signal handlers": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "level of the root logger": logging.root.level,
        "verbosity of transformers": transformers_logging.get_verbosity(),
        "progress bars of transformers": transformers_logging.is_progress_bar_enabled(),
        "longest csv field": csv.field_size_limit(),
    }

changes = {}
for name in json.loads(sys.argv[1]):
    before = state()
    importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    if changed:
        changes[name] = changed
import lora
print(json.dumps({"changes": changes, "package": lora.__file__}))
"""


def modules() -> list[str]:
    names = []
    for path in sorted((ROOT / "lora").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts[-1] != "__main__":
            names.append(".".join(parts))
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-q", "-w", folder, ROOT], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_every_module_of_an_installed_package_is_imported_and_changes_nothing(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", STATE_AFTER_IMPORT, json.dumps(modules())],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["changes"] == {}
    assert Path(result["package"]).is_relative_to(tmp_path / "site")


def tracked_files(*paths: str) -> list[str]:
    command = ["git", "ls-files", *paths]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_the_wheel_holds_what_a_user_needs_and_no_other_top_level_module(wheel):
    """Templates, which are no modules, py.typed, and what stands beside lora/ in a clone."""
    needed = set(tracked_files("lora"))
    for script in SCRIPT_COMMANDS:
        needed.add(f"lora/scripts/{script}.py")
    for path in tracked_files("configs", "assets/tiny_base", "assets/char", "assets/samples"):
        needed.add(f"lora/{path}")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert needed <= names
    info = f"plainlora-{lora.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"lora", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names


def run_command(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lora", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help_of_the_command_is_one_screen_and_its_version_is_the_packages():
    shown = run_command("--help").stdout.splitlines()
    assert len(shown) <= 24 and max(map(len, shown)) <= 80
    for command in (*SCRIPT_COMMANDS, *TOOL_COMMANDS):
        assert any(line.split()[:1] == [command] for line in shown), command
    assert run_command("--version").stdout == f"plainlora {lora.__version__}\n"
    assert run_command("train-lora", "--help").stdout == run_command("train_lora", "--help").stdout
    assert "train_lora" in run_command("trian").stderr


def test_pre_commit_has_the_versions_of_the_extra_test():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {}
    for requirement in map(Requirement, project["optional-dependencies"]["test"]):
        allowed[requirement.name] = requirement.specifier
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {
        repository["hooks"][0]["id"]: repository["rev"] for repository in configuration["repos"]
    }
    assert hooks["ruff-check"].removeprefix("v") in allowed["ruff"]
    assert hooks["mypy"].removeprefix("v") in allowed["mypy"]


def test_the_public_names_are_listed_without_importing_torch():
    code = "import sys, lora; print(dir(lora)); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in (
        "inject",
        "merge",
        "save_adapter",
        "load_adapter",
        "verify_artifact",
        "Config",
        "get_lora_config",
    ):
        assert repr(name) in done.stdout
