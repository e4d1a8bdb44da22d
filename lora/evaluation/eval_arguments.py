"""The command line of eval.py, and the files that it names."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.common import saved_files
from lora.common.checkpoint_folders import model_folder
from lora.common.checksums import CHECKSUMS_FILE, file_sha256, verify_checksums
from lora.common.errors import UserError
from lora.common.printable_text import printable
from lora.config.command_line import find_config
from lora.config.cross_checks import require_formats
from lora.config.flags import Parser, add_flags, apply_flags
from lora.config.schema import Config, tables_of
from lora.config.set_keys import from_file, saved_config
from lora.data.examples import Example
from lora.data.raw_data import changed_path
from lora.data.readers import read
from lora.data.split import Split
from lora.evaluation.text_metrics import Question, check_settings, read_questions

if TYPE_CHECKING:
    from lora.evaluation.retrieval import Query

SCORE = "A score is the head's estimate of a step's label, from 0 (wrong) to 1 (right)."
MODEL_KEYS = ("base_model", "task", "columns")
PATTERN_KEYS = ("refusal_pattern", "citation_pattern", "json_keys")
ANSWER_KEYS = ("max_new_tokens", "temperature", "top_p", *PATTERN_KEYS)
SCORE_KEYS = (
    "threshold", "tune_threshold_on", "label_max", "max_steps_per_example", "neutral_label",
)  # fmt: skip
MACHINE_KEYS = ("max_length", "batch_size", "seed", "device", "dtype")
KEYS = (*MODEL_KEYS, *ANSWER_KEYS, *SCORE_KEYS, *MACHINE_KEYS)


@dataclass
class EvaluationRequest:
    """What a call of eval.py evaluates, read from its files."""

    examples: list[Example] = field(default_factory=list)  # for the loss, or with steps to score
    test_set: list[Question] = field(default_factory=list)
    critical: list[Question] = field(default_factory=list)
    corpus: dict[str, str] = field(default_factory=dict)
    queries: list[Query] = field(default_factory=list)


def make_parser() -> Parser:
    parser = Parser("Evaluate a checkpoint, a final artifact or a base, or put one question to it.")
    parser.usage = "%(prog)s --checkpoint DIR [--eval_data FILE ...] [--output FILE] [options]"
    parser.epilog = "With --checkpoint, the defaults are those of its run."
    add = parser.add_argument
    checkpoint_help = "a checkpoint_step_N, final_artifact or merged scorer to evaluate"
    add("--checkpoint", "--artifact_dir", metavar="DIR", help=checkpoint_help)
    add_keys(parser, MODEL_KEYS)
    data_help = "held-out files; default: what the checkpoint's run held out"
    add("--eval_data", nargs="+", action="extend", metavar="FILE", help=data_help)
    test_help = "chats whose last answers are generated and measured, or steps to score"
    add("--test_set", metavar="FILE", help=test_help)
    prompt_help = "a question to answer; for a scorer a problem and its steps, one a line"
    add("--prompt", metavar="TEXT", help=prompt_help)
    output_help = "JSON file for the numbers; the answers or the scores of steps go beside it"
    add("--output", metavar="FILE", help=output_help)
    verify_help = "only verify that no file of the artifact has changed"
    add("--verify_only", action="store_true", help=verify_help)
    sha256_help = "sha256 that checksums.json must have, as training printed it at its end"
    add("--expect_sha256", metavar="SHA256", default="", help=sha256_help)
    config_help = "TOML or JSON file as for training, where there is no checkpoint"
    add("--config", metavar="FILE", help=config_help)

    answers = parser.add_argument_group("answers of a language model")
    critical_help = "questions like those of --test_set; each answer is printed as PASS or FAIL"
    answers.add_argument("--critical_questions", metavar="FILE", help=critical_help)
    ignore_help = "continue the text of --prompt, without the chat template"
    answers.add_argument("--ignore_chat_template", action="store_true", help=ignore_help)
    add_keys(answers, ANSWER_KEYS)

    scores = parser.add_argument_group("scores of steps", SCORE)
    html_help = "write a page with the steps in the colours of their scores, to a new file"
    scores.add_argument("--html", metavar="FILE", help=html_help)
    diagram_help = "write a calibration diagram (needs matplotlib) to a new file"
    scores.add_argument("--reliability", metavar="FILE", help=diagram_help)
    add_keys(scores, SCORE_KEYS)

    retrieval = parser.add_argument_group("embeddings, measured by retrieval")
    queries_help = "rows with query and relevant, a list of ids of the corpus"
    retrieval.add_argument("--test_queries", metavar="FILE", help=queries_help)
    retrieval.add_argument("--corpus", metavar="FILE", help="rows with id and text")

    add_keys(parser.add_argument_group("how it is computed"), MACHINE_KEYS)
    return parser


def add_keys(group: Any, names: Sequence[str]) -> None:
    for table in tables_of(Config()).values():
        add_flags(group, table, names)


def read_arguments(argv: Sequence[str]) -> tuple[Namespace, Config]:
    """Return the arguments, and the configuration of the checkpoint or the base."""
    arguments = make_parser().parse_args(argv)
    checkpoint = arguments.checkpoint
    if not checkpoint and (arguments.verify_only or arguments.expect_sha256):
        flag = "--verify_only" if arguments.verify_only else "--expect_sha256"
        raise UserError(f"{flag}: no artifact is named; add --checkpoint DIR.")
    if arguments.verify_only:
        saved_files.verify_artifact(checkpoint, arguments.expect_sha256)
        print(f"{checkpoint}: verified: every file is as it was written")
        print(f"sha256 of its checksums.json: {file_sha256(Path(checkpoint) / CHECKSUMS_FILE)}")
        raise SystemExit
    config = Config()
    if checkpoint and arguments.config:
        mend = "leave --config out, and override keys with flags"
        raise UserError(f"--checkpoint brings its configuration along; {mend}.")
    if checkpoint:
        verify_checksums(checkpoint)
        saved_files.require_sha256(checkpoint, arguments.expect_sha256)
        config = trained_config(checkpoint)
    elif arguments.config:
        config = from_file(find_config(arguments.config))
        if config.model.init_from not in ("", "scratch"):
            hint = "--config evaluates the base alone; name those weights with --checkpoint"
            raise UserError(f"init_from {config.model.init_from}: {hint}.")
    full_model = full_model_folder(checkpoint)
    if full_model and arguments.base_model:
        holds = f"{checkpoint} holds a whole model"
        raise UserError(f"--base_model {arguments.base_model}: {holds}; leave it out.")
    if checkpoint and config.model.init_from == "scratch" and arguments.seed is not None:
        drawn = "the base's random weights are drawn with the seed of the run"
        raise UserError(f"--seed {arguments.seed}: {drawn}; leave it out.")
    apply_flags(config, arguments, KEYS)
    if arguments.temperature == 0 and arguments.top_p is None:
        config.evaluation.top_p = 1.0  # a run's own is for sampling
    require_formats(config.data)
    check_combinations(arguments, config)
    check_scorer_flags(arguments, config.model.task == "score")
    check_settings(config.evaluation)
    return arguments, config


def check_combinations(arguments: Namespace, config: Config) -> None:
    """Raise UserError where there is nothing to do, or flags do not go together."""
    output, has_prompt = arguments.output, arguments.prompt is not None
    questions = arguments.test_set or arguments.critical_questions
    files = questions or arguments.eval_data or arguments.test_queries
    if output and not Path(output).resolve().parent.is_dir():
        raise UserError(f"--output {output}: its folder is not there; make it first.")
    if output and Path(output).exists() and not Path(output).is_file():
        raise UserError(f"--output {output}: a folder or a device; expected the name of a file.")
    check_outputs(arguments, config, has_rows=bool(questions) or config.model.task == "score")
    if not config.model.base_model:
        raise UserError("nothing to evaluate: add --checkpoint DIR, or --base_model FOLDER.")
    if not has_prompt and not files and not config.data.train_paths:
        raise UserError("no data: add --eval_data FILE, or --prompt TEXT.")
    if has_prompt and (files or output):
        raise UserError("--prompt goes with no files and no --output; call eval.py once for each.")
    if arguments.ignore_chat_template and not has_prompt:
        raise UserError("--ignore_chat_template is for --prompt; add it, or leave this out.")
    if (arguments.test_queries is None) != (arguments.corpus is None):
        raise UserError("--test_queries and --corpus go together; add the other one.")


def check_outputs(arguments: Namespace, config: Config, has_rows: bool) -> None:
    """Raise UserError where a file that is to be written would replace another, or an input."""
    inputs = [arguments.test_set, arguments.critical_questions, arguments.config]
    inputs += [arguments.test_queries, arguments.corpus]
    inputs += arguments.eval_data or [*config.data.train_paths, *config.data.eval_paths]
    taken = {Path(name).resolve() for name in inputs if name}
    for flag in ("output", "html", "reliability"):
        name = getattr(arguments, flag)
        if not name:
            continue
        saved_files.refuse_inside_artifact(f"--{flag}", name)
        written = [Path(name).resolve()]
        if flag == "output" and has_rows:
            written.append(rows_path(name, config.model.task))
        for path in written:
            if path in taken:
                twice = f"would replace {path}, which this call reads or writes as well"
                raise UserError(f"--{flag} {name}: {twice}; choose another name.")
            taken.add(path)


def rows_path(output: str | Path, task: str) -> Path:
    """Return the file of answers or scores beside that of --output; a link is written through."""
    path = Path(output).resolve()
    rows = "scores" if task == "score" else "generations"
    return path.with_name(f"{path.name.removesuffix('.json')}.{rows}.jsonl")


def check_scorer_flags(arguments: Namespace, is_scorer: bool) -> None:
    """Raise UserError for flags that a scorer does not know, or that only a scorer knows."""
    if is_scorer and arguments.critical_questions:
        no_answers = "is for --task lm: a scorer gives no answers"
        raise UserError(f"--critical_questions {no_answers}; leave it out.")
    other_task = "lm" if is_scorer else "score"
    for name in PATTERN_KEYS if is_scorer else SCORE_KEYS:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is for --task {other_task}; leave it out.")
    if is_scorer and arguments.test_set and arguments.eval_data:
        both = "of a scorer both are files of steps"
        raise UserError(f"--test_set and --eval_data: {both}; name all in one of them.")
    new_files = {"--html": arguments.html, "--reliability": arguments.reliability}
    for flag, path in new_files.items():
        if path and not is_scorer:
            raise UserError(f"{flag} is for --task score; leave it out.")
        if path and (Path(path).exists() or not Path(path).resolve().parent.is_dir()):
            new_file = "a file that is not there yet, in a folder that is"
            raise UserError(f"{flag} {path}: expected {new_file}.")
    if arguments.reliability and (arguments.prompt is not None or find_spec("matplotlib") is None):
        needs = "labelled steps (no --prompt), and matplotlib: pip install 'plainlora[plot]'"
        raise UserError(f"--reliability: needs {needs}.")


def trained_config(checkpoint: str) -> Config:
    """Return the configuration of a checkpoint's run, with its full model as the base."""
    config = saved_config(checkpoint)
    # Training reads the first N steps. In an evaluation, a chain whose only error comes later would
    # count as right.
    config.data.max_steps_per_example = None
    full_model = full_model_folder(checkpoint)
    if full_model:
        config.model.base_model = full_model
        config.model.init_from = ""
        config.model.head_tokens = []  # its head has been trained since
    return config


