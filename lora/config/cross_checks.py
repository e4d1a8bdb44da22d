"""Checks of keys that only make sense together. Every function raises UserError."""

from importlib.util import find_spec

from lora.common.base_model_files import check_weight_files, locate_base
from lora.common.errors import UserError
from lora.config.schema import Config, DataConfig
from lora.config.set_keys import key_values


def require_packages(report_to: list[str]) -> None:
    """Check that the package of each name is installed."""
    for name in report_to:
        if find_spec(name) is None:
            problem = "the package is not there"
            raise UserError(f"report_to {name}: {problem}: pip install 'plainlora[{name}]'.")


def require_model_and_data(config: Config) -> None:
    """Check that a model and training data are named, and that they fit the other keys."""
    model, data = config.model.base_model, config.data
    for name in ("prm800k", "eqasc", "reveal"):
        if getattr(data, f"use_{name}") and not getattr(data, f"{name}_path"):
            raise UserError(f"use_{name}: no file is named; add --{name}_path FILE.")
    if model and not data.train_paths:
        raise UserError(f"base_model {model} is named, but no data: add --train_data FILE.")
    if data.train_paths and not model:
        missing = "is named, but no model: add --base_model FOLDER (or 'embedded')"
        raise UserError(f"train_data {data.train_paths[0]} {missing}.")
    if config.model.task == "lm" and config.model.score_layer:
        found = "a language model is read at its last layer"
        raise UserError(f"score_layer: {found}; leave it out, or add --task score.")
    if config.method == "head":
        require_head_only(config)
    training = config.training
    if training.offload_activations and training.gradient_checkpointing is not True:
        moved = "it moves the inputs of checkpointed layers"
        raise UserError(f"offload_activations: {moved}; add --gradient_checkpointing.")
    if config.lora and config.model.add_special_tokens and not config.lora.modules_to_save:
        hint = "LoRA trains no embeddings; add --modules_to_save embed_tokens"
        if config.model.task == "lm":
            hint += " lm_head"
        raise UserError(f"add_special_tokens: {hint}.")
    require_formats(data)
    if not model:
        named = "neither a model nor training data is named"
        raise UserError(f"{named}: add --base_model FOLDER --train_data FILE.")
    source, is_folder = locate_base(model)
    if is_folder and config.model.init_from != "scratch":
        check_weight_files(source)


def require_head_only(config: Config) -> None:
    """Check that lora_r = 0, which trains the score head alone, asks for nothing else."""
    if config.model.task == "lm":
        hint = "give a rank, or add --task score"
        raise UserError(f"lora_r = 0: nothing would be trained of a language model; {hint}.")
    values = key_values(config)
    trains_more = ("modules_to_save", "use_dora", "rank_pattern", "add_special_tokens")
    given = [name for name in trains_more if values[name]]
    if given:
        hint = f"leave {', '.join(given)} out"
        raise UserError(f"lora_r = 0: the score head alone is trained; {hint}.")


def require_formats(data: DataConfig) -> None:
    """Check the number of data_weights, and the placeholders of prompt_format and step_format."""
    weights, files = len(data.data_weights), len(data.train_data)
    if weights and weights != files:
        counts = f"{weights} numbers, train_data {files} paths"
        raise UserError(f"data_weights has {counts}; give one for each.")
    for name, placeholder in (("prompt_format", "{prompt}"), ("step_format", "{step}")):
        value = getattr(data, name)
        if "\\n" in value:
            line_break = "for a line break write $'...\\n' in a shell, and \"...\\n\" in TOML"
            raise UserError(f"{name} {value!r}: a backslash and an n; {line_break}.")
        if placeholder not in value:
            raise UserError(f"{name} {value!r}: expected {placeholder} in it.")
    _, _, after_marker = data.step_format.partition("{marker}")
    for place in ("{step}", "{number}", "{marker}"):
        if place in after_marker:
            problem = f"{place} behind the first {{marker}}, where the score is read"
            raise UserError(f"step_format {data.step_format!r}: {problem}; write it before.")
    if "{marker}" in data.step_format and not data.step_marker:
        hint = "has a {marker}; add --step_marker TOKEN"
        raise UserError(f"step_format {data.step_format!r} {hint}.")
