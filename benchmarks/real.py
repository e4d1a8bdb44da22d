"""A real chat model from beginning to end: what training does to SmolLM2-135M-Instruct.

    pip install -e '.[bench,eval,gguf]'
    PLAINLORA_DATA=... python benchmarks/real.py ROW [--folder DIR]

ROW is one of

    instruct       answers to instructions: LoRA, QLoRA and all weights, before and after
    chat           the assistant's turns of SGD chats: the same
    cite           cite a source or refuse, on the language reference that Python brings along
    cite_json      the same, and the answer is an object of JSON
    gsm8k          word problems: loss and exact match
    learning_rate  five rates of LoRA and of full fine-tuning, two seeds at the best

The base is the one of `real_base.py`: dequantised from Q4_1, not the published weights. Everything
is done by the product's own commands, in float32, and kept in --folder: a row that was interrupted
goes on where it was, and what has ended is not repeated. The results are added to
`results/real.json`, whose tables are `results/real.md`, and ten answers of each row stand in
`results/real_ROW.md`. Intervals are 95 % of a bootstrap over the questions or, for a loss, over the
held-out examples.

Step scorers on this base are measured by `prm.py scorer --base smollm2`, and peers by
`peers.py smollm2`.
"""

import argparse
import json
import os
from pathlib import Path
import pydoc_data.topics

from common import ROOT, call, metrics, read_jsonl, write_jsonl
import numpy as np
from real_base import real_base

from lora.evaluation.statistics import bootstrap_samples, interval_95
from lora.tools.finished_run import FinishedRun
from lora.tools.verdict import interval

DATA = Path(os.environ.get("PLAINLORA_DATA", "data"))
RESULTS = ROOT / "benchmarks" / "results" / "real.json"
PRECISION = ("--dtype", "float32")
QLORA = ("--load_in_4bit", "--bnb_4bit_compute_dtype", "float32")
CITATIONS = ("--citation_pattern", r"\[\d+\]", "--max_new_tokens", "96")
MEASURES = (
    *("exact_answer", "exact_match", "rougeL", "refusal_accuracy", "refusal_rate"),
    *("citation_rate", "citation_accuracy", "citation_precision", "json_validity"),
)
NUM_SHOWN = 10  # answers on the page

Flags = tuple[str, ...]


def train(folder: Path, name: str, script: str, *flags: str) -> Path:
    """Train a run of this name, unless it has ended, and return its folder."""
    run = folder / name
    if not (run / "logs" / "final_results.json").exists():
        place = ("--output_dir", folder, "--experiment_name", name, "--resume_from", "auto")
        base = ("--base_model", real_base(), "--save_steps", "20")
        print(f"{name}: training", flush=True)
        call(script, *base, *PRECISION, *flags, *place)
    return run


def evaluate(folder: Path, name: str, *flags: str) -> tuple[dict, list[dict]]:
    """Return the numbers of an evaluation and its answers, which are measured once."""
    numbers, answers = folder / f"{name}.json", folder / f"{name}.generations.jsonl"
    if not answers.exists():  # they are written last
        print(f"{name}: evaluating", flush=True)
        call("eval.py", *PRECISION, *flags, "--output", numbers)
    return json.loads(numbers.read_text()), read_jsonl(answers)


def with_intervals(answers: list[dict]) -> dict[str, list[float]]:
    """Return of each measure that answers have its mean, and the ends of its interval."""
    found = {}
    for name in MEASURES:
        values = np.array([answer[name] for answer in answers if name in answer], float)
        if len(values):
            means = [values[sample].mean() for sample in bootstrap_samples(len(values))]
            found[name] = [round(value, 4) for value in (values.mean(), *interval_95(means))]
    return found


def summarise(numbers: dict, answers: list[dict]) -> dict:
    loss = {key: round(numbers[key], 4) for key in ("loss", "perplexity") if key in numbers}
    return loss | {"questions": len(answers)} | with_intervals(answers)


def losses_of(run: Path) -> list[list[float]]:
    """Return [step, validation loss] of each evaluation of a run."""
    return [[line["step"], round(line["val/loss"], 4)] for line in metrics(run, "val/loss")]


