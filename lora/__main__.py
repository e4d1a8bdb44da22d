"""The programs beside the scripts: `python -m lora COMMAND ...`."""

from argparse import RawDescriptionHelpFormatter
import importlib
import sys

from lora.common.exit_status import one_line_errors
from lora.config.flags import Parser

COMMANDS = {  # {command: (its module in lora/tools/, its line of help)}
    "render": ("preview", "rows of data files as the model will read them, targets marked"),
    "compare": ("compare", "finished runs side by side, and whether one is better than another"),
    "report": ("report", "a run as one HTML page"),
    "cite_or_refuse": ("cite_or_refuse", "questions from documents, to be answered with citations"),
}


def main(argv: list[str]) -> None:
    """Run the command that the first argument names with the other arguments."""
    listed = "\n".join(f"  {name:16}{help}" for name, (_, help) in COMMANDS.items())
    parser = Parser(f"Programs beside the training scripts. COMMAND --help says more.\n\n{listed}")
    parser.prog = "python -m lora"
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    command = parser.parse_args(argv[:1]).command
    sys.argv[0] = f"{parser.prog} {command}"
    module, _ = COMMANDS[command]
    importlib.import_module(f"lora.tools.{module}").main(argv[1:])


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
