"""Whether a model behaves as the task assumes, tried on two short documents."""

import torch

from lora.common.errors import UserError
from lora.data.batches import Rows
from lora.data.tokenise import Row
from lora.model.heads import LMHead


@torch.no_grad()
def find_incompatibility(task, dtype=None):
    """What this model does otherwise than the task assumes, measured on two short documents; None
    if all is well.

    A model whose attention does not go through transformers' AttentionInterface would let packed
    documents see each other and train all the same.
    """
    task.eval()
    # Of a frozen base, of what is trained, of 4 bits
    types = {weight.dtype for weight in task.model.parameters()}
    half = next(iter((types | {dtype}) & {torch.bfloat16, torch.float16}), None)
    # Of the largest output; with room to spare
    rounding = 0.05 if half or types - {torch.float32} else 1e-4
    vocabulary, device = task.model.get_input_embeddings().num_embeddings, task.model.device
    draws = torch.randint(vocabulary, (14,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = draws[:8], draws[8:]
    changed = [*first[:-1], (first[-1] + 1) % vocabulary]

    def hidden(*documents):
        rows = Rows.from_rows(
            ((Row(document, [0.0] * len(document)), 0) for document in documents), "score"
        )
        return task.target_hidden_states(
            rows.batch(range(len(documents)), task.packed).to(device)
        ).float()

    def differ(one, other, rounding=rounding):
        return bool((one - other).abs().max() > rounding * one.abs().max())

    try:
        # What is trained is fp32 beside a frozen half
        with torch.autocast(device.type, half, enabled=half is not None):
            alone = hidden(first)
            if differ(torch.cat([alone, hidden(second)]), hidden(first, second)):
                return "documents that are packed into one row see each other"
            # The same sums: equal in every type
            if differ(alone[:-1], hidden(changed)[:-1], 1e-6) == task.causal:
                return "whether a position sees later ones is not what its attention modules say"
            if isinstance(task.head, LMHead):
                logits = (
                    task.model(torch.tensor([first], device=device), use_cache=False)
                    .logits[0]
                    .float()
                )
                if differ(logits, task.head.logits(alone)):
                    return "its logits are not those of its output layer on the hidden states"
            task.train()
            hidden(first)  # some take another way in training
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        return f"a short forward pass ends in {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def refuse_incompatible_layers(task, target_modules):
    """Raise UserError where LoRA in these layers has no effect: some models read a layer's weight
    past the layer.
    """
    problem = find_incompatibility(task)
    if problem:
        names = " ".join(target_modules)
        raise UserError(f"target_modules {names}: with LoRA there {problem}; name other layers.")
