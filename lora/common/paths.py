"""Where the scripts, the configurations and the embedded base lie."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# A wheel holds the scripts, configs/ and assets/ below lora/; a clone holds them beside it.
INSTALLED = (PACKAGE / "scripts").is_dir()
ROOT = PACKAGE if INSTALLED else PACKAGE.parent
SCRIPTS = PACKAGE / "scripts" if INSTALLED else PACKAGE.parent


def or_packaged(path: str, *folders: str) -> str:
    """Return `path`; or, if it does not exist, the packaged file of that name in ROOT/`folders`."""
    for folder in folders:
        packaged = ROOT / folder / path
        if path and not Path(path).exists() and packaged.exists():
            return str(packaged)
    return path


def script_call(script: str, processes: int = 1) -> list[str]:
    """Return the words that call a script in the current folder, without its flags."""
    torchrun = ["torchrun", f"--nproc_per_node={processes}"]
    if INSTALLED:
        call = ["plainlora", Path(script).stem]
        return [*torchrun, "--no-python", *call] if processes > 1 else call
    path = script if Path(script).is_file() else str(SCRIPTS / Path(script).name)
    return [*torchrun, path] if processes > 1 else ["python", path]
