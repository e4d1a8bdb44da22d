"""Evaluate a checkpoint, a final artifact or a base: its loss, its answers, its embeddings; or try
it by hand.

    python eval.py --checkpoint outputs/RUN/final_artifact [--eval_data FILE ...] [--output results.json]
    python eval.py --checkpoint outputs/RUN/final_artifact --test_set FILE [--critical_questions FILE]
    python eval.py --checkpoint outputs/RUN/final_artifact --test_queries FILE --corpus FILE
    python eval.py --checkpoint outputs/RUN/final_artifact --prompt 'Start with 12, add 9.
    12+9=21'
    python eval.py --checkpoint SCORER --test_set FILE [--html page.html] [--reliability picture.png]
    python eval.py --base_model FOLDER --task lm --eval_data FILE
    python eval.py --verify_only --artifact_dir outputs/RUN/final_artifact

A checkpoint brings its configuration along: where nothing else is asked for, it is evaluated on
what its run held out, all of it. Answers are measured by lora/evaluation/text_metrics.py, scores of
steps by lora/evaluation/step_metrics.py.
"""

import json
from pathlib import Path
import sys

from lora.common.allocator import keep_freed_memory
from lora.common.exit_status import one_line_errors, require_one_process
from lora.evaluation.arguments import read_arguments, read_examples, whole_model
from lora.evaluation.text_metrics import passes

if __name__ == "__main__":
    # Above `import torch`: torch reads the allocators' settings when it is imported, and a mistake
    # in the command line or the data is reported before the seconds that importing torch takes.
    keep_freed_memory()
    with one_line_errors():
        require_one_process()
        arguments, config = read_arguments(sys.argv[1:])
        asked = read_examples(arguments, config)

import torch

from lora.common.serialization import without_nan
from lora.common.terminal import printable
from lora.evaluation.generate import answers, prompt_tokens, text_tokens
from lora.evaluation.measure import answer_rows, judge_steps, loss_numbers, retrieval_numbers
from lora.model.device import choose_device, choose_dtype
from lora.model.load import load_task
from lora.training.base_integrity import file_sums, warn_other_base


def load(arguments, config, device):
    """The task with its trained weights, on `device`."""
    task = load_task(config, torch.float32)
    if whole_model(arguments.checkpoint):
        task.load_head(arguments.checkpoint)
    elif arguments.checkpoint:
        task.load(arguments.checkpoint)
        if warning := warn_other_base(
            arguments.checkpoint, config.model.base_model, file_sums(config.model)
        ):
            print(warning)
    elif config.model.task == "score":
        print("note: a base has no score head; this one is untrained")
    return task.to(device)


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
            verdicts.append(
                {"where": question.where, "question": asked_last, "passed": row["passed"]}
            )
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
        tokens = prompt_tokens(
            "--prompt", [{"role": "user", "content": arguments.prompt}], None, task.tokenizer
        )
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
            Path(arguments.output).with_suffix(".generations.jsonl").write_text(
                "".join(lines), encoding="utf-8"
            )


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, config, asked)
