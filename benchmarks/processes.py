"""Throughput of LoRA with two processes of one thread each, against one process of one thread, side
by side.

    python benchmarks/processes.py [--repeats 3] [--script train_lora.py]

A random Llama of 512 x 8 layers (26 million parameters beside the embeddings) on generated
arithmetic, 32 examples a step. The runs alternate; a run's figure is the median over its logged
steps, the first two left out.
"""

import argparse
import statistics
import tempfile

from common import call, metrics, save_base

STEPS = 8


def tokens_per_second(script, base, folder, processes):
    settings = (
        "--task lm --train_data arithmetic:train:2000 --max_length 512 --dtype float32 "
        f"--batch_size {16 // processes} --gradient_accumulation_steps 2 --max_steps {STEPS} "
        f"--eval_steps 1000 --max_eval_batches 1 --logging_steps 1 --experiment_name {processes}"
    )
    flags = [*settings.split(), "--base_model", base, "--output_dir", folder]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    call(*launcher, script, *flags, OMP_NUM_THREADS="1")
    speeds = [
        line["train/tokens_per_second"] for line in metrics(f"{folder}/{processes}", "train/loss")
    ]
    return statistics.median(speeds[2:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--script", default="train_lora.py", choices=("train_lora.py", "train.py"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        shape = dict(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
        )
        save_base(base, vocab_size=2048, **shape)
        ratios = []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as folder:
                one, two = (
                    tokens_per_second(arguments.script, base, folder, processes)
                    for processes in (1, 2)
                )
            ratios.append(two / one)
            print(
                f"1 process {one:.0f} tokens/s, 2 processes {two:.0f} tokens/s: {ratios[-1]:.2f}",
                flush=True,
            )
    print(f"median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