def before_and_after(
    folder: Path, runs: dict[str, Flags], held_out: str, questions: str, config: Flags, *ask: str
) -> dict:
    """Train the runs, and measure the loss and the answers of the base and of each of them.

    Args:
        runs: names -> script and flags.
        held_out: the file of the loss.
        questions: the file whose last answers are generated.
        config: flags of all runs.
        ask: flags of all evaluations.
    """
    measured = ("--eval_data", held_out, "--test_set", questions, *ask)
    base = ("--base_model", str(real_base()), "--task", "lm")
    numbers, answers = evaluate(folder, "before", *base, *measured)
    found, texts = {"before": summarise(numbers, answers)}, {"before": answers}
    for name, (script, *flags) in runs.items():
        run = train(folder, name, script, *config, *flags)
        checkpoint = ("--checkpoint", str(run / "final_artifact"))
        numbers, answers = evaluate(folder, f"{name}_answers", *checkpoint, *measured)
        found[name] = summarise(numbers, answers) | {"validation_loss": losses_of(run)}
        texts[name] = answers
    write_answers(folder, texts)
    return found


def write_answers(folder: Path, texts: dict[str, list[dict]]) -> None:
    """Write the first answers of the base and of each run, side by side, as a page."""
    page = [f"# {folder.name}: ten answers before and after training\n"]
    for i in range(NUM_SHOWN):
        first = texts["before"][i]
        page.append(f"## {i + 1}\n\n{quoted(first['prompt'])}\n\n| | |\n|---|---|")
        page.append(f"| expected | {cell(first['reference'])} |")
        page += [f"| {name} | {cell(answers[i]['answer'])} |" for name, answers in texts.items()]
        page.append("")
    path = RESULTS.parent / f"real_{folder.name}.md"
    path.write_text("\n".join(page))


def quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())


def cell(text: str) -> str:
    escaped = text.strip().replace("|", "\\|").replace("<", "&lt;")
    return escaped.replace("\n", "<br>")


def methods(lora_rate: str, full_rate: str) -> dict[str, Flags]:
    lora = ("train_lora.py", "--lora_r", "16", "--lora_alpha", "32", "--learning_rate", lora_rate)
    return {
        "lora": lora,
        "qlora": (*lora, *QLORA),
        "full": ("train.py", "--learning_rate", full_rate),
    }


def instructions(folder: Path) -> tuple[str, str]:
    """Write the instructions to train on and the 110 that are held out; return the two files."""
    rows = json.loads((DATA / "rasbt_instruct" / "instruction-data.json").read_text())
    training = write_jsonl(folder / "train.jsonl", rows[:-110])
    return training, write_jsonl(folder / "test.jsonl", rows[-110:])


def instruct(folder: Path) -> dict:
    training, test = instructions(folder)
    config = ("--task", "lm", "--train_data", training, "--eval_data", test)
    steps = ("--batch_size", "16", "--gradient_accumulation_steps", "1", "--num_train_epochs", "1")
    config += (*steps, "--warmup_ratio", "0.03", "--eval_steps", "31")
    runs = methods("5e-4", "5e-5")
    return before_and_after(folder, runs, test, test, config, "--max_new_tokens", "128")


def chat(folder: Path) -> dict:
    training = str(DATA / "sgd_chat" / "train.jsonl")
    rows = read_jsonl(DATA / "sgd_chat" / "valid.jsonl")[::12]
    test = write_jsonl(folder / "test.jsonl", rows)
    steps = ("--batch_size", "8", "--gradient_accumulation_steps", "1", "--max_steps", "40")
    config = ("--task", "lm", "--train_data", training, "--eval_data", test, *steps)
    config += ("--warmup_ratio", "0.05", "--eval_steps", "20")
    runs = methods("5e-4", "5e-5")
    return before_and_after(folder, runs, test, test, config, "--max_new_tokens", "64")


def cite(folder: Path) -> dict:
    return cite_or_refuse(folder, ("--refusal_pattern", r"^\s*The sources do not say"))


def cite_json(folder: Path) -> dict:
    ask = ("--refusal_pattern", '"answer": null', "--json_keys", "answer", "sources")
    return cite_or_refuse(folder, ask, "--templates", ROOT / "benchmarks" / "cite_json.toml")


def cite_or_refuse(folder: Path, ask: Flags, *templates: str | Path) -> dict:
    """Python's language reference (PSF licence) is in the standard library, for `help()`."""
    if not (folder / "cited").exists():
        topics = pydoc_data.topics.topics.items()
        corpus = [{"title": name, "text": prose(text)} for name, text in sorted(topics)]
        write_jsonl(folder / "corpus.jsonl", corpus)
        command = ("-m", "lora", "cite_or_refuse", folder / "corpus.jsonl", *templates)
        call(*command, "--output", folder / "cited")
    training, test = (str(folder / "cited" / name) for name in ("train.jsonl", "test.jsonl"))
    config = ("--config", "configs/cite_or_refuse.toml", "--train_data", training)
    config += ("--eval_data", test, "--num_train_epochs", "1", "--eval_steps", "30")
    lora = ("train_lora.py", "--learning_rate", "5e-4")
    return before_and_after(folder, {"lora": lora}, test, test, config, *CITATIONS, *ask)


