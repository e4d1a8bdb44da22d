"""The wheel in a fresh environment and an empty folder: the default run, and the real example."""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from transformers import AutoTokenizer

from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.paths import ROOT
from tests.conftest import tiny_llama

pytestmark = pytest.mark.slow

EXAMPLE_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOT_HERE = ("llama-server", "vllm serve")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment variables with which the shell finds the commands of a fresh installation."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    # The libraries are those of this environment. A .pth file in it, such as that of an editable
    # plainlora, is not followed.
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = f"{python.parent}{os.pathsep}{variables['PATH']}"
    return variables


def run_in(folder: Path, environment: dict[str, str], commands: str) -> str:
    shell = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_default_run_in_a_folder_with_another_train_py(environment, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('a foreign train.py')")
    run_in(tmp_path, environment, "plainlora train_lora --lora_r 16 --max_steps 5")
    (run,) = (tmp_path / "outputs").iterdir()
    assert (run / "final_artifact" / "metadata.json").is_file()
    # A configuration and a base of the package are found by their names.
    flags = "--config shakespeare_char.toml --train_data text.txt --max_steps 1 --eval_steps 1"
    shutil.copy(ROOT / "assets" / "samples" / "text.txt", tmp_path)
    shown = run_in(tmp_path, environment, f"plainlora train {flags}")
    assert "shakespeare_char.toml" in shown and "assets/char" in shown


def test_the_real_example_of_the_readme(environment, tmp_path):
    """Word for word, with few steps, and a tiny base in the place of the one that the Hub has."""
    base = tmp_path / EXAMPLE_BASE
    tiny_llama(tie_word_embeddings=True, max_position_embeddings=4096).save_pretrained(base)
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(base)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## A real example$(.*?)^## ", readme, re.M | re.S)
    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S))
    assert EXAMPLE_BASE in commands and "max_steps = 30" in commands
    commands = commands.replace("max_steps = 30", "max_steps = 4")
    for program in NOT_HERE:
        assert program in commands
        commands = commands.replace(program, "# not here:")
    run_in(tmp_path, environment, commands)
    assert (tmp_path / "merged" / "config.json").is_file()
    assert (tmp_path / "desk.gguf").is_file() and (tmp_path / "desk.Modelfile").is_file()
