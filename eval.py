"""Evaluate a checkpoint, a final artifact or a base: its loss, its answers, its embeddings; or try it by hand.

    python eval.py --checkpoint outputs/RUN/final_artifact [--eval_data FILE ...] [--output results.json]
    python eval.py --checkpoint outputs/RUN/final_artifact --test_set FILE [--critical_questions FILE]
    python eval.py --checkpoint outputs/RUN/final_artifact --test_queries FILE --corpus FILE
    python eval.py --checkpoint outputs/RUN/final_artifact --prompt 'Start with 12, add 9.
    12+9=21'
    python eval.py --checkpoint SCORER --test_set FILE [--html page.html] [--reliability picture.png]
    python eval.py --base_model FOLDER --task lm --eval_data FILE
    python eval.py --verify_only --artifact_dir outputs/RUN/final_artifact

A checkpoint brings its configuration along: where nothing else is asked for, it is evaluated on what its run held out,
all of it. What answers are measured by stands in lora/text_metrics.py, what scores of steps are in lora/prm_metrics.py.
"""

from dataclasses import dataclass, field
import json
from importlib.util import find_spec
import math
from pathlib import Path
import sys

from lora import retrieval
from lora.checksums import require_as_written, verify_artifact
from lora.command_line import Parser, add_flags, set_given
from lora.config import Config, from_file, max_batch_tokens, saved_config, tables_of
from lora.errors import UserError, one_line_errors, require_one_process
from lora.readers import Example, read, read_data
from lora.text_metrics import Question, check_patterns, means, passes, read_questions, rouge_scorer, scores

KEYS = (
    *("base_model", "task", "max_length", "label_max", "batch_size", "seed", "device", "dtype"),
    *("max_new_tokens", "temperature", "refusal_pattern", "citation_pattern", "json_keys"),
    *("max_steps_per_example", "neutral_label", "threshold", "tune_threshold_on"),
)


@dataclass
class Asked:
    """What a call of eval.py is to find out, read from its files."""

    examples: list[Example] = field(default_factory=list)  # whose loss is measured, or the steps of --prompt
    test_set: list[Question] = field(default_factory=list)
    critical: list[Question] = field(default_factory=list)
    corpus: dict[str, str] = field(default_factory=dict)
    queries: list[tuple[str, set[int]]] = field(default_factory=list)


def read_arguments(argv):
    """(arguments, configuration of the checkpoint or of the base)."""
    parser = Parser(__doc__.splitlines()[0])
    help = "checkpoint_step_N, final_artifact, or a merged scorer"
    parser.add_argument("--checkpoint", "--artifact_dir", metavar="DIR", help=help)
    parser.add_argument("--verify_only", action="store_true", help="only prove that the artifact is as it was written")
    parser.add_argument("--config", metavar="FILE", help="TOML or JSON as for training, where there is no checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", help="what to answer; for a scorer a problem, and its steps below it")
    parser.add_argument("--ignore_chat_template", action="store_true", help="go on with the text of --prompt as it is")
    parser.add_argument("--eval_data", nargs="+", metavar="FILE", help="held-out files; default: the checkpoint's")
    parser.add_argument("--test_set", metavar="FILE", help="chats whose last answers are measured, or steps to be coloured")
    parser.add_argument("--html", metavar="FILE", help="of a scorer: the coloured steps as a page, to this new file")
    parser.add_argument("--reliability", metavar="FILE", help="of a scorer: the picture of its calibration (matplotlib)")
    parser.add_argument("--critical_questions", metavar="FILE", help="the same, each question with PASS or FAIL")
    parser.add_argument("--test_queries", metavar="FILE", help="rows of query and relevant (ids of the corpus)")
    parser.add_argument("--corpus", metavar="FILE", help="rows of id and text")
    parser.add_argument("--output", metavar="FILE", help="write the numbers to this JSON file too, the answers beside it")
    for table in tables_of(Config()).values():
        add_flags(parser, table, KEYS, "the checkpoint's")
    arguments = parser.parse_args(argv)

    if arguments.verify_only:
        verify(arguments.checkpoint)
    if arguments.checkpoint and arguments.config:
        raise UserError("--checkpoint brings its configuration along; leave --config out, and override keys with flags.")
    if arguments.checkpoint:
        require_as_written(arguments.checkpoint)
        config = saved_config(arguments.checkpoint)
    else:
        config = from_file(arguments.config) if arguments.config else Config()
    whole = whole_model(arguments.checkpoint)
    if whole and arguments.base_model:
        raise UserError(f"--base_model {arguments.base_model}: {arguments.checkpoint} holds a whole model; leave it out.")
    if whole:
        config.model.base_model, config.model.init_from = whole, ""
    set_given(config, arguments, KEYS)
    refuse_what_does_not_go_together(arguments, config)
    check_patterns(config.evaluation)
    return arguments, config


