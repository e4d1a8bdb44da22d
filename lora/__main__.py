"""The command `plainlora COMMAND ...`, which is also `python -m lora COMMAND ...`."""

from argparse import RawDescriptionHelpFormatter
import importlib
from pathlib import Path
import runpy
import sys

from lora import __version__
from lora.common.exit_status import one_line_errors
from lora.common.paths import SCRIPTS
from lora.config.flags import Parser

SCRIPT_COMMANDS = {  # each is a script, SCRIPTS/COMMAND.py
    "train": "full fine-tuning",
    "train_lora": "LoRA and QLoRA, or only a score head",
    "eval": "evaluate a run or a base, or ask it something",
    "merge": "merge an adapter into its base; export to GGUF",
}
TOOL_COMMANDS = {  # {command: (its module in lora/tools/, its line of help)}
    "render": ("preview", "show examples as the model will read them, targets marked"),
    "compare": ("compare", "compare finished runs, and say whether one is better"),
    "report": ("report", "write a run's results as one HTML page"),
    "cite_or_refuse": ("cite_or_refuse", "make questions to be answered with citations"),
    "env": ("env", "print versions and devices, for a bug report"),
}
EXAMPLE = "Example: plainlora train_lora --lora_r 16    (the embedded base and data)"


def main() -> None:
    """Run the command that the first argument names with the other arguments."""
    with one_line_errors():
        command = read_command(sys.argv)
        sys.argv[1:2] = []
        if command in SCRIPT_COMMANDS:
            # As for `python train_lora.py`, the script's folder comes first: it imports its
            # neighbours, and the current folder may hold another train.py.
            sys.path.insert(0, str(SCRIPTS))
            runpy.run_path(str(SCRIPTS / f"{command}.py"), run_name="__main__")
        else:
            module, _ = TOOL_COMMANDS[command]
            sys.argv[0] += f" {command}"
            importlib.import_module(f"lora.tools.{module}").main(sys.argv[1:])


def read_command(argv: list[str]) -> str:
    """Return the command, and put the program's name as it was called into argv[0]."""
    argv[0] = "plainlora" if Path(argv[0]).stem == "plainlora" else "python -m lora"
    lines = ["Fine-tune language models and step scorers. COMMAND --help lists its flags.", ""]
    helps = SCRIPT_COMMANDS | {name: help for name, (_, help) in TOOL_COMMANDS.items()}
    for name, help in helps.items():
        lines.append(f"  {name:16}{help}")
    parser = Parser("\n".join([*lines, "", EXAMPLE]))
    parser.prog = argv[0]
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"plainlora {__version__}")
    parser.add_argument(
        "command", type=lambda name: name.replace("-", "_"), choices=helps, metavar="COMMAND"
    )
    return parser.parse_args(argv[1:2]).command


if __name__ == "__main__":
    main()
