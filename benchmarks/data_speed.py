"""Speed and memory of the preparation of data, and of the training that follows.

    python benchmarks/data_speed.py --megabytes 5 100 200 500 --beside 200

For each size of text it prints the preparation ("plainlora"), a start with the data tokenised
before ("again") and five steps of training with an evaluation ("training"). At --beside MB it also
prints the preparation by datasets.map, which must be installed (`pip install datasets`).

The data are the chats of sgd_chat and gsm8k in PLAINLORA_DATA, repeated with a number in each first
message, so that no two prompts are alike. Both sides use the embedded tokenizer and a process per
core. Ours reads, checks, splits, renders, finds the assistant's tokens and writes tokens, targets
and weights. The other side does less: load_dataset, apply_chat_template, tokenizer, in batches.

The memory is the sum of PSS over all processes (Linux), sampled every 50 ms.
"""

import argparse
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

from common import ROOT, read_jsonl


def write_chats(path: Path, megabytes: float) -> None:
    data = Path(os.environ["PLAINLORA_DATA"])
    chats = [row["messages"] for row in read_jsonl(data / "sgd_chat" / "train.jsonl")]
    for row in read_jsonl(data / "gsm8k" / "train.jsonl"):
        question = {"role": "user", "content": row["question"]}
        chats.append([question, {"role": "assistant", "content": row["answer"]}])
    size = number = 0
    with open(path, "w") as file:
        while size < megabytes * 1e6:
            number += 1
            first, *others = chats[number % len(chats)]
            first = {**first, "content": f"{first['content']} ({number})"}
            size += file.write(json.dumps({"messages": [first, *others]}) + "\n")


def config_of(path: str):
    from lora.config.schema import ModelConfig, get_lora_config

    config = get_lora_config()
    config.model = ModelConfig("embedded")
    config.data.train_data, config.data.max_length = [path], 512
    config.training.device, config.training.dtype = "cpu", "float32"
    config.training.max_steps = config.training.eval_steps = 5
    config.training.max_eval_batches = 2
    config.output.output_dir = os.environ["PLAINLORA_CACHE"]
    return config


def ours(path: str) -> dict:
    """Prepare the data, or map what is prepared."""
    import torch

    from lora.data.raw_data import RawData
    from lora.data.sampler import TrainingData
    from lora.data.token_cache import load_or_tokenise
    from lora.model.load import load_task

    config = config_of(path)
    task = load_task(config, torch.float32)
    print("ready", flush=True)
    started = time.monotonic()
    source = RawData(config)
    read = time.monotonic()
    rows, held_out, facts = load_or_tokenise(source, task)
    TrainingData(rows, held_out, config)
    ended = time.monotonic()
    rows.check.require_undamaged()
    checked = time.monotonic() - ended
    tokens = facts["train"]["tokens"] + facts["eval"]["tokens"]
    seconds = ended - started
    return {"tokens": tokens, "seconds": seconds, "read": read - started, "checked": checked}


def train(path: str) -> dict:
    """Train on what is prepared."""
    from lora.config.command_line import Command
    from lora.data.raw_data import RawData
    import train_lora

    config = config_of(path)
    raw_data = RawData(config)
    print("ready", flush=True)
    started = time.monotonic()
    train_lora.main(Command(config, Path(config.output.output_dir) / "run"), raw_data)
    return {"tokens": 0, "seconds": time.monotonic() - started}


def theirs(path: str) -> dict:
    import datasets
    from transformers import AutoTokenizer

    from lora.common.base_model_files import EMBEDDED_BASE
    from lora.data.chat_template import use_chatml

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    use_chatml(tokenizer)

    def tokenise(batch):
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        tokens = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=512)
        return {"input_ids": tokens.input_ids, "length": [len(ids) for ids in tokens.input_ids]}

    print("ready", flush=True)
    started = time.monotonic()
    cache = os.environ["PLAINLORA_CACHE"]
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
    num_proc = os.cpu_count()
    rows = rows.map(tokenise, batched=True, num_proc=num_proc, remove_columns=["messages"])
    rows.train_test_split(0.1)
    seconds = time.monotonic() - started
    return {"tokens": sum(rows["length"]), "seconds": seconds}


SIDES = {"ours": ours, "train": train, "theirs": theirs}


def tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    except OSError:
        pass  # it has ended
    return found


def pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(side: str, path: Path, cache: str) -> dict:
    """Run a side in a process of its own; "peak" and "before" are bytes of PSS."""
    environment = os.environ | {"PLAINLORA_CACHE": cache, "HF_DATASETS_CACHE": cache}
    command = [sys.executable, __file__, "child", side, str(path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None, "its error is above"
    before = peak = pss(process.pid)
    while process.poll() is None:
        peak = max(peak, sum(map(pss, tree(process.pid))))
        time.sleep(0.05)
    assert process.returncode == 0, "its error is above"
    result = json.loads(process.stdout.read().splitlines()[-1])
    return {**result, "before": before, "peak": peak}


def line(side: str, megabytes: float, found: dict) -> str:
    parts = [f"{side}, {megabytes:g} MB of text: {found['seconds']:.1f} s"]
    parts.append(f"{found['cpu']:.1f} s of CPU time with imports")
    if found["tokens"]:
        speed = found["tokens"] / found["seconds"]
        parts.append(f"{found['tokens']:,} tokens, {speed:,.0f} tokens/s")
    if "read" in found:
        parts.append(f"{found['read']:.1f} s of it reading and hashing files")
        parts.append(f"hashes of the arrays {found['checked']:.1f} s more, beside the training")
    added = (found["peak"] - found["before"]) / 1e6
    parts.append(f"peak {found['peak'] / 1e6:.0f} MB, {added:.0f} MB more than before")
    return "; ".join(parts)


def main(sizes: list[float], beside: float | None) -> None:
    for megabytes in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chats.jsonl"
            write_chats(path, megabytes)
            time.sleep(2.1)  # the hash of a file is remembered when it is no longer being written
            cache = f"{folder}/cache"
            sides = {"plainlora": "ours", "again": "ours", "training": "train"}
            if megabytes == beside:
                sides = {"datasets.map": "theirs", **sides}
            for name, side in sides.items():
                folder_of_side = f"{folder}/theirs" if side == "theirs" else cache
                print(line(name, megabytes, measure(side, path, folder_of_side)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        result = SIDES[sys.argv[2]](sys.argv[3])
        result["cpu"] = sum(os.times()[:4])
        print(json.dumps(result), flush=True)
        os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[20.0])
    parser.add_argument("--beside", type=float, metavar="MEGABYTES")
    arguments = parser.parse_args()
    main(arguments.megabytes, arguments.beside)
