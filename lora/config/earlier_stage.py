"""The check of init_from, imported where a run begins with the weights of an earlier stage."""

from pathlib import Path

from lora.common.checkpoint_folders import SHARDS_FILE, adapter_folder, is_artifact, model_folder
from lora.common.checksums import verify_checksums
from lora.common.errors import UserError
from lora.common.plain_file import plain_file
from lora.common.printable_text import print_on_rank_zero
from lora.common.toml_json import read_file, toml_value
from lora.config.schema import QUANTIZATION_KEYS, Config, DataConfig, LoraConfig
from lora.config.set_keys import saved_config


def require_stage(config: Config) -> None:
    """Check that `init_from` names an earlier stage that this run can start from."""
    start = Path(config.model.init_from)
    if start.name == "lora_adapter" and (start.parent / "mlp_head.safetensors").is_file():
        whole = f"a part of {start.parent}"
        raise UserError(f"init_from {start}: {whole}, which holds a head as well; name that.")
    adapter = adapter_folder(start)
    weights = adapter or model_folder(start)
    if weights and config.method == "head":
        problem = "holds more than a head, and lora_r 0 begins from a head"
        raise UserError(f"init_from {start}: {problem}; name the merged base_model.")
    others = (start / "mlp_head.safetensors", start / SHARDS_FILE)
    if not weights and not any(path.exists() for path in others):
        expected = "a whole model is named as base_model"
        raise UserError(f"init_from {start}: no checkpoint, artifact or adapter; {expected}.")
    if is_artifact(start) or not (start / "metadata.json").is_file():  # not others' checksums
        verify_checksums(start)
    has_head = (start / "mlp_head.safetensors").is_file()
    if has_head and config.model.task == "score" and config.model.head_tokens:
        raise UserError(f"init_from {start}: it brings its score head; leave --head_tokens out.")
    if adapter and config.lora:
        require_same_shape(start, adapter, config.lora)
    state = start / "trainer_state.json"  # Hugging Face's Trainer writes another one
    is_our_state = state.is_file() and "config" in read_file(plain_file(state))
    if not is_our_state and not (start / "training_config.toml").is_file():
        return  # an adapter of PEFT's
    before = saved_config(start)
    if adapter and before.lora and config.lora:
        print_other_quantization(start, before.lora, config.lora)
    if has_head and config.model.task == "score":
        require_same_layout(start, before.data, config.data)
    saved = before.model
    if saved.score_layer != config.model.score_layer:
        found = "it was trained with all layers; leave --score_layer out, or merge it first"
        if saved.score_layer:
            flag = f"--score_layer {saved.score_layer}"
            found = f"it was trained with {flag}; add that"
        raise UserError(f"init_from {start}: {found}.")
    tokens = saved.add_special_tokens
    if config.model.add_special_tokens[: len(tokens)] != tokens:
        hint = f"begin with --add_special_tokens {' '.join(tokens)}"
        raise UserError(f"init_from {start}: it has tokens of its own; {hint}.")


def print_other_quantization(start: Path, saved: LoraConfig, lora: LoraConfig) -> None:
    """Print a note if an adapter is continued on a base that is quantised otherwise."""
    keys = ["load_in_4bit"]
    if saved.load_in_4bit and lora.load_in_4bit:
        keys += QUANTIZATION_KEYS
    changed = [key for key in keys if getattr(saved, key) != getattr(lora, key)]
    if changed:
        flags = " ".join(f"--{key} {str(getattr(saved, key)).lower()}" for key in changed)
        goes_on = "on a base quantised differently its losses differ"
        print_on_rank_zero(f"note: init_from {start}: it was trained with {flags}; {goes_on}")


def require_same_layout(start: Path, saved: DataConfig, data: DataConfig) -> None:
    """Raise UserError where a scorer's chains were written otherwise than they would be here."""
    keys = []
    for key in ("prompt_format", "step_format", "step_marker"):
        value = getattr(saved, key)
        if value != getattr(data, key):
            keys.append(f"{key} = {toml_value(value)}")
    if keys:
        found = f"it was trained with {', '.join(keys)}"
        mend = "set the same; to change it, name the merged scorer as base_model"
        raise UserError(f"init_from {start}: {found}; {mend}.")


def require_same_shape(start: Path, adapter: Path, lora: LoraConfig) -> None:
    """Raise UserError with the flags of an adapter that was made with others than these."""
    saved = read_file(plain_file(adapter / "adapter_config.json"))
    patterns = (saved.get("rank_pattern"), saved.get("alpha_pattern"))
    if any(patterns) or lora.rank_pattern or lora.alpha_pattern:
        return  # where ranks differ, the adapter's r is only the most common one
    flags = []
    for key in ("lora_r", "lora_alpha", "use_rslora", "use_dora"):
        value = saved.get("r" if key == "lora_r" else key, False)
        if value != getattr(lora, key):
            flags.append(f"--{key} {str(value).lower()}")
    if flags:
        raise UserError(f"init_from {start}: made with other settings; add {' '.join(flags)}.")
