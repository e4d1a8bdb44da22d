"""What a final artifact's model outputs for held-out examples, as a report shows it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup
import numpy as np
import torch

from lora.config.schema import Config
from lora.data.examples import Example
from lora.evaluation.calibration import calibration, expected_calibration_error
from lora.evaluation.eval_arguments import (
    held_out_examples,
    require_recorded_data,
    trained_config,
)
from lora.evaluation.generate import generate_answers, prompt_tokens, step_scores, text_tokens
from lora.evaluation.step_metrics import labelled_steps
from lora.evaluation.step_report import chains
from lora.evaluation.text_metrics import last_question
from lora.model.device import choose_device
from lora.model.task import Task
from lora.tools.charts import Point, chart
from lora.tools.from_python import import_script

MAX_SHOWN_EXAMPLES = 5
MAX_SCORED_EXAMPLES = 200  # for the reliability chart
MAX_TEXT_TOKENS = 80  # of a generated answer, and of the beginning of a text to be continued


@dataclass
class Samples:
    """Scored chains and how well their scores agree with the labels, or answers."""

    answers: list[dict[str, str]] = field(default_factory=list)  # as `answers_to` returns them
    chains: list[dict] = field(default_factory=list)  # as `step_report.chains` returns them
    threshold: float = 0.5
    labelled_steps: int = 0
    calibration_error: float = 0.0
    reliability_chart: Markup = Markup("")


def held_out_samples(artifact: Path) -> Samples:
    """Run the model of a final artifact on held-out examples."""
    config = trained_config(str(artifact))
    # A page is made to be passed on: nothing of another file must come into it. Only the files
    # that this checks are read below.
    require_recorded_data(str(artifact), config)
    device = choose_device(config.training.device)
    task = import_script("eval").load(str(artifact), config, device).eval()
    examples = held_out_examples(config)
    if config.model.task == "score":
        return score_chains(task, examples[:MAX_SCORED_EXAMPLES], config)
    return Samples(answers_to(task, examples[:MAX_SHOWN_EXAMPLES], config))


def score_chains(task: Task, examples: Sequence[Example], config: Config) -> Samples:
    scores = step_scores(examples, task, config, torch.float32)
    shown, shown_scores = examples[:MAX_SHOWN_EXAMPLES], scores[:MAX_SHOWN_EXAMPLES]
    samples = Samples(threshold=config.evaluation.threshold)
    samples.chains = chains(shown, shown_scores, samples.threshold)
    labels, labelled_scores = labelled_steps(examples, scores)
    samples.labelled_steps = len(labels)
    if samples.labelled_steps:
        samples.calibration_error = expected_calibration_error(labelled_scores, labels)
        samples.reliability_chart = reliability_chart(labelled_scores, labels)
    return samples


def reliability_chart(scores: np.ndarray, labels: np.ndarray) -> Markup:
    """Draw the mean label of the steps [n] with about the same score, and the diagonal."""
    bubbles: list[Point] = []
    for mean_score, mean_label, count in calibration(scores, labels):
        bubbles.append((mean_score, mean_label, count / len(scores)))
    curves: dict[str, list[Point]] = {"calibrated": [(0, 0), (1, 1)], "": bubbles}
    return chart("mean label", "mean score", curves)


def answers_to(task: Task, examples: Sequence[Example], config: Config) -> list[dict[str, str]]:
    """Answer the last question of chats; continue texts after their beginning."""
    tokenizer = task.tokenizer
    max_new_tokens = min(MAX_TEXT_TOKENS, config.data.max_length // 2)
    config.evaluation.max_new_tokens = max_new_tokens
    prompts, references = [], []
    for example in examples:
        if example.messages:
            chat = last_question(example)
            if not chat.messages:  # an assistant's message that nobody asked for
                continue
            tokens = prompt_tokens(chat.where, chat.messages, chat.tools, tokenizer)
            prompts.append((example.where, tokens[-(config.data.max_length - max_new_tokens) :]))
            references.append(chat.reference)
        else:
            tokens = text_tokens(example.text, tokenizer)
            length = max(1, min(len(tokens) // 2, max_new_tokens))
            prompts.append((example.where, tokens[:length]))
            references.append(tokenizer.decode(tokens[length : length + max_new_tokens]))
    answers = []
    texts = generate_answers(task, prompts, config, torch.float32)
    for (where, tokens), reference, text in zip(prompts, references, texts):
        answer = {"where": where, "prompt": tokenizer.decode(tokens)}
        answers.append({**answer, "reference": reference, "generated": text})
    return answers
