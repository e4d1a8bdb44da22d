"""The command line of eval.py, and the files that it names."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from lora.common.checksums import verify_artifact, verify_checksums
from lora.common.errors import UserError
from lora.config.flags import Parser, add_flags, apply_flags
from lora.config.schema import Config, tables_of
from lora.config.tables import from_file, saved_config
from lora.data.examples import Example
from lora.data.readers import read
from lora.data.split import read_data
from lora.evaluation import retrieval
from lora.evaluation.text_metrics import Question, check_patterns, read_questions

KEYS = (
    *("base_model", "task", "max_length", "label_max", "batch_size", "seed", "device", "dtype"),
    *("max_new_tokens", "temperature", "refusal_pattern", "citation_pattern", "json_keys"),
    *("max_steps_per_example", "neutral_label", "threshold", "tune_threshold_on"),
)


@dataclass
class Asked:
    """What a call of eval.py is to find out, read from its files."""

    # Whose loss is measured, or the steps of --prompt
    examples: list[Example] = field(default_factory=list)
    test_set: list[Question] = field(default_factory=list)
    critical: list[Question] = field(default_factory=list)
    corpus: dict[str, str] = field(default_factory=dict)
    queries: list[tuple[str, set[int]]] = field(default_factory=list)


def read_arguments(argv):
    """(arguments, configuration of the checkpoint or of the base)."""
    parser = Parser("Evaluate a checkpoint, a final artifact or a base, or try it by hand.")
    help = "checkpoint_step_N, final_artifact, or a merged scorer"
    parser.add_argument("--checkpoint", "--artifact_dir", metavar="DIR", help=help)
    parser.add_argument(
        "--verify_only",
        action="store_true",
        help="only prove that the artifact is as it was written",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML or JSON as for training, where there is no checkpoint",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what to answer; for a scorer a problem, and its steps below it",
    )
    parser.add_argument(
        "--ignore_chat_template",
        action="store_true",
        help="go on with the text of --prompt as it is",
    )
    parser.add_argument(
        "--eval_data", nargs="+", metavar="FILE", help="held-out files; default: the checkpoint's"
    )
    parser.add_argument(
        "--test_set",
        metavar="FILE",
        help="chats whose last answers are measured, or steps to be coloured",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="of a scorer: the coloured steps as a page, to this new file"
    )
    parser.add_argument(
        "--reliability",
        metavar="FILE",
        help="of a scorer: the picture of its calibration (matplotlib)",
    )
    parser.add_argument(
        "--critical_questions", metavar="FILE", help="the same, each question with PASS or FAIL"
    )
    parser.add_argument(
        "--test_queries", metavar="FILE", help="rows of query and relevant (ids of the corpus)"
    )
    parser.add_argument("--corpus", metavar="FILE", help="rows of id and text")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the numbers to this JSON file too, the answers beside it",
    )
    for table in tables_of(Config()).values():
        add_flags(parser, table, KEYS, "the checkpoint's")
    arguments = parser.parse_args(argv)

    if arguments.verify_only:
        verify(arguments.checkpoint)
    if arguments.checkpoint and arguments.config:
        raise UserError(
            "--checkpoint brings its configuration along; leave --config out, and override keys with flags."
        )
    if arguments.checkpoint:
        verify_checksums(arguments.checkpoint)
        config = saved_config(arguments.checkpoint)
    else:
        config = from_file(arguments.config) if arguments.config else Config()
    whole = whole_model(arguments.checkpoint)
    if whole and arguments.base_model:
        raise UserError(
            f"--base_model {arguments.base_model}: {arguments.checkpoint} holds a whole model; leave it out."
        )
    if whole:
        config.model.base_model, config.model.init_from = whole, ""
    apply_flags(config, arguments, KEYS)
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
    others = (
        arguments.test_set
        or arguments.critical_questions
        or arguments.eval_data
        or arguments.test_queries
    )
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
        raise UserError(
            "--critical_questions is for --task lm: a scorer gives no answers; leave it out."
        )
    if config.model.task == "score" and arguments.test_set and arguments.eval_data:
        raise UserError(
            "--test_set and --eval_data: of a scorer both are files of steps; name all in one of them."
        )
    for name in ("html", "reliability"):
        path = getattr(arguments, name)
        if path and config.model.task != "score":
            raise UserError(f"--{name} is for --task score; leave it out.")
        if path and (Path(path).exists() or not Path(path).resolve().parent.is_dir()):
            raise UserError(
                f"--{name} {path}: expected a file that is not there yet, in a folder that is."
            )
    if arguments.reliability and (arguments.prompt is not None or find_spec("matplotlib") is None):
        raise UserError(
            "--reliability: needs labelled steps (no --prompt), and matplotlib: pip install 'plainlora[plot]'."
        )


def whole_model(checkpoint):
    """The folder in which a checkpoint holds a whole model (trained in full, or merged), or ""."""
    folders = [Path(checkpoint) / "backbone", Path(checkpoint)] if checkpoint else []
    return next((str(folder) for folder in folders if (folder / "config.json").is_file()), "")


def read_examples(arguments, config):
    """What is Asked: the steps of the prompt, the files named, or what the checkpoint's run held
    out.
    """
    asked = Asked()
    if arguments.prompt is not None:
        if config.model.task == "score":
            problem, *steps = [line for line in arguments.prompt.split("\n") if line.strip()] or [
                ""
            ]
            if not steps:
                raise UserError(
                    "--prompt: expected a problem on the first line and steps below it, for a scorer."
                )
            asked.examples = [
                Example("--prompt", prompt=problem, steps=steps, labels=[None] * len(steps))
            ]
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
