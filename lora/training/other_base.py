"""Whether weights are put on the base that they were trained on: for eval, merge and init_from."""

from pathlib import Path

from lora.common.checkpoint_folders import model_folder
from lora.common.toml_json import read_file


def warn_other_base(folder: str | Path, base_model: str, files: dict[str, str]) -> str:
    """Return a warning if the weights in `folder` were trained on another base, "" if not.

    Only what plainlora has written records the weight files of its base, and only an adapter or a
    head needs one. `files` are those of `base_model`, with their sha256.
    """
    folder = Path(folder).resolve()
    checkpoint = folder.parent if folder.name == "lora_adapter" else folder
    if model_folder(checkpoint):
        return ""
    recorded = None
    if (checkpoint / "metadata.json").is_file():
        recorded = read_file(checkpoint / "metadata.json").get("base_files")
    elif (checkpoint / "trainer_state.json").is_file():
        recorded = read_file(checkpoint / "trainer_state.json").get("facts", {}).get("base_model")
    if recorded and recorded != files:
        return f"warning: {base_model} does not hold the weights that {folder} was trained on"
    return ""
