"""What `--check` works on: a task in fp32, a few rows of its data, and the comparisons that the
checks share.
"""

from dataclasses import replace
import itertools

import numpy as np
import torch
from torch import Tensor

from lora.common.errors import ResourceExhausted
from lora.config.schema import DataConfig
from lora.data.batches import Rows, is_target
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.data.tokenise import tokenise
from lora.layer import lora_layers
from lora.model.run import Run
from lora.quantization import is_4bit
from lora.target_modules import decoder_layers
from lora.training.base_integrity import frozen_sums
from lora.training.gradients import backward

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
SAMPLE = 200  # examples that are rendered again and looked at one by one
ROWS, TOKENS = 8, 1024  # that the equalities are measured on, at most
WORK = 25e9  # parameters times tokens: of a large model there are fewer tokens
BODY = 30_000_000  # parameters of the layers that are kept of a larger model
OUR_FAULT = "a fault of the program or of this model's code: do not train with it, report it"


class Trial:
    """What is checked: a task in fp32 (4-bit weights stay), on `device`, ready to be trained, and
    the data of its run.
    """

    def __init__(self, run: Run, raw_data: RawData, data_facts: dict) -> None:
        """`data_facts` is what `load_or_tokenise` returned."""
        task, config = run.task.float().to(run.device).eval(), run.config
        self.task, self.config, self.device = task, config, run.device
        self.rows = run.data.rows
        self.facts = data_facts
        self.examples = raw_data.examples()  # (training, held out)
        sample = self.examples[0][:SAMPLE]
        tokenised = tokenise(sample, task.tokenizer, config.model.task, config.data, task.causal)
        self.sample = list(zip(sample, tokenised))
        num_parameters = sum(p.numel() for p in task.parameters())
        self.few = few(self.rows, max(16, int(min(TOKENS, WORK / num_parameters))))
        self.batch = self.few.batch(range(len(self.few)), task.packed)
        self.run = Run(task, config, self.data_of_few_rows(), run.device, torch.float32)
        in_4bit = any(is_4bit(layer.base_layer) for layer in lora_layers(task.model).values())
        # Relative to the largest number: sums in fp32, in another order.
        self.tolerance = 0.05 if in_4bit else 1e-4
        self.frozen_sums = frozen_sums(task.model)

    def data_of_few_rows(
        self, max_tokens: int = 2**40, rank: int = 0, world_size: int = 1
    ) -> TrainingData:
        """Return data whose every step has the few rows, as one process of several reads it."""
        data = DataConfig(train_data=["the rows"], max_length=self.config.data.max_length)
        config = replace(self.config, data=data)
        layout = {"examples_per_step": len(self.few), "max_tokens": max_tokens}
        packed = self.task.packed
        return TrainingData(self.few, self.few, config, packed, rank, world_size, layout)

    def gradients(self, data: TrainingData | None = None) -> tuple[dict[str, Tensor | None], float]:
        """Return {trained tensor: its gradient or None} and the loss of a step."""
        run = self.run if data is None else replace(self.run, data=data)
        self.task.zero_grad(set_to_none=True)
        batches, num_targets = run.data.batch_at(0), run.data.num_targets_at(0)
        no_scaler = torch.amp.GradScaler(enabled=False)
        loss, out_of_memory = backward(run, batches, num_targets, 0, no_scaler)
        if out_of_memory:
            raise ResourceExhausted("out of memory in a check; add --device cpu.")
        gradients = {}
        for name, parameter in self.task.named_parameters():
            if parameter.requires_grad or parameter.grad is not None:
                gradients[name] = parameter.grad
        return gradients, loss.item()

    @torch.no_grad()
    def outputs(self, batch=None):
        """(hidden states at the targets [n, width], what the head says [n, ...]) of all rows, or of
        a micro-batch.
        """
        batch = (batch or self.batch).to(self.device)
        hidden = self.task.target_hidden_states(batch)
        return hidden.float(), self.task.head.predict(hidden, batch.targets).float()


def few(rows, tokens):
    """The shortest of the first rows, so many that they have at most so many tokens; two at least.

    Of a row with more than half of the tokens a part of so many, with its first target in the
    middle.
    """
    parts = []
    for i in range(min(len(rows), 4 * ROWS)):
        begin, end = rows.offsets[i : i + 2]
        if end - begin > tokens // 2:
            begin = max(
                begin, begin + np.flatnonzero(is_target(rows.targets[begin:end]))[0] - tokens // 4
            )
        parts.append((min(end - begin, tokens // 2), i, begin))
    parts.sort()
    total = np.cumsum([length for length, *_ in parts])
    parts = parts[: min(ROWS, max(2, int((total <= tokens).sum())))]
    lengths, chosen, _ = zip(*parts)
    at = np.concatenate([np.arange(begin, begin + length) for length, _, begin in parts])
    flat = rows.tokens[at], rows.targets[at], rows.token_type_ids[at]
    of_rows = rows.loss_weights[[*chosen]], np.zeros(len(parts), np.int16)
    return Rows(*flat, np.cumsum([0, *lengths]), *of_rows)


def keep_first_layers(task):
    """Keep so many of a large model's first layers that they have BODY parameters, two at least; a
    note, or "".
    """
    layers = decoder_layers(task.model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    kept = max(2, sum(size <= BODY for size in itertools.accumulate(sizes)))
    if kept >= len(sizes):
        return ""
    shape = task.model.config.get_text_config()
    del layers[kept:]
    shape.num_hidden_layers = kept
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(shape, key, None):
            setattr(shape, key, getattr(shape, key)[:kept])
    return f"the model is large: of its {len(sizes)} layers the first {kept} are checked"


def distance(ones, others):
    """The largest difference of two lists of tensors, each relative to the largest number of the
    second.
    """
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if b.numel()]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs)


def apart(ones, others):
    """The distance of two sets of gradients: the norm of the difference, relative to that of the
    second.
    """
    pairs = [
        (a, others[name]) for name, a in ones.items() if a is not None and others[name] is not None
    ]
    norms = [
        torch.stack([x.norm() for x in xs]).norm()
        for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    ]
    return (norms[0] / norms[1]).item()


def required(fine, found, mend, otherwise=FAIL):
    """PASS, or another verdict with how to mend it."""
    return (PASS, found) if fine else (otherwise, f"{found}; {mend}")


def judged(found, limit, what):
    """PASS where `found` is at most `limit`; a NaN is not."""
    return required(
        found <= limit, f"{what} {found:.2g}", f"expected at most {limit:g}; {OUR_FAULT}"
    )


def counted(count, of, found, mend):
    """WARN from the first of so many on, FAIL from half of them on."""
    return required(not count, found, mend, FAIL if 2 * count >= of else WARN)
