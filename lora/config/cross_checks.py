"""Checks of keys that only make sense together: model and data, optional packages, the stage to
start from.
"""

from importlib.util import find_spec
from pathlib import Path

from lora.common.base_files import check_weight_files, locate_base
from lora.common.checksums import verify_checksums
from lora.common.errors import UserError
from lora.config.tables import saved_config


def require_packages(report_to):
    """That each of "tensorboard,wandb" is one of the two and there."""
    for name in filter(None, report_to.split(",")):
        if name not in ("tensorboard", "wandb"):
            raise UserError(
                f"report_to {name}: expected tensorboard, wandb, or both with a comma between them."
            )
        if find_spec(name) is None:
            raise UserError(
                f"report_to {name}: the package is not there: pip install 'plainlora[{name}]'."
            )


def require_model_and_data(config):
    for name in ("prm800k", "eqasc", "reveal"):
        if getattr(config.data, f"use_{name}") and not getattr(config.data, f"{name}_path"):
            raise UserError(f"use_{name}: no file is named; add --{name}_path FILE.")
    model, data = config.model.base_model, config.data.train_paths
    if model and not data:
        raise UserError(f"base_model {model} is named, but no data: add --train_data FILE.")
    if data and not model:
        raise UserError(
            f"train_data {data[0]} is named, but no model: add --base_model FOLDER (or 'embedded')."
        )
    if config.method == "head":
        if config.model.task == "lm":
            raise UserError(
                "lora_r = 0: nothing would be trained of a language model; give a rank, or add --task score."
            )
        tables = vars(config.lora) | vars(config.model)
        odd = [
            name
            for name in ("modules_to_save", "use_dora", "rank_pattern", "add_special_tokens")
            if tables[name]
        ]
        if odd:
            raise UserError(
                f"lora_r = 0: the score head alone is trained; leave {', '.join(odd)} out."
            )
    if config.lora and config.model.add_special_tokens and not config.lora.modules_to_save:
        raise UserError(
            "add_special_tokens: LoRA trains no embeddings; add --modules_to_save embed_tokens lm_head."
        )
    weights, paths = config.data.data_weights, config.data.train_data
    if weights and len(weights) != len(paths):
        raise UserError(
            f"data_weights has {len(weights)} numbers, train_data {len(paths)} paths; give one for each."
        )
    for name, part in (("prompt_format", "{prompt}"), ("step_format", "{step}")):
        if part not in getattr(config.data, name):
            raise UserError(f"{name} {getattr(config.data, name)!r}: expected {part} in it.")
    if "{marker}" in config.data.step_format and not config.data.step_marker:
        raise UserError(
            f"step_format {config.data.step_format!r} has a {{marker}}; add --step_marker TOKEN."
        )
    if not model:
        raise UserError(
            "neither a model nor training data is named: add --base_model FOLDER --train_data FILE."
        )
    source, local = locate_base(model)
    if local and config.model.init_from != "scratch":
        check_weight_files(source)


def require_stage(config):
    """That `init_from` names an earlier stage which this one can go on from."""
    model, start = config.model, Path(config.model.init_from)
    found = [
        name
        for name in ("lora_adapter", "backbone", "adapter_config.json", "shards.json")
        if (start / name).exists()
    ]
    if found and config.method == "head":
        raise UserError(
            f"init_from {start}: holds {found[0]}, and lora_r 0 begins from a head; name the merged base_model."
        )
    if not found and not (start / "mlp_head.safetensors").exists():
        raise UserError(
            f"init_from {start}: no checkpoint, artifact or adapter; a whole model is named as base_model."
        )
    verify_checksums(start)
    ours = any((start / name).is_file() for name in ("trainer_state.json", "training_config.toml"))
    tokens = saved_config(start).model.add_special_tokens if ours else []
    if model.add_special_tokens[: len(tokens)] != tokens:
        raise UserError(
            f"init_from {start}: it has tokens of its own; begin with --add_special_tokens {' '.join(tokens)}."
        )
