"""What `--check` works on: a task in fp32, and a few rows of its data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lora.common.errors import ResourceExhausted
from lora.config.schema import DataConfig
from lora.data.batches import Batch, Rows, is_target
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.data.tokenise import tokenise
from lora.layer import lora_layers
from lora.model.first_layers import keep_first_layers
from lora.model.run import Run
from lora.model.task import Task
from lora.preflight.check_result import BUG, FAIL, Result, require_at_most
from lora.quantization import is_4bit
from lora.target_modules import decoder_layers
from lora.training.base_integrity import frozen_sums
from lora.training.gradients import backward

MAX_EXAMPLES = 200  # that are tokenised again and looked at one by one
MAX_ROWS = 8  # on which the equalities are measured
MAX_TOKENS = 1024  # of these rows together
MAX_WORK = 25e9  # parameters times tokens: a large model is measured on fewer tokens
MAX_PARAMETERS = 30_000_000  # of the layers that are kept of a larger model
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Step:
    """The gradients and the loss of a training step."""

    gradients: dict[str, Tensor]  # of each tensor that gets one
    loss: float


class Trial:
    """A task in fp32 (4-bit weights stay in 4 bits) on its device, ready to be trained."""

    def __init__(self, run: Run, raw_data: RawData, data_facts: dict) -> None:
        task, config = run.task.float().to(run.device).eval(), run.config
        self.task, self.config, self.device = task, config, run.device
        self.rows = run.data.rows
        self.facts = data_facts  # as `load_or_tokenise` returned them
        self.split = raw_data.split_data()
        examples = list(islice(self.split.examples(held_out=False), MAX_EXAMPLES))
        tokenised = tokenise(examples, task.tokenizer, config.model.task, config.data, task.causal)
        self.tokenised_examples = list(zip(examples, tokenised))

        num_parameters = sum(p.numel() for p in task.parameters())
        max_tokens = max(16, int(min(MAX_TOKENS, MAX_WORK / num_parameters)))
        self.sample = sample_rows(run.data.rows, max_tokens)
        self.batch = self.sample.batch(range(len(self.sample)), task.packed)
        self.run = Run(task, config, self.data(), run.device, torch.float32)

        # Relative to the largest number. In fp32 the order of a sum changes it by less than 1e-4.
        in_4bit = any(is_4bit(layer.base_layer) for layer in lora_layers(task.model).values())
        self.tolerance = 0.05 if in_4bit else 1e-4
        # On a GPU, sums have no fixed order, and the same computation gives other bits.
        self.repetition_tolerance = 0.0 if run.device.type == "cpu" else self.tolerance
        if in_4bit:
            self.outputs()  # bitsandbytes changes the dtype of biases in the first forward pass
        self.frozen_sums = frozen_sums(task.model)

    def data(self, max_tokens: int = 2**40, rank: int = 0, world_size: int = 1) -> TrainingData:
        """Return data whose every step has all rows of the sample, as one process reads it."""
        data_config = DataConfig(train_data=["sample"], max_length=self.config.data.max_length)
        config = replace(self.config, data=data_config)
        layout = {"examples_per_step": len(self.sample), "max_tokens": max_tokens}
        packed = self.task.packed
        return TrainingData(self.sample, self.sample, config, packed, rank, world_size, layout)

    def step(self, data: TrainingData | None = None) -> Step:
        """Compute a training step on the sample, without an update."""
        run = self.run if data is None else replace(self.run, data=data)
        self.task.zero_grad(set_to_none=True)
        batches, num_targets = run.data.batch_at(0), run.data.num_targets_at(0)
        no_scaler = torch.amp.GradScaler(enabled=False)
        loss, out_of_memory = backward(run, batches, num_targets, 0, no_scaler)
        if out_of_memory:
            raise ResourceExhausted("out of memory in a check; add --device cpu.")
        named_parameters = self.task.named_parameters()
        gradients = {name: p.grad for name, p in named_parameters if p.grad is not None}
        return Step(gradients, loss.item())

    @torch.no_grad()
    def outputs(self, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """Return hidden states [n, width] and predictions [n, ...] at the batch's targets."""
        batch = (batch or self.batch).to(self.device)
        hidden = self.task.target_hidden_states(batch)
        return hidden.float(), self.task.head.predict(hidden, batch.targets).float()


def sample_rows(rows: Rows, max_tokens: int) -> Rows:
    """Return the shortest of the first rows: at least two, and at most `max_tokens` tokens in all.

    A row with more than half of them is cut to half, with its first target in the middle.
    """
    max_length = max_tokens // 2
    parts = []  # (row, positions of its tokens in the flat arrays)
    for i in range(min(len(rows), 4 * MAX_ROWS)):
        span = rows.span(i)
        start = span.start
        if span.stop - start > max_length:
            first_target = np.flatnonzero(is_target(rows.targets[span]))[0]
            start += max(0, first_target - max_length // 2)
        parts.append((i, np.arange(start, min(span.stop, start + max_length))))
    parts.sort(key=lambda part: len(part[1]))

    indices, positions = [], []
    num_tokens = 0
    for i, part in parts[:MAX_ROWS]:
        num_tokens += len(part)
        if len(indices) >= 2 and num_tokens > max_tokens:
            break
        indices.append(i)
        positions.append(part)
    tokens = np.concatenate(positions)
    return Rows(
        tokens=rows.tokens[tokens],
        targets=rows.targets[tokens],
        token_type_ids=rows.token_type_ids[tokens],
        offsets=np.cumsum([0, *(len(part) for part in positions)]),
        loss_weights=rows.loss_weights[tokens],
        dataset_ids=np.zeros(len(indices), np.int32),
    )


def keep_layers_to_check(task: Task) -> str:
    """Keep the first layers, at least two, of a large model; return a note, "" if all are kept."""
    layers = decoder_layers(task.model)
    total = len(layers)
    kept, num_parameters = 0, 0
    for layer in layers:
        num_parameters += sum(p.numel() for p in layer.parameters())
        if num_parameters <= MAX_PARAMETERS:
            kept += 1
    kept = max(2, kept)
    if kept >= total:
        return ""
    keep_first_layers(task.model, kept)
    return f"the model is large, so only the first {kept} of its {total} layers are checked"


def largest_difference(values: Tensors, references: Tensors) -> float:
    """Return the largest difference, relative to the largest number of its reference tensor."""
    differences = []
    for value, reference in zip(values, references, strict=True):
        if reference.numel():
            scale = reference.abs().max().clamp_min(1e-12)
            differences.append((value - reference).abs().max() / scale)
    return torch.stack(differences).max().item()  # NaN where one is


def same_tensors(values: Tensors, references: Tensors, limit: float, what: str) -> Result:
    return require_at_most(largest_difference(values, references), limit, what)


def same_gradients(step: Step, reference: Step, limit: float) -> Result:
    """Return PASS where the gradients are equal up to `limit`, relative to the reference's norm."""
    if step.gradients.keys() != reference.gradients.keys():
        return Result(FAIL, f"other tensors get gradients; {BUG}")
    difference_norms, reference_norms = [], []
    for name, gradient in step.gradients.items():
        expected = reference.gradients[name]
        difference_norms.append((gradient - expected).norm())
        reference_norms.append(expected.norm())
    difference = torch.stack(difference_norms).norm() / torch.stack(reference_norms).norm()
    return require_at_most(difference.item(), limit, "relative difference of the gradients")
