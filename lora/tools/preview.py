"""`python -m lora render FILE`: rows as the model will read them, their targets marked, and a
summary of the file.
"""

import sys
from types import SimpleNamespace

from lora.data.display import row_as_text


def main(argv):
    import torch
    from transformers import AutoModel

    from lora.config.flags import Parser, add_flags, apply_flags
    from lora.config.schema import Config, ModelConfig
    from lora.data.readers import read
    from lora.data.summary import describe_data
    from lora.data.token_cache import tokenise_examples
    from lora.data.tokenise import tokenise
    from lora.model.weights import load_shape
    from lora.target_modules import is_causal

    parser = Parser(
        "Rows of data files as the model will read them, what is asked of it marked, and statistics."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="data files, as for --train_data")
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)"
    )
    config, keys = (
        Config(ModelConfig("embedded")),
        ("base_model", "task", "max_length", "label_max"),
    )
    for table in (config.model, config.data):
        add_flags(parser, table, keys)
    arguments = parser.parse_args(argv)
    apply_flags(config, arguments, keys)
    examples = read(arguments.files, config.model.task, config.data)
    shape, _, tokenizer = load_shape(config.model.base_model)
    with torch.device("meta"):  # what the model sees of a row is in its code; no weights are needed
        causal = is_causal(AutoModel.from_config(shape))
    _, facts = tokenise_examples(
        examples, SimpleNamespace(tokenizer=tokenizer, causal=causal), config, "data"
    )
    for example in examples[: arguments.rows]:
        (rendered,) = tokenise([example], tokenizer, config.model.task, config.data, causal)
        for row in rendered.rows[: arguments.rows]:
            print(f"--- {example.where}, {len(row.tokens)} tokens")
            print(row_as_text(row, tokenizer, sys.stdout.isatty()).rstrip("\n"))
    print(f"\n{describe_data('data', facts)}")
