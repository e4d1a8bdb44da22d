"""The tokens that end an answer."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora.common.errors import UserError
from lora.data.assistant_mask import chat_pieces
from lora.data.examples import Example
from lora.data.tokenise import encode


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: those of tokenizer, model and chat template."""
    stops = {tokenizer.eos_token_id}
    model_stops = model.generation_config.eos_token_id
    stops.update(model_stops if isinstance(model_stops, list) else [model_stops])
    if tokenizer.chat_template:
        stops.update(turn_end(tokenizer))
    return sorted(stops - {None})


def set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have generation by other programs end where ours does, once the model is saved."""
    if model.can_generate():
        model.generation_config.eos_token_id = stop_tokens(model, tokenizer) or None


def turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special token that a chat is trained to end an answer with, or nothing."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        pieces, _ = chat_pieces(Example("a chat of one turn", messages=chat), tokenizer)
    except UserError:  # the template refuses such a chat
        return set()
    targets = []
    for tokens, weights in encode(pieces, tokenizer):
        targets += [token for token, weight in zip(tokens, weights) if weight]
    token = tokenizer.added_tokens_decoder.get(targets[-1])
    return {targets[-1]} if token and token.special else set()
