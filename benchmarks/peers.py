"""This project beside Hugging Face's Trainer + PEFT and TRL's SFTTrainer: speed and memory on the
same work.

    pip install -e '.[bench]'
    python benchmarks/peers.py [WORK ...] [--rounds 3] [--threads 2] [--output FILE]

A work is a base (random weights), data, and a number of optimizer steps. Every side starts from the
same weights and the same adapter, and is handed the same sequences in every step, in the same
order, with the same AdamW, learning rate and clipping; inside a step it may pad or pack as it
likes. A side runs in a process of its own, the sides take turns, and a ratio is taken within a
round. The times are those from one step's end to the next, the first steps left out. A row whose
loss differs from the first row's in any step is void. Tokens are those of the data: padding does
not count.

Our side is train_lora.py's (or train.py's) own `main`, from its command line to its metrics file.
It has the C library keep freed memory (lora/common/allocator.py); "freed memory kept" is a peer for
which the same is done.

Memory is measured in one more, short run of each side: what the process holds at most, beyond what
its imports took. There MALLOC_MMAP_THRESHOLD_ makes the C library give back what is freed, so that
the process holds what its tensors hold.
"""

import argparse
from dataclasses import dataclass, field
from importlib.metadata import version
import json
import os
from pathlib import Path
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lora.common.allocator import keep_freed_memory