def verify(folder):
    """Say that the artifact is whole, and end there, as --help does."""
    if not folder:
        raise UserError("--verify_only: no artifact is named; add --artifact_dir DIR.")
    verify_artifact(folder)
    print(f"{folder}: verified: every file is as it was written")
    raise SystemExit


def refuse_what_does_not_go_together(arguments, config):
    others = arguments.test_set or arguments.critical_questions or arguments.eval_data or arguments.test_queries
    if arguments.output and not Path(arguments.output).resolve().parent.is_dir():
        raise UserError(f"--output {arguments.output}: its folder is not there; make it first.")
    if arguments.output and Path(arguments.output).is_dir():
        raise UserError(f"--output {arguments.output}: a folder; expected the name of a file.")
    if not config.model.base_model:
        raise UserError("nothing to evaluate: add --checkpoint DIR, or --base_model FOLDER.")
    if arguments.prompt is None and not (others or config.data.train_paths):
        raise UserError("no data: add --eval_data FILE, or --prompt TEXT.")
    if arguments.prompt is not None and (others or arguments.output):
        raise UserError("--prompt goes with no files and no --output; call eval.py once for each.")
    if arguments.ignore_chat_template and arguments.prompt is None:
        raise UserError("--ignore_chat_template is for --prompt; add it, or leave this out.")
    if (arguments.test_queries is None) != (arguments.corpus is None):
        raise UserError("--test_queries and --corpus go together; add the other one.")
    if config.model.task == "score" and arguments.critical_questions:
        raise UserError("--critical_questions is for --task lm: a scorer gives no answers; leave it out.")
    if config.model.task == "score" and arguments.test_set and arguments.eval_data:
        raise UserError("--test_set and --eval_data: of a scorer both are files of steps; name all in one of them.")
    for name in ("html", "reliability"):
        path = getattr(arguments, name)
        if path and config.model.task != "score":
            raise UserError(f"--{name} is for --task score; leave it out.")
        if path and (Path(path).exists() or not Path(path).resolve().parent.is_dir()):
            raise UserError(f"--{name} {path}: expected a file that is not there yet, in a folder that is.")
    if arguments.reliability and (arguments.prompt is not None or find_spec("matplotlib") is None):
        raise UserError("--reliability: needs labelled steps (no --prompt), and matplotlib: pip install 'plainlora[plot]'.")


def whole_model(checkpoint):
    """The folder in which a checkpoint holds a whole model (trained in full, or merged), or ""."""
    folders = [Path(checkpoint) / "backbone", Path(checkpoint)] if checkpoint else []
    return next((str(folder) for folder in folders if (folder / "config.json").is_file()), "")


def read_examples(arguments, config):
    """What is Asked: the steps of the prompt, the files named, or what the checkpoint's run held out."""
    asked = Asked()
    if arguments.prompt is not None:
        if config.model.task == "score":
            problem, *steps = [line for line in arguments.prompt.split("\n") if line.strip()] or [""]
            if not steps:
                raise UserError("--prompt: expected a problem on the first line and steps below it, for a scorer.")
            asked.examples = [Example("--prompt", prompt=problem, steps=steps, labels=[None] * len(steps))]
        elif not arguments.prompt.strip():
            raise UserError("--prompt: expected a text that is not empty.")
        return asked
    if config.model.task == "score" and arguments.test_set:
        asked.examples = read([arguments.test_set], "score", config.data)
    elif arguments.test_set:
        asked.test_set = read_questions(arguments.test_set)
    if arguments.critical_questions:
        asked.critical = read_questions(arguments.critical_questions)
    if arguments.test_queries:
        asked.corpus = retrieval.read_corpus(arguments.corpus)
        asked.queries = retrieval.read_queries(arguments.test_queries, asked.corpus)
    if arguments.eval_data:
        asked.examples = read(arguments.eval_data, config.model.task, config.data)
    elif not (asked.examples or asked.test_set or asked.critical or asked.queries):
        asked.examples = read_data(config)[1]
    return asked


