"""Evaluate a checkpoint, a final artifact or a base: loss, answers, embeddings; or try it by hand.

    python eval.py --checkpoint RUN/final_artifact [--eval_data FILE ...] [--output results.json]
    python eval.py --checkpoint RUN/final_artifact --test_set FILE [--critical_questions FILE]
    python eval.py --checkpoint RUN/final_artifact --test_queries FILE --corpus FILE
    python eval.py --checkpoint RUN/final_artifact --prompt 'Start with 12, add 9.
    12+9=21'
    python eval.py --checkpoint SCORER --test_set FILE [--html new.html] [--reliability new.png]
    python eval.py --base_model FOLDER --task lm --eval_data FILE
    python eval.py --verify_only --artifact_dir RUN/final_artifact

A checkpoint brings its configuration along. Where no data is named, it is evaluated on all examples
that its run held out. Answers are measured by lora/evaluation/text_metrics.py, scores of steps by
lora/evaluation/step_metrics.py.
"""

from argparse import Namespace
from pathlib import Path
import sys

from lora.common.allocator import keep_freed_memory
from lora.common.exit_status import one_line_errors, require_one_process
from lora.common.signals import begin_loading_torch
from lora.config.schema import Config
from lora.evaluation.eval_arguments import (
    EvaluationRequest,
    full_model_folder,
    read_arguments,
    read_request,
)

if __name__ == "__main__":
    # Above `import torch`: torch reads the allocators' settings when it is imported, and a mistake
    # in the command line or the data is reported before the seconds that importing torch takes.
    keep_freed_memory()
    with one_line_errors():
        require_one_process()
        arguments, config = read_arguments(sys.argv[1:])
        request = read_request(arguments, config)
    begin_loading_torch(is_shown=sys.stdout.isatty())  # a file takes the results alone

import torch

from lora.common.printable_text import printable
from lora.evaluation import run_evaluation
from lora.evaluation.generate import generate_answers, prompt_tokens, text_tokens
from lora.model.device import choose_device, choose_dtype
from lora.model.load import load_task
from lora.model.task import Task
from lora.training.base_integrity import file_sums, warn_other_base


def load(checkpoint: str | None, config: Config, device: torch.device) -> Task:
    """Return the task with the weights of a checkpoint, or of the base alone, on `device`."""
    # As in training: a frozen base is in the dtype it is computed in, and what was trained in fp32.
    full_model = full_model_folder(checkpoint)
    is_frozen = not (full_model or (config.lora and config.lora.modules_to_save))
    dtype = choose_dtype(config, device) if is_frozen else torch.float32
    task = load_task(config, dtype, device=device)
    if full_model:
        task.load_head(checkpoint)
    elif checkpoint:
        task.load(checkpoint)
        warning = warn_other_base(checkpoint, config.model.base_model, file_sums(config.model))
        if warning:
            print(warning)
    elif task.head_is_random:
        print("note: the base has no score head, so the scores are those of random weights")
    return task.to(device)


def answer_prompt(arguments: Namespace, config: Config, task: Task, dtype: torch.dtype) -> str:
    if arguments.ignore_chat_template:
        tokens = text_tokens(arguments.prompt, task.tokenizer)
    else:
        messages = [{"role": "user", "content": arguments.prompt}]
        tokens = prompt_tokens("--prompt", messages, None, task.tokenizer)
    (answer,) = generate_answers(task, [("--prompt", tokens)], config, dtype)
    return answer


def print_numbers(numbers: dict[str, float]) -> None:
    width = max([12, *(len(name) for name in numbers)])
    for name, value in numbers.items():
        text = f"{value:.6f}" if isinstance(value, float) else value
        print(f"{printable(name):>{width}} {text}")


def main(arguments: Namespace, config: Config, request: EvaluationRequest) -> dict:
    """Evaluate, print the results, save them where --output says so, and return the numbers."""
    device = choose_device(config.training.device)
    dtype = choose_dtype(config, device)
    task = load(arguments.checkpoint, config, device)
    results = run_evaluation.Results()
    if config.model.task == "score" and request.examples:
        results = run_evaluation.measure_steps(request, arguments, task, config, dtype)
        numbers = results.numbers
        in_categories = [name for name in numbers if name.startswith(run_evaluation.CATEGORY)]
        print_numbers({name: numbers[name] for name in in_categories})
    elif arguments.prompt is not None:
        print(printable(answer_prompt(arguments, config, task, dtype)))
    else:
        results = run_evaluation.measure_language(request, task, config, dtype)
        print_numbers(results.numbers)
    if request.queries:
        numbers = run_evaluation.measure_retrieval(request, task, config, dtype)
        print_numbers(numbers)
        results.numbers.update(numbers)
    if arguments.output:
        results.save(Path(arguments.output), config.model.task)
    return results.numbers


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, config, request)