def prose(text: str) -> str:
    """Return the paragraphs of a topic that are neither code, grammar, lists nor underlines."""
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph[:1].isalpha()]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def gsm8k(folder: Path) -> dict:
    training = str(DATA / "gsm8k" / "train.jsonl")
    questions = read_jsonl(DATA / "gsm8k" / "test.jsonl")[::4]
    test = write_jsonl(folder / "test.jsonl", questions)
    held_out = write_jsonl(folder / "held_out.jsonl", questions[::3])
    config = ("--config", "configs/gsm8k_lora.toml", "--train_data", training)
    config += ("--eval_data", held_out, "--max_steps", "60", "--eval_steps", "30")
    memory = ("--batch_size", "4", "--gradient_accumulation_steps", "4")  # 16 at once hold 12 GB
    runs = {"lora": ("train_lora.py", "--learning_rate", "5e-4", *memory)}
    return before_and_after(folder, runs, held_out, test, config, "--max_new_tokens", "256")


def learning_rate(folder: Path) -> dict:
    """60 steps of 8 instructions at each rate; the best rate of each method with another seed."""
    training, test = instructions(folder)
    steps = ("--batch_size", "8", "--gradient_accumulation_steps", "1", "--max_steps", "60")
    config = ("--task", "lm", "--train_data", training, "--eval_data", test, *steps)
    config += ("--warmup_ratio", "0.05", "--eval_steps", "60")
    rates = {
        "lora": ("train_lora.py", ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")),
        "full": ("train.py", ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3")),
    }
    found = {}
    for name, (script, of_method) in rates.items():
        ends = {}
        for rate in of_method:
            run = train(folder, f"{name}_{rate}", script, *config, "--learning_rate", rate)
            ends[rate] = last_losses(run)
        best = min(ends, key=lambda rate: ends[rate]["loss"])
        again = ("--learning_rate", best, "--seed", "1")
        run = train(folder, f"{name}_{best}_seed1", script, *config, *again)
        found[name] = {"rates": ends, "best": best, "another_seed": last_losses(run)}
    return found


def last_losses(run: Path) -> dict:
    """Return the loss before and after, and the interval of that after, over the examples."""
    curve = losses_of(run)
    step, loss = curve[-1]
    sums, targets = zip(*FinishedRun.of(str(run)).example_losses(step).values())
    _, ends = interval(sums, targets)
    rounded = [round(end, 4) for end in ends]
    return {"before": curve[0][1], "loss": loss, "interval": rounded}


def tables(results: dict) -> str:
    """Return the results of all rows as a page."""
    lines = [
        f"# {__doc__.splitlines()[0]}",
        "",
        "Dequantised from Q4_1, not the published weights.",
    ]
    for row, found in results.items():
        lines += ["", f"## {row}", "", f"`{found['command']}`", ""]
        if row == "learning_rate":
            lines += rates_table(found)
        else:
            lines += answers_table({k: v for k, v in found.items() if k != "command"})
    return "\n".join(lines) + "\n"


def rates_table(found: dict) -> list[str]:
    lines = ["| method | learning rate | loss before | loss after |", "|---|---|---|---|"]
    for method in ("lora", "full"):
        of_method = found[method]
        best = of_method["best"]
        ends = of_method["rates"] | {f"{best}, another seed": of_method["another_seed"]}
        for rate, end in ends.items():
            after = with_range([end["loss"], *end["interval"]])
            lines.append(f"| {method} | {rate} | {end['before']:.3f} | {after} |")
    return lines


def answers_table(found: dict[str, dict]) -> list[str]:
    measures = [name for name in ("loss", *MEASURES) if name in found["before"]]
    lines = [f"| | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
    for name, of_run in found.items():
        values = [of_run.get(measure) for measure in measures]
        cells = [with_range(value if isinstance(value, list) else [value]) for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def with_range(values: list[float]) -> str:
    """Return "value", or "value (low to high)"."""
    value, *ends = values
    if value is None:  # as the precision of citations where there are none
        return ""
    return f"{value:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


ROWS = {row.__name__: row for row in (instruct, chat, cite, cite_json, gsm8k, learning_rate)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "real")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve() / arguments.row
    folder.mkdir(parents=True, exist_ok=True)
    found = ROWS[arguments.row](folder)
    found["command"] = f"python benchmarks/real.py {arguments.row}"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {arguments.row: found}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(tables(results))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
