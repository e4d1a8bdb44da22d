"""How dense the code is: figures per folder, which show where lines are hard to read. Not a test,
and no goal in itself.

    python benchmarks/density.py            # this tree
    python benchmarks/density.py FOLDER     # another checkout

"core" is what a default LoRA run has loaded when it ends; it is measured by such a run of one step.
"""

import ast
from collections import Counter
import io
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import tokenize

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train.py", "train_lora.py", "eval.py", "merge.py")
READING_PATH = (
    "train.py",
    "train_lora.py",
    "lora/layer.py",
    "lora/model/heads.py",
    "lora/model/task.py",
    "lora/model/attention.py",
    "lora/data/tokenise.py",
    "lora/data/batches.py",
    "lora/data/sampler.py",
    "lora/training/gradients.py",
    "lora/training/checkpoint.py",
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
MOST_PARAMETERS = 5
MOST_LINES = 300
MOST_COLUMNS = 100
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)
LOADED_FILES = """
import json, runpy, sys
sys.argv = json.loads(sys.argv[1])
runpy.run_path(sys.argv[0], run_name="__main__")
files = [getattr(module, "__file__", None) for module in sys.modules.values()]
print("\\n" + json.dumps([file for file in files if file]))
"""


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that belong to docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def code_lines(text: str, tree: ast.Module) -> int:
    """Count the lines that are neither blank nor only a comment nor part of a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(tree))


def number_of_parameters(node: ast.FunctionDef) -> int:
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def measure(path: Path) -> Counter:
    """Count what makes one file dense."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    counts = Counter(files=1, lines=len(text.splitlines()), code=code_lines(text, tree))
    counts["long files"] = int(counts["lines"] > MOST_LINES)
    counts["long lines"] = len([line for line in text.splitlines() if len(line) > MOST_COLUMNS])
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            counts["comprehensions"] += 1
            inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
            counts["nested"] += int(len(inner) > 1 or len(node.generators) > 1)
        elif isinstance(node, ast.IfExp):
            counts["inline if"] += 1
        elif isinstance(node, ast.FunctionDef):
            counts["many parameters"] += int(number_of_parameters(node) > MOST_PARAMETERS)
    return counts


def core_files(root: Path) -> list[Path]:
    """Return the project's files that a default LoRA run has loaded when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["train_lora.py", "--max_steps=1", f"--output_dir={folder}", "--device=cpu"]
        environment = os.environ | {"PLAINLORA_CACHE": folder}
        done = subprocess.run(
            [sys.executable, "-c", LOADED_FILES, json.dumps(arguments)],
            cwd=root,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    loaded = [Path(file).resolve() for file in json.loads(done.stdout.splitlines()[-1])]
    ours = [file for file in loaded if file.is_relative_to(root / "lora")]
    ours += [root / name for name in SCRIPTS if root / name in loaded]
    return sorted({*ours, root / "train_lora.py"})


def product_files(root: Path) -> list[Path]:
    return sorted((root / "lora").rglob("*.py")) + [root / name for name in SCRIPTS]


def group_of(path: Path, root: Path) -> str:
    """Return the folder that a file is counted under."""
    parts = path.relative_to(root).parts
    if parts[0] != "lora":
        return "scripts"
    return "/".join(parts[:2]) if len(parts) > 2 else "lora"


def row(name: str, counts: Counter) -> str:
    per_thousand = 1000 / max(1, counts["code"])
    cells = [
        f"{counts['files']:>5}",
        f"{counts['lines']:>7}",
        f"{counts['comprehensions'] * per_thousand:>7.1f}",
        f"{counts['nested']:>7}",
        f"{counts['inline if'] * per_thousand:>7.1f}",
        f"{counts['long lines']:>6}",
        f"{counts['many parameters']:>6}",
        f"{counts['long files']:>6}",
    ]
    return f"{name:18}" + "".join(cells)


def main(root: Path) -> None:
    groups: dict[str, Counter] = {}
    total = Counter()
    for path in product_files(root):
        counts = measure(path)
        groups.setdefault(group_of(path, root), Counter()).update(counts)
        total.update(counts)
    print(f"{'':18}files  lines  compr. nested inl. if  >100c  >5 p. >300 l.")
    for name in sorted(groups):
        print(row(name, groups[name]))
    print(row("product", total))
    core = Counter()
    for path in core_files(root):
        core.update(measure(path))
    print(row("core", core))
    path_files = [root / name for name in READING_PATH if (root / name).is_file()]
    if len(path_files) == len(READING_PATH):
        lines = sum(measure(path)["lines"] for path in path_files)
        print(f"reading path: {lines} lines in {len(path_files)} files")
    print(
        "compr., inl. if: per 1,000 lines of code; nested: comprehensions in one or with two `for`"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