def full_model_folder(checkpoint: str | None) -> str:
    """Return where a checkpoint holds a full model (trained in full, or merged), or ""."""
    if checkpoint:
        folder = model_folder(Path(checkpoint)) or Path(checkpoint)  # that of a merged scorer
        if (folder / "config.json").is_file():
            return str(folder)
    return ""


def read_request(arguments: Namespace, config: Config) -> EvaluationRequest:
    """Read what is evaluated: the prompt, the files, or what the checkpoint's run held out."""
    request = EvaluationRequest()
    task = config.model.task
    if arguments.checkpoint:
        note_trained_files(arguments, config)
    if arguments.prompt is not None:
        if task == "score":
            request.examples = [chain_in_prompt(arguments.prompt)]
        elif not arguments.prompt.strip():
            raise UserError("--prompt: expected a text that is not empty.")
        return request
    if arguments.test_set and task == "score":
        request.examples = read([arguments.test_set], task, config.data)
    elif arguments.test_set:
        request.test_set = read_questions(arguments.test_set, config.data)
    if arguments.critical_questions:
        request.critical = read_questions(arguments.critical_questions, config.data)
    if arguments.test_queries:
        from lora.evaluation.retrieval import read_corpus, read_queries  # with numpy

        request.corpus = read_corpus(arguments.corpus)
        request.queries = read_queries(arguments.test_queries, request.corpus)
    if arguments.eval_data:
        request.examples = read(arguments.eval_data, task, config.data)
    elif not (request.examples or request.test_set or request.critical or request.queries):
        if arguments.checkpoint:
            require_recorded_data(arguments.checkpoint, config)
        request.examples = held_out_examples(config)
    return request