if __name__ == "__main__":  # above torch, as in train.py
    with one_line_errors():
        require_one_process()
        arguments, config = read_arguments(sys.argv[1:])
        asked = read_examples(arguments, config)

from train import predict  # before torch: it sets the allocators

import numpy as np
import torch
from tqdm import tqdm

from lora import prm_metrics, prm_page
from lora.baseline import file_sums, other_base
from lora.generate import answers, embed, prompt_tokens, step_scores, text_tokens
from lora.log import without_nan
from lora.model import choose_device, choose_dtype, load_task
from lora.mixing import names_of
from lora.show import printable
from lora.store import describe, tokenise


def load(arguments, config, device):
    """The task with its trained weights, on `device`."""
    task = load_task(config, torch.float32)
    if whole_model(arguments.checkpoint):
        task.load_head(arguments.checkpoint)
    elif arguments.checkpoint:
        task.load(arguments.checkpoint)
        if warning := other_base(arguments.checkpoint, config.model.base_model, file_sums(config.model)):
            print(warning)
    elif config.model.task == "score":
        print("note: a base has no score head; this one is untrained")
    return task.to(device)


def loss_numbers(examples, task, config, dtype):
    rows, facts = tokenise(examples, task, config, "eval")
    batches = rows.batches(range(len(rows)), max_batch_tokens(config), task.packed)
    said, targets, _ = predict(task, tqdm(batches, unit="batch", disable=None), task.model.device, dtype)
    print(describe("eval", facts))
    numbers = task.head.metrics(said, targets)
    text = task.tokenizer.decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    size = len(text.encode()) or math.nan
    return numbers | {"bits_per_byte": numbers["loss"] * len(targets) / math.log(2) / size}


def answer_rows(questions, task, config, dtype):
    """(a dict for each question: where, prompt, reference, answer and its scores; the means of the scores)."""
    prompts = [(q.where, prompt_tokens(q.where, q.messages, q.tools, task.tokenizer)) for q in questions]
    texts = answers(task, prompts, config, dtype)
    rouge = rouge_scorer()
    measured = [scores(text, q.reference, config.evaluation, rouge) for q, text in zip(questions, texts)]
    rows = [
        {"where": q.where, "prompt": task.tokenizer.decode(tokens), "reference": q.reference, "answer": text, **of_row}
        for q, (_, tokens), text, of_row in zip(questions, prompts, texts, measured)
    ]
    return rows, means(measured)


def retrieval_numbers(asked, task, config, dtype):
    texts = [*asked.corpus.values(), *(query for query, _ in asked.queries)]
    embeddings = embed(task, texts, config, dtype)
    corpus, queries = embeddings[: len(asked.corpus)], embeddings[len(asked.corpus) :]
    return retrieval.metrics(retrieval.ranks_of(queries, corpus, [relevant for _, relevant in asked.queries]))


def judge_steps(arguments, config, asked, task, dtype):
    """Score the steps that are asked for; show them where that is asked for; the numbers, where they have labels."""
    examples, settings = asked.examples, config.evaluation
    scores = step_scores(examples, task, config, dtype)
    unread = sum(int(np.isnan(of).sum()) for of in scores)
    if unread:
        total = sum(map(len, scores))
        print(f"note: {unread} of {total} steps do not fit max_length {config.data.max_length} and have no score")
    if arguments.prompt is not None or arguments.test_set:
        for example, of_steps in zip(examples, scores):
            print("" if arguments.prompt is not None else f"\n{example.where}\n{printable(example.prompt)}\n", end="")
            print("\n".join(prm_page.lines(example, of_steps, settings.threshold, sys.stdout.isatty())))
    numbers, table = {}, []
    if prm_metrics.measured(examples, scores).size:
        numbers, table = labelled_numbers(arguments, config, examples, scores, task)
    for name, (value, ends) in prm_metrics.best_of_n(examples, scores).items():
        numbers[f"best_of_n/{name}"] = value
        numbers.setdefault("intervals", {}).setdefault("best_of_n", {})[name] = ends
        table.append([f"best of n, {name}", prm_page.number(value, ends)])
    if arguments.html:
        title = f"{arguments.checkpoint or config.model.base_model}: scores of steps"
        text = prm_page.page(title, examples, scores, settings.threshold, table)
        Path(arguments.html).write_text(text, encoding="utf-8")
    for name, *cells in table:
        print(f"{name:>24}  " + "  ".join(f"{cell:24}" for cell in cells).rstrip())
    return numbers