LEARNING_RATE, RANK, ALPHA, WARMUP = 1e-3, 16, 32, 2  # WARMUP: steps without a time
FIXED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "initializer_range": 0.05}
SHAPES = {
    "tiny": LLAMA
    | {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": LLAMA
    | {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    # Qwen2.5-0.5B's numbers in a Llama: of a "qwen2" transformers 5.23 reads tokenizer.json as BPE,
    # whatever it holds.
    "0.5b": LLAMA
    | {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}

# What a side is: our configuration, or a library, the type of the base's weights, and the library's
# settings.
OURS = {"ours": {"dtype": "bfloat16"}, "ours, fp32": {"dtype": "float32"}}
PADDING_FREE = {"padding_free": True, "gradient_checkpointing": False}
PEERS = {
    "Trainer, defaults (fp32)": ("transformers", "float32", {}),
    "Trainer, fp32, freed memory kept": ("transformers", "float32", {"keeps": True}),
    "Trainer, fp32, halves by length": ("transformers", "float32", {"halves": True}),
    "Trainer, bf16": ("transformers", "bfloat16", {"bf16": True}),
    "Trainer, bf16, halves by length": ("transformers", "bfloat16", {"bf16": True, "halves": True}),
    "Trainer, bf16, freed memory kept": ("transformers", "bfloat16", {"bf16": True, "keeps": True}),
    "Trainer, bf16, halves, freed memory kept": (
        "transformers",
        "bfloat16",
        {"bf16": True, "halves": True, "keeps": True},
    ),
    "Trainer, bf16, torch_compile": (
        "transformers",
        "bfloat16",
        {"bf16": True, "torch_compile": True},
    ),
    "Trainer, bf16 over fp32 weights": ("transformers", "float32", {"bf16": True}),
    "Trainer, bf16 over fp32 weights, freed memory kept": (
        "transformers",
        "float32",
        {"bf16": True, "keeps": True},
    ),
    "TRL, defaults (bf16, checkpointing)": ("trl", "float32", {}),
    "TRL, bf16, padding_free": ("trl", "bfloat16", PADDING_FREE),
    "TRL, bf16, padding_free, freed memory kept": (
        "trl",
        "bfloat16",
        PADDING_FREE | {"keeps": True},
    ),
    "TRL, bf16, padding_free, halves by length": (
        "trl",
        "bfloat16",
        PADDING_FREE | {"halves": True},
    ),
}


@dataclass
class Work:
    """Some steps of training. data: "mixed" or "dense", synthetic rows, or a file below
    PLAINLORA_DATA.

    With task "score" the steps of `batch` chains are scored, all of them in every step of training.
    """

    shape: str
    data: str
    sides: list[str]
    steps: int = 6
    batch: int = 8  # sequences of a step
    script: str = "train_lora"
    task: str = "lm"
    ours: dict[str, dict] = field(default_factory=dict)  # sides of ours beside OURS
    # Of a loss in bfloat16; documents that see each other change it by 0.013 and more ("small")
    tolerance: float = 0.005


TRAINER = ["Trainer, bf16", "Trainer, bf16, halves by length"]
TRAINER += ["Trainer, bf16, freed memory kept", "Trainer, bf16, halves, freed memory kept"]
TRL = [
    "TRL, bf16, padding_free",
    "TRL, bf16, padding_free, halves by length",
    "TRL, bf16, padding_free, freed memory kept",
]
BEST = ["ours", *TRAINER, *TRL]
DEFAULTS = ["Trainer, defaults (fp32)", "TRL, defaults (bf16, checkpointing)"]
FULL = [
    "ours",
    "Trainer, bf16 over fp32 weights",
    "Trainer, bf16 over fp32 weights, freed memory kept",
]
FULL += ["Trainer, defaults (fp32)"]
FP32 = [
    "ours, fp32",
    "Trainer, defaults (fp32)",
    "Trainer, fp32, halves by length",
    "Trainer, fp32, freed memory kept",
]
ROWS = {"ours, a row for each step": {"dtype": "bfloat16", "train_data": "prefixes.jsonl"}}
QLORA = {"ours, base in 4 bits": {"dtype": "bfloat16", "load_in_4bit": "true"}}
QUARTERS = {
    "dtype": "bfloat16",
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_length": 520,
}  # of 1,040 tokens
WAYS = {"ours, in quarters": QUARTERS, "ours, --compile": {"dtype": "bfloat16", "compile": "true"}}
HALVES = {
    "ours, in halves": {
        "dtype": "bfloat16",
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_length": 520,
    }
}
TECHNIQUES = (  # what `take_away` knows
    "freed memory kept",
    "huge pages",
    "frozen weights kept in bfloat16",
    "attention in matrix products",
    "packing",
    "packing and sorting",
    "the head in chunks",
    "logits of targets only",
)
WITHOUT = {f"without {name}": {"dtype": "bfloat16", "without": name} for name in TECHNIQUES}
WORKS = {
    "small": Work(
        "small", "mixed", ["ours", "ours, in quarters", *TRAINER, *TRL], steps=10, ours=WAYS
    ),
    "defaults": Work(
        "small",
        "mixed",
        ["ours", *DEFAULTS, "ours, --compile", "Trainer, bf16, torch_compile"],
        steps=10,
        ours=WAYS,
    ),
    "waterfall": Work("small", "mixed", ["ours", *WITHOUT, "ours, fp32"], ours=WITHOUT),
    "tiny": Work("tiny", "mixed", ["ours, fp32", *BEST, *DEFAULTS], steps=12),
    "dense": Work("small", "dense", BEST, batch=4),
    "sgd_chat": Work("small", "sgd_chat/train.jsonl", BEST),
    "gsm8k": Work("small", "gsm8k/train.jsonl", BEST),
    "fp32": Work("small", "mixed", FP32, tolerance=1e-4),
    "curve": Work("tiny", "gsm8k/train.jsonl", FP32[:2], steps=50, tolerance=1e-4),
    "full": Work("small", "mixed", FULL, script="train"),
    # In 24 layers of bfloat16 Trainer's losses and TRL's are 0.010 apart too.
    "0.5b": Work(
        "0.5b",
        "mixed",
        ["ours", *HALVES, TRAINER[0], TRAINER[2], TRL[0]],
        steps=4,
        batch=4,
        ours=HALVES,
        tolerance=0.015,
    ),
    "steps": Work(
        "small", "prmbench_train/prmbench_train.jsonl", ["ours", *ROWS], task="score", ours=ROWS
    ),
    "qlora": Work("small", "mixed", ["ours", *QLORA], ours=QLORA, tolerance=0.1),
}


# ---------------------------------------------------------------------------- the same work for all


def prepare(work, folder):
    """base/, adapter/, train.jsonl, eval.jsonl, and rows.json: for each step [{"input_ids",
    "labels"} ...].
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from lora.adapter import save_adapter
    from lora.common.base_model_files import EMBEDDED_BASE
    from lora.data.raw_data import RawData
    from lora.data.sampler import TrainingData
    from lora.data.token_cache import load_or_tokenise
    from lora.layer import inject, lora_layers
    from lora.model.load import load_task

    torch.manual_seed(0)
    auto = AutoModel if work.task == "score" else AutoModelForCausalLM
    shape = AutoConfig.for_model(**SHAPES[work.shape])
    model = auto.from_config(shape, dtype=shape.dtype or torch.float32)
    model.save_pretrained(folder / "base")
    synthetic = "/" not in work.data
    tokenizer = (
        numbered_words(SHAPES[work.shape]["vocab_size"])
        if synthetic
        else AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    )
    tokenizer.save_pretrained(folder / "base")
    write_data(work, folder, SHAPES[work.shape]["vocab_size"])
    inject(model, RANK, ALPHA)
    for layer in lora_layers(model).values():
        # Or the first steps would not show what A does
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02)
    save_adapter(model, folder / "adapter")
    config = our_command(work, folder, OURS["ours, fp32"]).config
    rows, held_out, _ = load_or_tokenise(RawData(config), load_task(config, torch.float32))
    data, steps = TrainingData(rows, held_out, config), []
    for step in range(work.steps):
        spans = [slice(rows.offsets[i], rows.offsets[i + 1]) for i in data.rows_at(step)]
        steps.append(
            [
                {
                    "input_ids": rows.tokens[s].tolist(),
                    "labels": [-100, *rows.targets[s][:-1].tolist()],
                }
                for s in spans
            ]
        )
    (folder / "rows.json").write_text(json.dumps(steps))


def numbered_words(vocabulary):
    """A tokenizer of the words w2, w3, ... below `vocabulary`, and of </s>, which ends a text and a
    turn.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] + ' </s> ' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def write_data(work, folder, vocabulary):
    """train.jsonl, eval.jsonl, and of chains prefixes.jsonl, in which each of their steps ends a
    row of its own.
    """
    count = work.steps * work.batch if work.task == "lm" else work.batch
    if "/" not in work.data:
        rows = list(synthetic_rows(work.data, count + 4, vocabulary))
    else:
        lines = (Path(os.environ["PLAINLORA_DATA"]) / work.data).read_text().splitlines()
        rows = [json.loads(line) for line in lines[: count + 4]]
    if work.task == "score":
        last, odd = (
            rows[count - 1]["labels"],
            sum(len(row["labels"]) for row in rows[:count]) % work.batch,
        )
        last[len(last) - odd :] = [None] * odd  # so that the prefixes are a whole number of batches
        prefixes = [
            {
                "prompt": row["prompt"],
                "steps": row["steps"][: i + 1],
                "labels": [None] * i + [label],
            }
            for row in rows[:count]
            for i, label in enumerate(row["labels"])
            if label is not None
        ]
        write_rows(folder / "prefixes.jsonl", prefixes)
    write_rows(folder / "train.jsonl", rows[:count])
    write_rows(folder / "eval.jsonl", rows[count:])


def synthetic_rows(kind, count, vocabulary):
    """mixed: chats of log-normal lengths (median 180, sigma 0.6, 24 to 512), 0.4 of them answers;
    dense: texts of 512.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    for length in draw.lognormal(np.log(180), 0.6, count).clip(24, 512).astype(int):
        words = [
            f"w{n}" for n in draw.integers(2, vocabulary, length - 2 if kind == "mixed" else 511)
        ]  # and </s>
        cut = round(0.6 * length)
        chat = {"prompt": " ".join(words[:cut]), "completion": " ".join(words[cut:])}
        yield chat if kind == "mixed" else {"text": " ".join(words)}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------- the sides


def our_command(work, folder, side):
    from lora.config.command_line import read_command_line
    from lora.config.schema import Config, get_lora_config

    lora, data = work.script == "train_lora", folder / side.get("train_data", "train.jsonl")
    side = {name: value for name, value in side.items() if name != "without"}
    examples = len(data.read_text().splitlines()) if work.task == "score" else work.batch
    settings = {
        "base_model": folder / "base",
        "task": work.task,
        "eval_data": folder / "eval.jsonl",
        "max_length": 2048,
        "batch_size": work.batch,
        "gradient_accumulation_steps": examples // work.batch,
        "max_steps": work.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "max_eval_batches": 1,
        "eval_steps": 10**6,
        "save_steps": 10**6,
        "output_dir": folder / "runs",
        "experiment_name": os.getpid(),
        **side,
        "train_data": data,
    }
    if lora:
        settings |= {"lora_r": RANK, "lora_alpha": ALPHA, "init_from": folder / "adapter"}
    argv = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    return read_command_line(argv, get_lora_config() if lora else Config(), "", "")


def ours(work, folder, side):
    """(memory before, losses, seconds of the steps) of a run of this project."""
    take_away(side.get("without"))
    script = __import__(work.script)
    from lora.data.raw_data import RawData

    command = our_command(work, folder, side)
    source = RawData(command.config)
    before = peak_memory()
    script.main(command, source)
    lines = (Path(command.run_dir) / "logs" / "train_metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "train/loss" in line]
    return (
        before,
        [step["train/loss"] for step in steps],
        between([step["timestamp"] for step in steps]),
    )


def take_away(technique):
    """Undo, in this process, one of the things that make our side fast. The losses stay."""
    if technique == "freed memory kept":
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "the C library's own"
    if technique == "huge pages":  # asked for by torch when it is imported
        os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
    import torch
    import torch.nn.functional as F

    from lora.data import batches
    from lora.model import attention, compatibility, heads, load, task
    import train_lora

    tried = compatibility.find_incompatibility
    if technique == "frozen weights kept in bfloat16":  # autocast casts them in every step
        train_lora.load_task = lambda config, dtype: load.load_task(config, torch.float32)
    elif technique == "attention in matrix products":
        attention.SHORT = 0
    elif technique in ("packing", "packing and sorting"):
        compatibility.find_incompatibility = lambda task: (
            "it is to be padded" if task.packed else tried(task)
        )
        if technique == "packing and sorting":  # one padded batch
            batches.MAX_PADDING = 1.0
    elif technique == "the head in chunks":
        heads.LMHead.chunks = staticmethod(lambda hidden, vocabulary: [slice(0, len(hidden))])
    elif technique == "logits of targets only":

        def every_position(self, batch):
            logits = self.head.logits(self.hidden_states(batch))[batch.target_positions]
            return F.cross_entropy(logits, batch.targets, reduction="sum"), batch.num_targets

        task.Task.forward = every_position


def theirs(work, folder, library, dtype, settings):
    """The same of a peer's trainer; with "keeps" the C library keeps freed memory, as it does for
    us.
    """
    settings = dict(settings)
    if settings.pop("keeps", False):
        keep_freed_memory()
    from datasets import Dataset
    from peft import PeftModel
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
    )

    if library == "trl":
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer
    else:
        from transformers import TrainingArguments as Arguments
    steps = json.loads((folder / "rows.json").read_text())[: work.steps]
    batch = work.batch
    # No sequence leaves its step, but inside it they may be sorted
    if settings.pop("halves", False):
        batch //= 2
        steps = [sorted(step, key=lambda row: len(row["input_ids"])) for step in steps]
    data = Dataset.from_list([row for step in steps for row in step])
    ends = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.time())

    arguments = Arguments(
        output_dir=str(folder / "peer"),
        per_device_train_batch_size=batch,
        max_steps=work.steps,
        use_cpu=True,
        gradient_accumulation_steps=len(steps[0]) // batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **settings,
        **(
            {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
            if library == "trl"
            else {}
        ),
    )
    before = peak_memory()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
    if work.script == "train_lora":
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    if library == "trl":
        trainer = SFTTrainer(
            model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
        )
    else:
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(
            model, arguments, train_dataset=data, data_collator=collator, callbacks=[Watch()]
        )
    trainer.train()
    return (
        before,
        [line["loss"] for line in trainer.state.log_history if "loss" in line],
        between(ends),
    )


def between(times):
    return [later - earlier for earlier, later in zip(times, times[1:])]


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def child(name, side, folder, short):
    """{"losses", "seconds", "memory", "peak"} of a side."""
    work, folder = WORKS[name], Path(folder)
    if short:
        work.steps = 2
    if not side:
        prepare(work, folder)
        return {}
    mine = (OURS | work.ours).get(side)
    before, losses, seconds = (
        ours(work, folder, mine) if mine else theirs(work, folder, *PEERS[side])
    )
    return {
        "losses": losses,
        "seconds": seconds,
        "memory": peak_memory() - before,
        "peak": peak_memory(),
    }


# ---------------------------------------------------------------------------------------- the table


def measured(threads, name, side, folder, short=False):
    """`child` in a process of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "THP_MEM_ALLOC_ENABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"PLAINLORA_CACHE": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "false"} | (
        FIXED if short else {}
    )
    command = [sys.executable, __file__, "--child", json.dumps([name, side, str(folder), short])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name, rounds, threads):
    """The table of a work, as lines of Markdown."""
    work = WORKS[name]
    with tempfile.TemporaryDirectory() as folder:
        measured(threads, name, "", folder)
        rows = json.loads((Path(folder) / "rows.json").read_text())
        results = {side: [] for side in work.sides}
        for _ in range(rounds):
            for side in work.sides:
                results[side].append(measured(threads, name, side, folder))
                print(name, side, json.dumps(results[side][-1]), file=sys.stderr, flush=True)
        short = {side: measured(threads, name, side, folder, short=True) for side in work.sides}
    tokens = [sum(len(row["input_ids"]) for row in step) for step in rows]
    widest = sum(max(len(row["input_ids"]) for row in step) * len(step) for step in rows)
    lines = [
        f"## {name}\n\n{work.script}.py, {work.shape}, {work.data}: {work.steps} steps of "
        f"{work.batch} sequences, "
        f"{sum(tokens)} tokens ({widest} with padding)\n",
        "| | tokens/s, median (range) | the first row is so many times as fast | memory, MB | "
        "the first row's share "
        "| process, MB | largest difference of a step's loss |",
        "|---|---|---|---|---|---|---|",
    ]
    first = work.sides[0]
    for side, runs in results.items():
        speeds = [sum(tokens[WARMUP:]) / sum(run["seconds"][WARMUP - 1 :]) for run in runs]
        ratios = [
            sum(run["seconds"][WARMUP - 1 :]) / sum(mine["seconds"][WARMUP - 1 :])
            for run, mine in zip(runs, results[first])
        ]
        apart = max(
            abs(a - b)
            for run in runs
            for a, b in zip(run["losses"], results[first][0]["losses"], strict=True)
        )
        memory, peak = (
            short[side]["memory"] / 1e6,
            statistics.median(run["peak"] for run in runs) / 1e6,
        )
        valid = apart <= work.tolerance
        cells = [
            side,
            spread(speeds, "{:.0f}"),
            spread(ratios, "{:.2f}") if valid else "VOID",
            f"{memory:.0f}",
            f"{short[first]['memory'] / 1e6 / memory:.2f}",
            f"{peak:.0f}",
            f"{apart:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spread(values, form):
    return f"{form} ({form}-{form})".format(statistics.median(values), min(values), max(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; default: all"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="the tables are added to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return print("\n" + json.dumps(child(*json.loads(arguments.child))))
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl")
    )
    for name in arguments.works or WORKS:
        command = (
            f"python benchmarks/peers.py {name} --rounds {arguments.rounds} --threads "
            f"{arguments.threads}"
        )
        text = "\n".join(
            [
                *compare(name, arguments.rounds, arguments.threads),
                f"\n`{command}`; {libraries}; {platform.machine()}\n",
            ]
        )
        print(text, flush=True)
        if arguments.output:
            with open(arguments.output, "a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
