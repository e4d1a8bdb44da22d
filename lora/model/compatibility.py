"""Whether a model behaves as the task assumes, tried on two short documents."""

import torch
from torch import Tensor
import torch.nn.functional as F

from lora.common.errors import UserError, is_out_of_memory
from lora.data.batches import Rows
from lora.data.tokenise import Row
from lora.model.device import autocast
from lora.model.heads import LMHead
from lora.model.task import Task
from lora.target_modules import stacked_weights


@torch.no_grad()
def find_incompatibility(task: Task, dtype: torch.dtype | None = None) -> str | None:
    """Return which assumption of the task the model violates, or None.

    A model whose attention does not go through transformers' AttentionInterface would let packed
    documents see each other, and would train all the same. `dtype` is that of the computation, if
    it is another one than that of the weights. A task that violates none is left in training mode.
    """
    task.eval()
    # A frozen base may be in 16 bits, the trained weights in fp32, and quantised ones in 4 bits.
    dtypes = {weight.dtype for weight in task.model.parameters()} | {dtype or torch.float32}
    compute_dtype = torch.float32
    for half in (torch.float16, torch.bfloat16):
        if half in dtypes:
            compute_dtype = half
    # With room to spare for rounding.
    tolerance = 1e-4 if dtypes == {torch.float32} else 0.05
    vocabulary = task.model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (14,), generator=generator).tolist()
    first, second = tokens[:8], tokens[8:]
    changed = [*first[:-1], (first[-1] + 1) % vocabulary]
    try:
        # Autocast, because trained fp32 weights meet frozen 16-bit ones.
        with autocast(task.model.device, compute_dtype):
            problem = violated_assumption(task, first, second, changed, tolerance)
            if not problem:
                task.train()
                hidden_states(task, first)  # some models compute differently in training
            return problem
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):  # which says nothing about the model
            raise
        message = " ".join(str(error).split())[:200]
        return f"a short forward pass ends in {type(error).__name__}: {message}"


def violated_assumption(
    task: Task, first: list[int], second: list[int], changed: list[int], tolerance: float
) -> str | None:
    """Return what is wrong with the hidden states or logits of short documents, or None.

    `changed` differs from `first` in its last token. `tolerance` is relative to the largest output.
    """
    alone = hidden_states(task, first)
    separate = torch.cat([alone, hidden_states(task, second)])
    if differ(separate, hidden_states(task, first, second), tolerance):
        if not task.packed:
            return "padding changes its hidden states"
        return "documents that are packed into one row see each other"
    # The same sums give the same bits in every dtype. Experts are the exception: the last token may
    # go to another expert, which changes the order of the others' sums.
    rounding = tolerance if stacked_weights(task.model) else 1e-6
    sees_later = differ(alone[:-1], hidden_states(task, changed)[:-1], rounding)
    if sees_later == task.causal:
        return "whether a position sees later ones is not what its attention modules say"
    if isinstance(task.head, LMHead):
        input_ids = torch.tensor([first], device=task.model.device)
        logits = task.model(input_ids, use_cache=False).logits[0].float()
        # As in training, which does not call the output layer; some do more than a product.
        products = F.linear(alone, *task.head.weight_and_bias()).float()
        if differ(logits, task.head.scale_and_cap(products), tolerance):
            return "its logits are not its hidden states times the weight of its output layer"
    return None


def hidden_states(task: Task, *documents: list[int]) -> Tensor:
    """Return the hidden states at all positions of documents in one micro-batch, in fp32."""
    rows = [(Row(tokens, [0.0] * len(tokens)), 0) for tokens in documents]
    batch = Rows.from_rows(rows, "score").batch(range(len(rows)), task.packed)
    return task.target_hidden_states(batch.to(task.model.device)).float()


def differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether a and b differ by more than `tolerance` times the largest value of a."""
    return not bool((a - b).abs().max() <= tolerance * a.abs().max())  # NaN differs


def refuse_incompatible_layers(task: Task, target_modules: list[str]) -> None:
    """Raise UserError if the model fails with LoRA, as one that reads a layer's weight itself."""
    problem = find_incompatibility(task)
    if problem:
        names = " ".join(target_modules)
        where = f"target_modules {names}: with LoRA on these layers"
        raise UserError(f"{where} {problem}; name other layers.")
