"""Evaluate a checkpoint, a final artifact or a base; or score the steps of a text by hand.

    python eval.py --checkpoint outputs/RUN/final_artifact [--eval_data FILE ...] [--output results.json]
    python eval.py --checkpoint outputs/RUN/final_artifact --prompt 'Start with 12, add 9.
    12+9=21'
    python eval.py --base_model FOLDER --task lm --eval_data FILE

A checkpoint brings its configuration along: without --eval_data it is evaluated on what the run held out, all of it.
"""

import json
from pathlib import Path
import sys

from lora.command_line import Parser
from lora.config import Config, saved_config, set_key
from lora.errors import UserError, one_line_errors
from lora.readers import Example, read, read_data


def read_arguments(argv):
    """(arguments, configuration of the checkpoint or of the base)."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint_step_N, final_artifact, or a merged scorer")
    parser.add_argument("--prompt", metavar="TEXT", help="a problem on the first line, its steps on the lines below it")
    parser.add_argument("--output", metavar="FILE", help="write the numbers to this JSON file too")
    own = ("base_model", "task", "max_length", "label_max", "batch_size", "device", "dtype")
    for name in own:
        parser.add_argument(f"--{name}", metavar="X", help="as in train.py; default: the checkpoint's")
    parser.add_argument("--eval_data", nargs="+", metavar="FILE", help="held-out files; default: the checkpoint's")
    arguments = parser.parse_args(argv)
    config = saved_config(arguments.checkpoint) if arguments.checkpoint else Config()
    whole = whole_model(arguments.checkpoint)
    if whole:
        config.model.base_model, config.model.init_from = whole, ""
    for name in own:
        if getattr(arguments, name) is not None:
            set_key(config, name, getattr(arguments, name), f"--{name}", from_text=True)
    if arguments.output and not Path(arguments.output).resolve().parent.is_dir():
        raise UserError(f"--output {arguments.output}: no such folder.")
    if not config.model.base_model:
        raise UserError("nothing to evaluate: add --checkpoint DIR, or --base_model FOLDER.")
    if arguments.prompt is None and not (arguments.eval_data or config.data.train_data):
        raise UserError("no data: add --eval_data FILE, or --prompt TEXT.")
    return arguments, config


def whole_model(checkpoint):
    """The folder in which a checkpoint holds a whole model (trained in full, or merged), or ""."""
    folders = [Path(checkpoint) / "backbone", Path(checkpoint)] if checkpoint else []
    return next((str(folder) for folder in folders if (folder / "config.json").is_file()), "")


def read_examples(arguments, config):
    """What is to be scored: the steps of the prompt, the files named, or what the checkpoint's run held out."""
    if arguments.prompt is not None:
        problem, *steps = [line for line in arguments.prompt.split("\n") if line.strip()] or [""]
        if config.model.task != "score" or not steps:
            raise UserError("--prompt: expected a problem on the first line and steps below it, for a scorer.")
        return [Example("--prompt", prompt=problem, steps=steps, labels=[0.0] * len(steps))]
    if arguments.eval_data:
        return read(arguments.eval_data, config.model.task, config.data.label_max)
    return read_data(config)[1]


if __name__ == "__main__":  # above torch, as in train.py
    with one_line_errors():
        arguments, config = read_arguments(sys.argv[1:])
        examples = read_examples(arguments, config)

from train import predict  # before torch: it sets the allocator up

import torch
from tqdm import tqdm

from lora import metrics
from lora.log import without_nan
from lora.model import choose_device, choose_dtype, load_task
from lora.store import describe, tokenise


def main(arguments, config, examples):
    device = choose_device(config.training.device)
    dtype = choose_dtype(config.training.dtype, device)
    task = load_task(config, torch.float32)
    if whole_model(arguments.checkpoint):
        task.load_head(arguments.checkpoint)
    elif arguments.checkpoint:
        task.load(arguments.checkpoint)
    elif config.model.task == "score":
        print("note: a base has no score head; this one is untrained")
    rows, facts = tokenise(examples, task, config, "eval")
    batches = rows.batches(range(len(rows)), config.training.batch_size * config.data.max_length, task.packed)
    said, targets, _ = predict(task.to(device), tqdm(batches, unit="batch", disable=None), device, dtype)
    if arguments.prompt is not None:
        if len(said) < len(examples[0].steps):
            raise UserError(f"--prompt: longer than max_length {config.data.max_length} tokens.")
        for step, score in zip(examples[0].steps, said.tolist()):
            print(f"{score:.3f}  {step}")
        return
    numbers = task.head.metrics(said, targets)
    if config.model.task == "score":
        pair = said.numpy(), targets.numpy()
        numbers |= {"pearson": metrics.pearson(*pair), "spearman": metrics.spearman(*pair)}
    print(describe("eval", facts))
    for name, value in numbers.items():
        print(f"{name:>12} {value:.6f}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(without_nan(numbers), indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, config, examples)
