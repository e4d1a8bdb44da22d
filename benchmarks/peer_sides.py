"""One process of benchmarks/peers.py: it prepares a work, or trains one side of it.

    python benchmarks/peer_sides.py '{"work": {...}, "side": {...} or null, "folder": "..."}'

The last line of its output is a Result as JSON.
"""

from dataclasses import asdict, dataclass
import importlib
import json
import os
from pathlib import Path
import resource
import sys
import time

from common import metrics
from peer_work import LEARNING_RATE, UNTIMED_STEPS, Side, Work, plainlora_command, prepare

from lora.common.allocator import keep_freed_memory


@dataclass
class Result:
    """What a run of a side has measured."""

    losses: list[float]  # of each step
    seconds: float  # of all steps but the first UNTIMED_STEPS
    memory: int  # the process's peak beyond its peak before the base was loaded, in bytes
    process_memory: int  # the process's peak, in bytes


def train_plainlora(work: Work, folder: Path, side: Side) -> tuple[int, list[float], list[float]]:
    """Train by the script's own `main`, and return what `train_peer` returns."""
    if side.without:
        take_away(side.without)
    script = importlib.import_module(work.script)
    from lora.data.raw_data import RawData

    command = plainlora_command(work, folder, side)
    raw_data = RawData(command.config)
    memory_before = peak_memory()
    script.main(command, raw_data)
    steps = metrics(command.run_dir, "train/loss")
    losses = [step["train/loss"] for step in steps]
    return memory_before, losses, [step["timestamp"] for step in steps]


def take_away(technique: str) -> None:
    """Undo, in this process, a technique that makes plainlora fast. The loss stays the same."""
    if technique == "huge pages":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # torch reads it when it is imported
    import torch
    import torch.nn.functional as F

    from lora.data import batches
    from lora.model import attention, heads, task
    from lora.model.load import load_task
    import train_lora

    def logits_of_all_positions(self, batch):
        logits = self.head.logits(self.hidden_states(batch))[batch.target_positions]
        return F.cross_entropy(logits, batch.targets, reduction="sum"), batch.num_targets

    if technique == "frozen weights kept in bfloat16":  # autocast casts them in every step
        train_lora.load_task = lambda config, dtype, device: load_task(config, torch.float32)
    elif technique == "attention in matrix products":
        attention.SHORT = 0
    elif technique == "packing":
        train_lora.load_task = lambda config, dtype, device: load_task(config, dtype, packed=False)
    elif technique == "packing and sorting":  # one padded batch
        train_lora.load_task = lambda config, dtype, device: load_task(config, dtype, packed=False)
        batches.MAX_PADDING = 1.0
    elif technique == "the head in chunks":
        heads.LMHead.chunks = staticmethod(lambda hidden, vocabulary: [slice(0, len(hidden))])
    elif technique == "logits of targets only":
        task.Task.forward = logits_of_all_positions


def train_peer(work: Work, folder: Path, side: Side) -> tuple[int, list[float], list[float]]:
    """Train by a peer's trainer.

    Returns:
        The process's peak memory before the base was loaded, the loss of each step, and the time
        at which each step ended.
    """
    from datasets import Dataset
    from peft import PeftModel
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    arguments_class, options = TrainingArguments, dict(side.settings)
    if side.library == "trl":
        from trl import SFTConfig, SFTTrainer

        arguments_class = SFTConfig
        options |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = arguments_class(
        output_dir=str(folder / "peer"),
        per_device_train_batch_size=work.batch // side.parts,
        gradient_accumulation_steps=side.parts,
        max_steps=work.steps,
        use_cpu=True,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    sequences = []
    for step in json.loads((folder / "steps.json").read_text())[: work.steps]:
        if side.parts > 1:
            step.sort(key=lambda sequence: len(sequence["input_ids"]))
        sequences += step
    ends = []

    class StepEnds(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.time())

    memory_before = peak_memory()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, side.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    if work.script == "train_lora":
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    data = {"train_dataset": Dataset.from_list(sequences), "callbacks": [StepEnds()]}
    if side.library == "trl":
        trainer = SFTTrainer(model, arguments, processing_class=tokenizer, **data)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(model, arguments, data_collator=collator, **data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return memory_before, losses, ends


def peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    job = json.loads(sys.argv[1])
    work = Work(**job["work"])
    folder = Path(job["folder"])
    if job["side"] is None:
        prepare(work, folder)
        return print("null")
    side = Side(**job["side"])
    if side.keeps_memory:
        keep_freed_memory()  # before torch is imported
    train = train_plainlora if side.library == "plainlora" else train_peer
    memory_before, losses, ends = train(work, folder, side)
    seconds = ends[-1] - ends[UNTIMED_STEPS - 1]
    result = Result(losses, seconds, peak_memory() - memory_before, peak_memory())
    print("\n" + json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
