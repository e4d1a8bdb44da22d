"""Time and memory of plainlora beside Hugging Face's Trainer + PEFT and TRL's SFTTrainer.

    pip install -e '.[bench]'
    python benchmarks/peers.py [WORK ...] [--rounds 3] [--threads 2] [--output FILE]

A work is a base of random weights, data, and a number of optimizer steps. Its sides start from the
same weights and the same adapter. In every step they read the same sequences, with the same AdamW,
learning rate and clipping. Inside a step each side sorts, pads or packs as it can. plainlora is
called as its own script calls it; a peer has the settings in SIDES.

Time: every side runs once a round, in a process of its own, and a ratio is taken within a round.
The first steps are left out. Tokens are those of the data, without padding.

Freed memory: plainlora has the C library keep freed memory for the next tensor
(lora/common/allocator.py), and the peers do not. What that costs them depends on what a page fault
costs on the machine. So a peer runs twice a round: with freed memory kept, which compares the
trainers, and as it is, which is what its user sees.

Losses: a ratio counts only where both sides compute the same. Two correct programs round
differently, by how much depends on the machine, and so it is measured with them: a work's control
is two sides that differ only in how they split a step (`fp32` shows that this is exact otherwise).
Where the losses of a side and the first side differ by more than TOLERANCE times as much, the
table says "losses differ" in place of the ratio.

Memory: the peak of a further run of two steps, beyond the peak before the base was loaded. In that
run the C library gives freed memory back at once, so that the process holds its tensors only.

A CPU without avx512_bf16 or amx_bf16 emulates bfloat16, many times slower than float32, and
--dtype auto is float32 there. The work for such a CPU is `fp32`.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile

from common import describe_cpu
from peer_work import UNTIMED_STEPS, Side, Work

# How far the losses of two sides may differ, in terms of how far the control's do. Both are the
# largest of as many differences that rounding has made. Of two such maxima over 6 normal
# differences of equal spread, the first is more than 3 times the second in 1 case of 80. Errors are
# larger: on a CPU with AVX512_BF16, documents that see each other change a loss of `small` by
# 0.013, and splitting a step changes it by 0.002.
TOLERANCE = 3
# torch's cross entropy in float32 on a CPU is 1.5e-5 to 2e-5 away from that in float64 where the
# vocabulary has 49,152 tokens; that of plainlora and TRL 5e-7.
MIN_TOLERANCE = 3e-5

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

TECHNIQUES = (
    "huge pages",
    "frozen weights kept in bfloat16",
    "attention in matrix products",
    "packing",
    "packing and sorting",
    "the head in chunks",
    "logits of targets only",
)
BF16 = {"bf16": True}
PADDING_FREE = {"padding_free": True, "gradient_checkpointing": False}
SIDES = {
    "plainlora": Side("plainlora"),
    "plainlora, fp32": Side("plainlora", "float32"),
    "plainlora in halves": Side("plainlora", parts=2),
    "plainlora in quarters": Side("plainlora", parts=4),
    "plainlora, --compile": Side("plainlora", settings={"compile": True}),
    "plainlora, base in 4 bits": Side("plainlora", settings={"load_in_4bit": True}),
    "plainlora, an example for each step": Side(
        "plainlora", settings={"train_data": "prefixes.jsonl"}
    ),
    "without freed memory kept": Side("plainlora", keeps_memory=False),
    **{f"without {name}": Side("plainlora", without=name) for name in TECHNIQUES},
    "Trainer, defaults (fp32)": Side("transformers", "float32"),
    "Trainer in halves, fp32": Side("transformers", "float32", parts=2),
    "Trainer, bf16": Side("transformers", settings=BF16),
    "Trainer in halves, bf16": Side("transformers", settings=BF16, parts=2),
    "Trainer, bf16, torch_compile": Side("transformers", settings=BF16 | {"torch_compile": True}),
    "Trainer, bf16 over fp32 weights": Side("transformers", "float32", BF16),
    "Trainer in halves, bf16 over fp32 weights": Side("transformers", "float32", BF16, parts=2),
    "TRL, defaults (bf16, checkpointing)": Side("trl", "float32"),
    "TRL, bf16, padding_free": Side("trl", settings=PADDING_FREE),
    "TRL in halves, bf16, padding_free": Side("trl", settings=PADDING_FREE, parts=2),
    "TRL, fp32, padding_free": Side("trl", "float32", PADDING_FREE | {"bf16": False}),
}

# Pairs of sides that differ only in how a step is split into micro-batches.
SPLIT_PLAINLORA = ("plainlora", "plainlora in quarters")
SPLIT_BF16 = ("Trainer, bf16", "Trainer in halves, bf16")
SPLIT_FP32 = ("Trainer, defaults (fp32)", "Trainer in halves, fp32")
SPLIT_FULL = ("Trainer, bf16 over fp32 weights", "Trainer in halves, bf16 over fp32 weights")
TRL = ("TRL, bf16, padding_free", "TRL in halves, bf16, padding_free")
DEFAULTS = ("Trainer, defaults (fp32)", "TRL, defaults (bf16, checkpointing)")
COMPILED = ("plainlora, --compile", "Trainer, bf16, torch_compile")
WITHOUT = tuple(f"without {name}" for name in ("freed memory kept", *TECHNIQUES))
BEST = ("plainlora", *SPLIT_BF16, *TRL)
FP32 = ("plainlora, fp32", *SPLIT_FP32)

WORKS = {
    "small": Work((*SPLIT_PLAINLORA, *SPLIT_BF16, *TRL), SPLIT_BF16, steps=10),
    "defaults": Work(("plainlora", *DEFAULTS, *COMPILED, *SPLIT_BF16), SPLIT_BF16, steps=10),
    "waterfall": Work((*SPLIT_PLAINLORA, *WITHOUT, "plainlora, fp32"), SPLIT_PLAINLORA),
    "tiny": Work(("plainlora, fp32", *BEST, *DEFAULTS), SPLIT_BF16, shape="tiny", steps=12),
    "dense": Work(BEST, SPLIT_BF16, data="dense", batch=4),
    "sgd_chat": Work(BEST, SPLIT_BF16, data="sgd_chat/train.jsonl"),
    "gsm8k": Work(BEST, SPLIT_BF16, data="gsm8k/train.jsonl"),
    "fp32": Work(FP32, SPLIT_FP32),
    "curve": Work(FP32, SPLIT_FP32, shape="tiny", data="gsm8k/train.jsonl", steps=50),
    "full": Work(("plainlora", *SPLIT_FULL, DEFAULTS[0]), SPLIT_FULL, script="train"),
    "0.5b": Work(
        ("plainlora", "plainlora in halves", *SPLIT_BF16, TRL[0]),
        SPLIT_BF16,
        shape="0.5b",
        steps=4,
        batch=4,
    ),
    "steps": Work(
        (*SPLIT_PLAINLORA, "plainlora, an example for each step"),
        SPLIT_PLAINLORA,
        data="prmbench_train/prmbench_train.jsonl",
        task="score",
    ),
    # A real model: dequantised from Q4_1, not the published weights.
    "smollm2": Work(
        (*FP32, "TRL, fp32, padding_free"),
        SPLIT_FP32,
        shape="smollm2",
        data="gsm8k/train.jsonl",
    ),
    # 4-bit weights are other weights, so the losses are shown and not compared.
    "qlora": Work(("plainlora", "plainlora, base in 4 bits"), None),
}


@dataclass
class Runs:
    """What the runs of a side have measured, a Result as a dict for each round."""

    kept: list[dict] = field(default_factory=list)  # with freed memory kept
    plain: list[dict] = field(default_factory=list)  # a peer as it is
    memory: int = 0  # bytes


def run(work: Work, side: Side | None, folder: str, threads: int, **environment: str) -> dict:
    """Prepare a work (side: None), or train a side of it, in a process of its own.

    Returns:
        The Result of a side, as a dict.
    """
    job = {"work": asdict(work), "side": side and asdict(side), "folder": folder}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "THP_MEM_ALLOC_ENABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "PLAINLORA_CACHE": f"{folder}/cache",
        "TOKENIZERS_PARALLELISM": "false",
        **environment,
    }
    program = Path(__file__).with_name("peer_sides.py")
    command = [sys.executable, program, json.dumps(job)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{work}, {side}: {process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def measure(work: Work, rounds: int, threads: int, folder: str) -> dict[str, Runs]:
    """Run every side of the work, in turns, and return {side: Runs}."""
    results = {name: Runs() for name in work.sides}
    for i in range(rounds):
        for name, runs in results.items():
            side = SIDES[name]
            runs.kept.append(run(work, side, folder, threads))
            print(f"round {i + 1}, {name}: {runs.kept[-1]}", file=sys.stderr, flush=True)
            if side.library != "plainlora":
                plain = replace(side, keeps_memory=False)
                runs.plain.append(run(work, plain, folder, threads))
                print(f"... plain: {runs.plain[-1]}", file=sys.stderr, flush=True)
    for name, runs in results.items():
        short = replace(work, steps=UNTIMED_STEPS)
        runs.memory = run(short, SIDES[name], folder, threads, **GIVE_BACK)["memory"]
    return results


def difference(a: Runs, b: Runs) -> float:
    """Return the largest difference between the losses of a step, over all runs of both sides."""
    largest = 0.0
    for run_a in a.kept + a.plain:
        for run_b in b.kept + b.plain:
            for loss_a, loss_b in zip(run_a["losses"], run_b["losses"], strict=True):
                largest = max(largest, abs(loss_a - loss_b))
    return largest


def loss_tolerance(work: Work, results: dict[str, Runs]) -> tuple[float, str]:
    """Return how far a side's losses may be from the first side's, and a sentence about it."""
    if not work.control:
        return float("inf"), "The sides do not compute the same, and their losses are not compared."
    one, other = work.control
    rounding = difference(results[one], results[other])
    tolerance = max(TOLERANCE * rounding, MIN_TOLERANCE)
    return tolerance, (
        f'The losses of "{one}" and "{other}" differ by {rounding:.1e}; '
        f"those of a row and the first row may differ by {tolerance:.1e}."
    )


def table(work: Work, results: dict[str, Runs], num_tokens: int) -> list[str]:
    """Return the table of a work as lines of Markdown. `num_tokens`: of the timed steps."""
    first = results[work.sides[0]]
    tolerance, about_losses = loss_tolerance(work, results)
    lines = [
        f"| {work.sides[0]} beside | times as fast, freed memory kept | ... the peer as it is "
        "| tokens/s, freed memory kept | memory, MB | its share | process, MB | losses differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        apart = difference(runs, first)
        speeds = [num_tokens / result["seconds"] for result in runs.kept]
        ratios = [
            spread(times_as_fast(side, first.kept), ".2f") for side in (runs.kept, runs.plain)
        ]
        if apart > tolerance:
            ratios = ["losses differ", "losses differ"]
        process_memory = statistics.median(result["process_memory"] for result in runs.kept)
        cells = [
            name,
            *ratios,
            spread(speeds, ".0f"),
            f"{runs.memory / 1e6:.0f}",
            f"{first.memory / runs.memory:.2f}",
            f"{process_memory / 1e6:.0f}",
            f"{apart:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", about_losses]


def times_as_fast(results: list[dict], first: list[dict]) -> list[float]:
    """Return the ratio of each round: a side's seconds over the first side's."""
    return [result["seconds"] / other["seconds"] for result, other in zip(results, first)]


def spread(values: list[float], form: str) -> str:
    """Return "median (smallest-largest)"; a single value by itself."""
    if not values:
        return ""
    median = format(statistics.median(values), form)
    if len(values) == 1:
        return median
    return f"{median} ({min(values):{form}}-{max(values):{form}})"


def compare(name: str, rounds: int, threads: int) -> str:
    """Measure a work and return its section of Markdown."""
    work = WORKS[name]
    with tempfile.TemporaryDirectory() as folder:
        run(work, None, folder, threads)
        results = measure(work, rounds, threads, folder)
        steps = json.loads((Path(folder) / "steps.json").read_text())
    tokens, padded = [], 0
    for step in steps:
        lengths = [len(sequence["input_ids"]) for sequence in step]
        tokens.append(sum(lengths))
        padded += max(lengths) * len(lengths)
    libraries = ("torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{library} {version(library)}" for library in libraries)
    command = f"python benchmarks/peers.py {name} --rounds {rounds} --threads {threads}"
    lines = [
        f"## {name}",
        "",
        f"{work.script}.py, {work.shape}, {work.data}: {work.steps} steps of {work.batch} "
        f"sequences, {sum(tokens)} tokens ({padded} with padding)",
        "",
        *table(work, results, sum(tokens[UNTIMED_STEPS:])),
        "",
        f"`{command}`; {versions}",
        "",
        f"CPU: {describe_cpu()}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(WORKS)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {names}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="the tables are added to this file")
    arguments = parser.parse_args()
    for name in arguments.works or WORKS:
        section = compare(name, arguments.rounds, arguments.threads)
        print(section, flush=True)
        if arguments.output:
            with open(arguments.output, "a") as file:
                file.write(section + "\n")


if __name__ == "__main__":
    main()
