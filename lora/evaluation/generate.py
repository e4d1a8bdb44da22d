"""What a model says: answers to many prompts, scores of the steps of many chains, embeddings of
many texts.

Generation needs a cache of keys and values, which the "packed" attention does not know, so it is
the one place where the model runs as its authors wrote it: `model.generate` of transformers on a
padded batch. A causal model reads from the left, so the padding stands on the left and every prompt
ends where its answer begins.
"""

from contextlib import contextmanager
from dataclasses import replace
import math

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from lora.common.errors import UserError
from lora.config.schema import max_batch_tokens
from lora.data.batches import Rows
from lora.data.chat_template import chat_pieces, prompt_pieces, use_chatml
from lora.data.tokenise import Row, encode, first_token, tokenise
from lora.model.device import autocast

PAD = 0  # any token will do: it is masked


def prompt_tokens(where, messages, tools, tokenizer):
    """The chat up to where the assistant is to speak, as tokens. Raises UserError where the
    template refuses it.
    """
    use_chatml(tokenizer)
    pieces = prompt_pieces(where, messages, tools, tokenizer)
    return [token for tokens, _ in encode(pieces, tokenizer) for token in tokens]


def text_tokens(text, tokenizer):
    """A text that is to be continued, as tokens."""
    return (
        first_token(tokenizer) + tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    )


def stop_tokens(model, tokenizer):
    """The tokens that end an answer: the end tokens of tokenizer and model, and what the template
    ends a turn with.
    """
    of_model = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {
        None
    }
    if tokenizer.chat_template:
        stops |= turn_end(tokenizer)
    return sorted(stops)


def turn_end(tokenizer):
    """{the special token that a chat is trained to end an answer with}, or the empty set."""
    say = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        encoded = encode(chat_pieces("a chat of one turn", say, None, tokenizer), tokenizer)
    except UserError:  # the template refuses such a chat
        return set()
    last = [token for tokens, asked in encoded for token, flag in zip(tokens, asked) if flag][-1]
    token = tokenizer.added_tokens_decoder.get(last)
    return {last} if token and token.special else set()


@contextmanager
def generating(model, settings):
    """`model` ready to generate as `settings` say and nothing else, and afterwards as it was.

    The model's own generation_config is set aside: it may hold penalties and sampling that nobody
    asked for here.
    """
    before = model.training, model.config._attn_implementation, model.generation_config
    model.eval()
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    model.generation_config = settings
    try:
        yield
    finally:
        model.train(before[0])
        model.set_attn_implementation(before[1])
        model.generation_config = before[2]


def batches(prompts, max_new_tokens, longest, max_tokens):
    """[(room for an answer, indices of the prompts)]: at most `max_tokens` positions each, long
    prompts first.

    Prompts that share a batch have the same room, so what is said to one does not depend on the
    others.
    """
    groups, width = [], 0
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i][1])):
        where, tokens = prompts[i]
        room = min(max_new_tokens, longest - len(tokens)) if longest else max_new_tokens
        if not tokens or room < 1:
            expected = f"1 to {longest - 1}" if longest else "1 at least"
            raise UserError(
                f"{where}: a prompt of {len(tokens)} tokens; this model takes {expected}."
            )
        if not groups or groups[-1][0] != room or (len(groups[-1][1]) + 1) * width > max_tokens:
            groups.append((room, []))
            width = len(tokens) + room
        groups[-1][1].append(i)
    return groups


@torch.no_grad()
def answers(task, prompts, config, dtype):
    """The texts that the model says after `prompts`, a list of (where, tokens), in their order.
    Raises UserError.

    An answer ends before the first of the `stop_tokens`, after max_new_tokens, or where the model
    has no more positions. At temperature 0 each token is the likeliest; above it is drawn, the same
    for the same seed and batches. A batch holds as many positions as in training (and one prompt at
    least).
    """
    model, tokenizer, asked = task.model, task.tokenizer, config.evaluation
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    texts, stop = [""] * len(prompts), stop_tokens(model, tokenizer)
    settings = GenerationConfig(eos_token_id=stop or None, pad_token_id=PAD)
    if asked.temperature:
        settings.update(do_sample=True, temperature=asked.temperature, top_k=0)
        torch.manual_seed(config.training.seed)
    groups = batches(prompts, asked.max_new_tokens, longest, max_batch_tokens(config))
    bar = tqdm(total=len(prompts), unit="answer", disable=None)
    with generating(model, settings), autocast(model.device, dtype):
        for room, indices in groups:
            rows = [prompts[i][1] for i in indices]
            width = max(map(len, rows))
            tokens = torch.tensor(
                [[PAD] * (width - len(row)) + row for row in rows], device=model.device
            )
            mask = torch.tensor(
                [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device
            )
            settings.max_new_tokens = room
            said = model.generate(input_ids=tokens, attention_mask=mask)[:, width:].tolist()
            for i, answer in zip(indices, said):
                end = next(
                    (place for place, token in enumerate(answer) if token in stop), len(answer)
                )
                texts[i] = tokenizer.decode(
                    answer[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            bar.update(len(indices))
    bar.close()
    return texts


@torch.no_grad()
def step_scores(examples, task, config, dtype):
    """An array [steps] for each example: what a scorer says of its steps, NaN from the first on
    that does not fit.
    """
    ends = np.cumsum([len(example.steps) for example in examples])
    numbers = np.split(np.arange(ends[-1], dtype=np.float32), ends[:-1])  # exact up to 2^24
    # Of each step its number
    asked = [replace(example, labels=of.tolist()) for example, of in zip(examples, numbers)]
    rendered = tokenise(asked, task.tokenizer, "score", config.data, task.causal)
    rows = Rows.from_rows(((row, 0) for of in rendered for row in of.rows), "score")
    batches = (
        rows.batches(range(len(rows)), max_batch_tokens(config), task.packed) if len(rows) else []
    )
    scores = np.full(ends[-1], math.nan)
    task.eval()
    with autocast(task.model.device, dtype):
        for batch in tqdm(batches, unit="batch", disable=None):
            scores[batch.targets.long().numpy()] = (
                task.predict(batch.to(task.model.device)).float().cpu().numpy()
            )
    return np.split(scores, ends[:-1])


@torch.no_grad()
def embed(task, texts, config, dtype):
    """[n, width], fp32, of length 1: the mean of the backbone's hidden states over a text's first
    `max_length` tokens.
    """
    tokens = task.tokenizer(
        texts, truncation=True, max_length=config.data.max_length, verbose=False
    ).input_ids
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    # With every token a target
    rows = Rows.from_rows(((Row(tokens[i], [0.0] * len(tokens[i])), 0) for i in order), "score")
    task.eval()
    means, batches = [], rows.batches(range(len(rows)), max_batch_tokens(config), task.packed)
    with autocast(task.model.device, dtype):
        for batch in tqdm(batches, unit="batch", disable=None):
            hidden = task.target_hidden_states(batch.to(task.model.device)).float()
            means += [part.mean(0).cpu() for part in hidden.split(batch.seq_lens)]
    embeddings = torch.empty(len(texts), len(means[0]))
    embeddings[order] = torch.nn.functional.normalize(torch.stack(means))
    return embeddings.numpy()
