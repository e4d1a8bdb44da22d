"""What the parts of benchmarks/gpu.py share: random models and rows on a device, and training."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
import time

from common import QWEN_05B, metrics
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora.common.base_model_files import EMBEDDED_BASE
from lora.common.signals import StopSignal
from lora.config.schema import Config, TrainingConfig, get_lora_config
from lora.config.set_keys import set_key
from lora.data.batches import Batch, Rows
from lora.data.sampler import TrainingData
from lora.data.tokenise import Row
from lora.layer import inject, lora_layers
from lora.model.device import autocast
from lora.model.placement import prepare_layers
from lora.model.run import Run
from lora.model.task import Task
from lora.training.log import Log
from lora.training.schedule import total_steps
from train import train

RANK = 16
ALPHA = 32
SAME_SUMS = 1e-2  # of the same bfloat16 products, which a GPU may sum in another order
MISSED = "not measured on a CPU"
# Of real configs. Weights are random: drawn on the device, from the seed 0.
SHAPES = {
    "0.5b": QWEN_05B,  # Qwen2.5-0.5B
    "7b": {  # Qwen2.5-7B
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "8b": {  # Llama-3.1-8B
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CORRECTNESS_LAYERS = 4


class NotRun(Exception):
    """A part that cannot be run here, with the reason."""


@dataclass(frozen=True)
class Place:
    """Where the parts run, and at which size."""

    device_type: str  # "cuda" or "cpu"
    size: str  # "full", or "tiny" for a CPU

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type)

    @property
    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    def shape(self, name: str) -> dict:
        """Return one of SHAPES; at the size "tiny", with TINY's numbers."""
        return SHAPES[name] | (TINY if self.size == "tiny" else {})

    def correctness_shape(self) -> dict:
        """Return a few layers of Qwen2.5-0.5B's shape."""
        few_layers = {"num_hidden_layers": CORRECTNESS_LAYERS}
        if self.size == "tiny":
            few_layers = {}
        return self.shape("0.5b") | few_layers

    def tokens(self, full: int) -> int:
        """Return a number of tokens; at the size "tiny" a 32nd of it, but at least one."""
        return max(1, full // 32) if self.size == "tiny" else full


@dataclass
class Check:
    """One thing that a part found.

    Attributes:
        passed: None for what is only reported.
    """

    what: str
    found: str
    expected: str = ""
    passed: bool | None = None


def at_most(what: str, found: float, limit: float) -> Check:
    return Check(what, f"{found:.2g}", f"at most {limit:.2g}", found <= limit)


def make_task(place: Place, shape: dict, lora: bool = True) -> Task:
    """Make a random model on the device: bfloat16 under LoRA, or fp32 with all of it trained."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if lora else torch.float32
    with torch.device(place.device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape), dtype=dtype, attn_implementation="packed"
        )
    # Only saved beside the weights: rows are made of token ids.
    task = Task(model, AutoTokenizer.from_pretrained(EMBEDDED_BASE))
    if lora:
        add_lora(model)
    return task.train()


def add_lora(model: nn.Module) -> None:
    """Add LoRA to all linear layers. B is random as well: while it is 0, A has no gradient."""
    inject(model, RANK, ALPHA)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.02)


def make_rows(seq_lens: list[int], vocab_size: int, seed: int = 0) -> Rows:
    """Return documents of random tokens, in which every token has a target."""
    generator = np.random.default_rng(seed)
    rows = []
    for seq_len in seq_lens:
        tokens = generator.integers(vocab_size, size=seq_len + 1).tolist()
        rows.append((Row(tokens[:-1], tokens[1:]), 0))
    return Rows.from_rows(rows, "lm")


def mixed_lengths(place: Place, count: int, longest: int) -> list[int]:
    """Return log-normal lengths of documents, a median of a quarter of `longest`."""
    lengths = np.random.default_rng(1).lognormal(np.log(longest / 4), 0.8, count)
    return [place.tokens(int(length)) for length in lengths.clip(16, longest)]


def make_run(place: Place, task: Task, rows: Rows, settings: dict) -> Run:
    """Return a run of the task on these rows; `settings` are keys of the configuration."""
    trains_lora = bool(lora_layers(task.model))
    config = get_lora_config() if trains_lora else Config()
    longest = int(rows.seq_lens(np.arange(len(rows))).max())
    keys: dict = {"max_length": max(2, longest), "eval_steps": 1000, "save_steps": 1000}
    keys |= {"logging_steps": 1, "learning_rate": 1e-3}
    for name, value in (keys | settings).items():
        set_key(config, name, value, name)
    held_out = make_rows([16, 32, 8, 24], task.model.config.vocab_size, seed=2)
    wrap_layers(task, config.training)
    data = TrainingData(rows, held_out, config)
    return Run(task, config, data, place.device, torch.bfloat16)


def wrap_layers(task: Task, training: TrainingConfig) -> None:
    """Wrap the task's layers as a run with these settings does."""
    prepare_layers(task.model, training, training.gradient_checkpointing is True)


class StepTimes(Log):
    """A log that marks when each step has ended: on a GPU in its stream, without waiting."""

    def __init__(self, folder: Path, run: Run) -> None:
        max_steps = total_steps(run.config.training, run.data.steps_per_epoch)
        super().__init__(folder, run.config, max_steps)
        self.marks = []

    def count(self, step: int, num_tokens: int, seconds: float, loss: float) -> None:
        super().count(step, num_tokens, seconds, loss)
        self.marks.append(mark_time())

    def step_seconds(self) -> list[float]:
        """Return the seconds of every step but the first."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:])
        return [seconds_between(start, end) for start, end in pairs]


def mark_time() -> float | torch.cuda.Event:
    """Return the time now; once CUDA is in use, an event in its stream."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Return the seconds between two marks, which the device must have reached."""
    if isinstance(start, float):
        return end - start
    return start.elapsed_time(end) / 1e3


def train_in(folder: Path, run: Run, resume_from: str = "") -> list[float]:
    """Train by the loop of train.py, in a new folder; return the seconds of all steps but one."""
    with closing(StepTimes(folder, run)) as log:
        train(run, log, {}, resume_from, StopSignal())
        return log.step_seconds()


def losses_in(folder: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(folder, "train/loss")]


def gradients(
    task: Task, batches: list[Batch], dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss of some micro-batches, and the gradient of every trained tensor."""
    task.zero_grad()
    device = task.model.device
    num_targets = sum(batch.num_targets for batch in batches)
    loss = 0.0
    for batch in batches:
        with autocast(device, dtype):
            loss_sum, _ = task(batch.to(device))
        (loss_sum / num_targets).backward()
        loss += loss_sum.item() / num_targets
    found = {}
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.float().clone()
    return loss, found


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest |found - expected| / |expected| of a tensor, in norms."""
    assert found.keys() == expected.keys()
    differences = []
    for name, tensor in expected.items():
        difference = (found[name] - tensor).norm() / tensor.norm()
        differences.append(difference.item())
    return largest(differences)


def largest(values: list[float]) -> float:
    """Return the largest value; NaN where one is, which max() may pass over."""
    return torch.tensor(values, dtype=torch.float64).max().item()
