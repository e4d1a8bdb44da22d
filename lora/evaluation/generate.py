"""What a model returns outside training: answers to prompts, scores of steps, embeddings of texts.

The "packed" attention has no cache of keys and values, so generation is `model.generate` of
transformers on a batch that is padded on the left: every prompt ends where its answer begins.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
import math
import sys

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora.common.errors import UserError
from lora.config.schema import Config, max_batch_tokens
from lora.data.batches import Rows
from lora.data.chat_template import Chat, bos_tokens, use_chatml
from lora.data.examples import Example
from lora.data.tokenise import Row, encode, tokenise
from lora.evaluation.predict import predict
from lora.evaluation.stop_tokens import stop_tokens
from lora.model.device import autocast
from lora.model.task import Task

PAD = 0  # any token will do, because it is masked
Prompt = tuple[str, list[int]]  # (file:line for messages, tokens)
THINK, THINK_END = "<think>", "</think>"  # around reasoning
HEADER_END = "<|message|>"  # of gpt-oss's channels


def prompt_tokens(
    where: str, messages: list[dict], tools: list[dict] | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the tokens of a chat up to where the assistant's answer begins. Raises UserError."""
    use_chatml(tokenizer)
    chat = Chat(where, messages, tools, tokenizer)
    prompt = chat.render(chat.messages, add_generation_prompt=True)
    tokens = []
    for piece_tokens, _ in encode(chat.split(prompt, []), tokenizer):
        tokens += piece_tokens
    return tokens


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text that is to be continued."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return bos_tokens(tokenizer) + tokens


