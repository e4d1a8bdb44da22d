"""`python -m lora render FILE`: rows as the model will read them, and a summary of the file."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
import sys

from lora.common.errors import UserError
from lora.common.printable_text import printable
from lora.common.signals import begin_loading_torch
from lora.config.cross_checks import require_formats
from lora.config.flags import Parser, add_flags, apply_flags
from lora.config.schema import Config, ModelConfig
from lora.data import files
from lora.data.counts import describe_data
from lora.data.readers import form_of, read, reader_for
from lora.data.readers.columns import with_columns

FIRST = 1000  # rows of a file whose keys are counted
KEYS = (
    "base_model", "add_special_tokens", "task", "max_length", "columns",
    "label_max", "step_marker", "prompt_format", "step_format", "max_steps_per_example",
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    config = Config(ModelConfig("embedded"))
    parser = Parser("Print examples as the model reads them, their targets marked, and statistics.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="data files, as for --train_data")
    rows_help = "number of examples to print (default: 3)"
    parser.add_argument("--rows", type=int, default=3, metavar="N", help=rows_help)
    add_flags(parser, config.model, KEYS)
    add_flags(parser, config.data, KEYS)
    arguments = parser.parse_args(argv)
    apply_flags(config, arguments, KEYS)
    require_formats(config.data)
    for path in arguments.files:
        config.model.task = print_shapes(path, config, arguments.task)
    examples = read(arguments.files, config.model.task, config.data)

    # Imported here, so that a mistake in the files is reported before torch is loaded.
    begin_loading_torch(is_shown=sys.stdout.isatty())
    import torch
    from transformers import AutoModel

    from lora.data.row_display import row_as_text
    from lora.data.token_cache import tokenise_examples
    from lora.data.tokenise import tokenise
    from lora.model.load import set_max_length
    from lora.model.weights import add_tokens, load_shape
    from lora.target_modules import first_position, is_causal

    shape, _, tokenizer = load_shape(config.model.base_model)
    with torch.device("meta"):  # the class of the model is enough, no weights are needed
        model = AutoModel.from_config(shape)
    add_tokens(model, tokenizer, config.model.add_special_tokens)
    causal = is_causal(model)
    set_max_length(config, shape, first_position(model))
    _, facts = tokenise_examples(examples, tokenizer, causal, config, "data")
    for example in examples[: arguments.rows]:
        (tokenised,) = tokenise([example], tokenizer, config.model.task, config.data, causal)
        for row in tokenised.rows[: arguments.rows]:
            print(f"--- {printable(example.where)}, {len(row.tokens)} tokens")
            print(row_as_text(row, tokenizer, sys.stdout.isatty()).rstrip("\n"))
    print(f"\n{describe_data('data', facts)}")


def print_shapes(path: str, config: Config, requested_task: str | None) -> str:
    """Print the keys by which a file's first rows are read; return the task that they are for."""
    task = config.model.task
    if path.startswith("arithmetic:"):
        return task
    tasks = [requested_task] if requested_task else [task, "lm", "score"]
    shapes: Counter[str] = Counter()
    for where, row in islice(files.read_rows(path), FIRST):
        row, sources = with_columns(row, config.data.columns)
        for name in tasks:
            with suppress(UserError):  # `read` will say it
                form = form_of(reader_for(where, row, name, sources), row)
                keys = ", ".join(key for key in row if key in form)
                shapes[f"{keys} (--task {name})"] += 1
                task = name
                break
    first = "the first " if shapes.total() == FIRST else ""
    for shape, count in shapes.most_common():
        print(printable(f"{path}: {first}{count:,} rows of {shape}"))
    return task
