"""A base without its last layers: what --score_layer reads, and what --check tries of a large one.

The norm after the last layer, where a family has one, stays: it comes after the last layer kept.
"""

from transformers import PreTrainedModel

from lora.common.errors import UserError
from lora.target_modules import decoder_layers

KEYS_BY_LAYER = ("layer_types", "mlp_layer_types")  # of config.json: lists with an item a layer


def keep_first_layers(model: PreTrainedModel, count: int) -> None:
    """Drop the layers above the first `count` from a model and its config, in place."""
    del decoder_layers(model)[count:]
    shape = model.config.get_text_config()
    shape.num_hidden_layers = count
    for key in KEYS_BY_LAYER:
        values = getattr(shape, key, None) or []
        if len(values) > count:  # Mamba derives its list from the number, and lets none be set
            setattr(shape, key, values[:count])


def cut_above(model: PreTrainedModel, score_layer: int) -> None:
    """Drop the layers that a head at `score_layer` (from 1) does not need. Raises UserError."""
    total = len(decoder_layers(model))
    where = f"score_layer = {score_layer}: {model.config.name_or_path}"
    if total != model.config.get_text_config().num_hidden_layers:
        problem = f"a {model.config.model_type} does not keep its layers in one list"
        raise UserError(f"{where}: {problem}; leave score_layer out.")
    if score_layer > total:
        raise UserError(f"{where} has {total} layers; expected a number from 1 to {total}.")
    keep_first_layers(model, score_layer)
    shape = model.config
    try:
        type(shape).from_dict(shape.to_dict())
    except Exception:  # of a family with other lists; libraries raise all kinds
        problem = f"a {shape.model_type} of fewer layers needs another configuration"
        raise UserError(f"{where}: {problem}; leave score_layer out.") from None