def note_trained_files(arguments: Namespace, config: Config) -> None:
    """Print which of the files that are evaluated the run was trained on."""
    trained = [os.path.realpath(path) for path in config.data.train_paths]
    files = [*(arguments.eval_data or []), arguments.test_set, arguments.critical_questions]
    for path in files:
        if path and os.path.realpath(path) in trained:
            trained_on = "in train_data of the run, so not all of it is held out"
            print(printable(f"note: {path}: {trained_on}"))


def held_out_examples(config: Config) -> list[Example]:
    """Read what a run holds out: of `eval_data` all, else a part of the training files."""
    if config.data.eval_data:
        return read(config.data.eval_paths, config.model.task, config.data)
    return list(Split(config).examples(held_out=True))


def require_recorded_data(checkpoint: str, config: Config) -> None:
    """Raise UserError where what the checkpoint's run held out cannot be told any more."""
    folder = Path(checkpoint)
    if (folder / "metadata.json").is_file():
        recorded = saved_files.read_table(folder / "metadata.json", saved_files.METADATA)
    elif (folder / "trainer_state.json").is_file():
        recorded = saved_files.read_state(folder)["facts"]
    else:
        return  # a merged scorer records no data
    changed = changed_path(config.data.held_out_paths, recorded["eval_data"])
    if not config.data.eval_data:
        changed = changed or changed_path(config.data.train_paths, recorded["train_data"])
    if changed:
        found = "not the file that the run was made with, so what it held out is not known"
        raise UserError(f"{changed}: {found}; restore it, or give eval.py files with --eval_data.")


def chain_in_prompt(prompt: str) -> Example:
    """Return the problem on the first line and the steps below it."""
    lines = [line for line in prompt.split("\n") if line.strip()]
    if len(lines) < 2:
        expected = "a problem on the first line and steps below it, for a scorer"
        raise UserError(f"--prompt: expected {expected}.")
    problem, *steps = lines
    return Example("--prompt", prompt=problem, steps=steps, labels=[None] * len(steps))