def labelled_numbers(arguments, config, examples, scores, task):
    """(numbers, the table that shows them) of scored steps with labels."""
    paths = arguments.eval_data or ([arguments.test_set] if arguments.test_set else config.data.eval_paths)
    measured = {e.source for e, of in zip(examples, scores) if prm_metrics.measured([e], [of]).size}
    names = {name: source for source, name in enumerate(names_of(paths)) if source in measured}
    found = prm_metrics.report(examples, scores, config.evaluation, names if len(names) > 1 else {})
    labels, said = prm_metrics.measured(examples, scores)
    loss = task.head.metrics(torch.from_numpy(said), torch.from_numpy(labels))["loss"]
    print(f"{len(labels)} labelled steps, {(labels >= 0.5).mean():.1%} of them right; loss {loss:.6f}")
    if config.evaluation.tune_threshold_on:
        at = ", ".join(f"{value:g} ({name})" for name, value in found["thresholds"].items())
        print(f"thresholds tuned on {config.evaluation.tune_threshold_on}: {at}")
    if arguments.reliability:
        prm_metrics.reliability_picture(arguments.reliability, said, labels)
    return {"loss": loss} | found["measures"]["scores"] | found, prm_page.table(found)


def measure_language(config, asked, task, dtype):
    """(numbers, the rows of the answers, the verdicts on critical questions) of a language model."""
    numbers, rows, verdicts = {}, [], []
    if asked.examples:
        numbers |= loss_numbers(asked.examples, task, config, dtype)
    if asked.test_set:
        rows, of_set = answer_rows(asked.test_set, task, config, dtype)
        numbers |= of_set
    if asked.critical:
        of_critical, of_set = answer_rows(asked.critical, task, config, dtype)
        for question, row in zip(asked.critical, of_critical):
            row["passed"] = passes(row["answer"], row["reference"], config.evaluation)
            asked_last = question.messages[-1]["content"]
            verdicts.append({"where": question.where, "question": asked_last, "passed": row["passed"]})
            last_line = printable(asked_last).strip().rpartition("\n")[2]
            print(f"{'PASS' if row['passed'] else 'FAIL'}  {question.where}  {last_line}")
        rows += of_critical
        of_set |= {"passed": sum(row["passed"] for row in of_critical) / len(of_critical)}
        numbers |= {f"critical/{name}": value for name, value in of_set.items()}
    return numbers, rows, verdicts


def answer_prompt(arguments, config, task, dtype):
    if arguments.ignore_chat_template:
        tokens = text_tokens(arguments.prompt, task.tokenizer)
    else:
        tokens = prompt_tokens("--prompt", [{"role": "user", "content": arguments.prompt}], None, task.tokenizer)
    print(printable(answers(task, [("--prompt", tokens)], config, dtype)[0]))


def show(numbers):
    width = max(12, *map(len, numbers), 0)
    for name, value in numbers.items():
        print(f"{name:>{width}} {value:.6f}")
    return numbers


def main(arguments, config, asked):
    device = choose_device(config.training.device)
    dtype = choose_dtype(config, device)
    task = load(arguments, config, device)
    numbers, rows, verdicts = {}, [], []
    if config.model.task == "score" and asked.examples:
        numbers = judge_steps(arguments, config, asked, task, dtype)
    elif arguments.prompt is not None:
        answer_prompt(arguments, config, task, dtype)
    else:
        numbers, rows, verdicts = measure_language(config, asked, task, dtype)
        show(numbers)
    if asked.queries:
        numbers |= show(retrieval_numbers(asked, task, config, dtype))
    if arguments.output:
        results = without_nan(numbers) | ({"critical_questions": verdicts} if verdicts else {})
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")
        if rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            Path(arguments.output).with_suffix(".generations.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, config, asked)