@contextmanager
def generation_mode(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Make `model` ready to generate according to `settings` alone, and restore it afterwards.

    The model's own generation_config may hold penalties and sampling that were not requested.
    """
    training = model.training
    attention = model.config._attn_implementation
    generation_config = model.generation_config
    model.eval()
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    model.generation_config = settings
    try:
        yield
    finally:
        model.train(training)
        model.set_attn_implementation(attention)
        model.generation_config = generation_config


def group_prompts(
    prompts: Sequence[Prompt], max_new_tokens: int, max_positions: int | None, max_tokens: int
) -> list[tuple[int, list[int]]]:
    """Group prompts into batches of at most `max_tokens` positions, the longest prompts first.

    All prompts of a batch may have the same number of new tokens, so that an answer does not depend
    on the other prompts of its batch. `max_positions` is the model's limit; None: no limit. Raises
    UserError for a prompt that is empty, or leaves no position for an answer.

    Returns:
        For each batch the number of new tokens and the indices of its prompts, at least one.
    """
    groups, width = [], 0
    for i in sorted(range(len(prompts)), key=lambda index: -len(prompts[index][1])):
        where, tokens = prompts[i]
        new_tokens, expected = max_new_tokens, "1 at least"
        if max_positions:
            new_tokens = min(max_new_tokens, max_positions - len(tokens))
            expected = f"1 to {max_positions - 1}"
        if not tokens or new_tokens < 1:
            length = f"a prompt of {len(tokens)} tokens"
            raise UserError(f"{where}: {length}; this model takes {expected}.")
        same_length = bool(groups) and groups[-1][0] == new_tokens
        if same_length and (len(groups[-1][1]) + 1) * width <= max_tokens:
            groups[-1][1].append(i)
        else:
            groups.append((new_tokens, [i]))
            width = len(tokens) + new_tokens
    return groups


@torch.no_grad()
def generate_answers(
    task: Task, prompts: Sequence[Prompt], config: Config, dtype: torch.dtype
) -> list[str]:
    """Return the texts with which the model answers prompts, in their order.

    An answer ends before the first of the `stop_tokens`, after max_new_tokens, or where the model
    has no more positions; a note counts those that were cut. Above temperature 0 the same seed and
    batches give the same answers.
    """
    model, tokenizer = task.model, task.tokenizer
    max_new_tokens, temperature = config.evaluation.max_new_tokens, config.evaluation.temperature
    top_p = config.evaluation.top_p
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    stops = stop_tokens(model, tokenizer)
    settings = GenerationConfig(eos_token_id=stops or None, pad_token_id=PAD)
    if temperature:
        settings.update(do_sample=True, temperature=temperature, top_k=0, top_p=top_p)
        torch.manual_seed(config.training.seed)
    max_tokens = max_batch_tokens(config)
    if model.config.model_type == "deepseek_v4":  # it reads the padding, so each prompt is alone
        max_tokens = 1
    groups = group_prompts(prompts, max_new_tokens, max_positions, max_tokens)
    texts = [""] * len(prompts)
    ends, num_cut = reasoning_ends(tokenizer), 0
    progress = tqdm(total=len(prompts), unit="answer", disable=None)
    with generation_mode(model, settings), autocast(model.device, dtype):
        for new_tokens, indices in groups:
            tokens, mask = pad_left([prompts[i][1] for i in indices], model.device)
            settings.max_new_tokens = new_tokens
            generated = model.generate(input_ids=tokens, attention_mask=mask)
            for i, answer in zip(indices, generated[:, tokens.shape[1] :].tolist()):
                spoken = before_stop(answer, stops)
                num_cut += len(spoken) == len(answer)
                texts[i] = answer_text(prompts[i][1], spoken, tokenizer, ends)
            progress.update(len(indices))
    progress.close()
    if num_cut:
        cut = f"cut at {max_new_tokens} tokens or the model's limit, before they came to their end"
        print(f"note: {num_cut} of {len(texts)} answers were {cut}", file=sys.stderr)
    return texts


def reasoning_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end reasoning or a header, and that decoding would leave out."""
    ends = []
    for i, token in tokenizer.added_tokens_decoder.items():
        is_special_mark = token.special and token.content == THINK_END
        if is_special_mark or token.content == HEADER_END:
            ends.append(i)
    return ends


def answer_text(
    prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> str:
    """Return the text of an answer, after the last of the `reasoning_ends`.

    It begins with <think> if the answer was cut within the reasoning.
    """
    marked = tokenizer.decode(answer)  # with the special tokens
    header, _, _ = marked.rpartition(HEADER_END)
    is_reasoning = header.endswith("<|channel|>analysis")
    # Some templates write the first mark, perhaps with a line break, into the prompt.
    begins = tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK)
    if (begins or marked.lstrip().startswith(THINK)) and THINK_END not in marked:
        is_reasoning = True
    for end in ends:
        answer = after_header(answer, end)
    text = plain_text(answer, tokenizer)
    if is_reasoning and not text.lstrip().startswith(THINK):
        text = THINK + text
    return text


def plain_text(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens and their mask, both [prompts, longest]."""
    rows = [torch.tensor(tokens, dtype=torch.long, device=device) for tokens in prompts]
    masks = [torch.ones_like(row) for row in rows]
    options = {"batch_first": True, "padding_side": "left"}
    return pad_sequence(rows, padding_value=PAD, **options), pad_sequence(masks, **options)


def before_stop(tokens: list[int], stops: list[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[:i]
    return tokens


def after_header(tokens: list[int], header_end: int) -> list[int]:
    """Return what follows the last end of a header or of reasoning; all tokens without one."""
    if header_end not in tokens:
        return tokens
    last = len(tokens) - 1 - tokens[::-1].index(header_end)
    return tokens[last + 1 :]


def step_scores(
    examples: Sequence[Example], task: Task, config: Config, dtype: torch.dtype
) -> list[np.ndarray]:
    """Return a scorer's scores for the steps of each example, [steps].

    The scores are NaN from the first step on that does not fit into max_length.
    """
    # With a label at every step, every step that fits becomes a target. The targets of an example
    # are in the order of its steps, in one row (causal model) or in a row for each step (encoder).
    all_labelled = [replace(e, labels=[0.0] * len(e.steps)) for e in examples]
    tokenised = tokenise(all_labelled, task.tokenizer, "score", config.data, task.causal)
    pairs, steps_of_rows = [], []  # the steps are numbered through all examples
    num_steps = 0
    for example, fitting in zip(examples, tokenised):
        next_step = num_steps
        for row in fitting.rows:
            num_targets = sum(not math.isnan(target) for target in row.targets)
            pairs.append((row, 0))
            steps_of_rows.append(np.arange(next_step, next_step + num_targets))
            next_step += num_targets
        num_steps += len(example.steps)
    scores = np.full(num_steps, math.nan)
    if pairs:
        rows = Rows.from_rows(pairs, "score")
        batches = rows.batches(range(len(rows)), max_batch_tokens(config), task.packed)
        predictions = predict(task, batches, task.model.device, dtype).values.numpy()
        if np.isnan(predictions).any():
            raise UserError(f"scores are not finite in {dtype}; add --dtype float32.")
        order = np.concatenate([batch.rows for batch in batches])
        scores[np.concatenate([steps_of_rows[row] for row in order])] = predictions
    ends = np.cumsum([len(example.steps) for example in examples])
    return np.split(scores, ends[:-1])


@torch.no_grad()
def embed(task: Task, texts: list[str], config: Config, dtype: torch.dtype) -> np.ndarray:
    """Return an embedding of each text, [texts, width], fp32, of length 1. Raises UserError.

    It is the mean of the backbone's hidden states over the first `max_length` tokens.
    """
    max_length = config.data.max_length
    tokens = task.tokenizer(texts, truncation=True, max_length=max_length, verbose=False).input_ids
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    # Every token is a target, so that the task returns the hidden state at every position.
    pairs = [(Row(tokens[i], [0.0] * len(tokens[i])), 0) for i in order]
    rows = Rows.from_rows(pairs, "score")
    batches = rows.batches(range(len(rows)), max_batch_tokens(config), task.packed)
    task.eval()
    means = []
    with autocast(task.model.device, dtype):
        for batch in tqdm(batches, unit="batch", disable=None):
            hidden = task.target_hidden_states(batch.to(task.model.device)).float()
            means += [part.mean(0).cpu() for part in hidden.split(batch.seq_lens)]
    embeddings = torch.empty(len(texts), len(means[0]))
    embeddings[order] = normalize(torch.stack(means))
    if not embeddings.isfinite().all():
        raise UserError(f"embeddings are not finite in {dtype}; add --dtype float32.")
    return embeddings.numpy()
