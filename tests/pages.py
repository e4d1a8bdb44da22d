"""The Markdown pages of the repository, taken apart: sections, code, commands, links, anchors."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
import re
import shlex
import subprocess

from lora.common.paths import ROOT

# The pages whose commands are run. Those of CONTRIBUTING.md are run by a test of its own.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The pages whose links are followed.
ALL_PAGES = sorted(
    {*ROOT.glob("*.md"), *PAGES, *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob(".github/**/*.md")}
)

FENCED = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
SHELLS = ("", "sh", "bash", "shell", "console")  # what a block of commands may be called
# Inline code that begins so and has an argument is a command, too.
PROGRAMS = ("python", "plainlora", "torchrun", "pip", "pytest", "hf", "vllm", "llama-server")

# Commands are printed instead of run: bash reads quotes, loops, variables and here-documents, and
# calls this function for every program that it does not find, which are all but
# these two.
PRINT_COMMANDS = """
PATH=/nowhere
cat() { /bin/cat "$@"; }
head() { /usr/bin/head "$@"; }
command_not_found_handle() { printf '%s\\0' "$@" >&3; printf '\\1' >&3; }
exec 3>&1 >/dev/null 2>&1
"""


@dataclass(frozen=True)
class Code:
    """A code block, or a command between backticks."""

    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.language in SHELLS


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def sections(page: Path) -> dict[str, list[Code]]:
    """Return {title of a section, "" before the first one: the code in it, in order}."""
    text = page.read_text(encoding="utf-8")
    starts = [match for match in re.finditer(r"^## +(.+)$", text, re.M)]
    fenced = [match.span() for match in FENCED.finditer(text)]
    titles = {0: ""}
    for match in starts:
        if not any(start < match.start() < end for start, end in fenced):
            titles[match.start()] = match[1]
    edges = [*titles, len(text)]
    found = {}
    for (start, title), end in zip(titles.items(), edges[1:]):
        found[title] = codes(text[start:end])
    return found


def codes(text: str) -> list[Code]:
    """Return the code blocks of a text and the commands between backticks, in order."""
    found = []
    end = 0
    for match in FENCED.finditer(text):
        found += inline_commands(text[end : match.start()])
        language = match[2].strip().lower()
        found.append(Code(language, match[3]))
        end = match.end()
    return found + inline_commands(text[end:])


def inline_commands(text: str) -> list[Code]:
    """Return what begins as a command between backticks, unless it only names a program."""
    found = []
    for code in INLINE.findall(text):
        words = code.split()
        name_length = 3 if words[:2] == ["python", "-m"] else 2
        if words and words[0] in PROGRAMS and len(words) > name_length:
            found.append(Code("", code))
    return found


def typed(text: str) -> str:
    """Return what a reader types of a block: where it shows prompts, what stands behind `$ `."""
    if not re.search(r"^\$ ", text, re.M):
        return text
    lines = []
    command = ""
    for line in text.splitlines():
        if command:
            command += "\n" + line
        elif line.startswith("$ "):
            command = line.removeprefix("$ ")
        if command and is_complete(command):
            lines.append(command)
            command = ""
    return "\n".join(lines)


def is_complete(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:  # an open quote
        return False
    return not command.endswith("\\")


def commands(code: Code, folder: Path) -> list[list[str]]:
    """Return the commands of a block, each a list of words. Here-documents go into `folder`."""
    if not code.is_shell:
        return []
    shell = PRINT_COMMANDS + typed(code.text)
    output = subprocess.run(
        ["/bin/bash", "-c", shell], cwd=folder, stdout=subprocess.PIPE, text=True
    ).stdout
    return [command.split("\0")[:-1] for command in output.split("\1")[:-1]]


def without_code(text: str) -> str:
    return INLINE.sub("", FENCED.sub("", text))


def links(page: Path) -> list[str]:
    """Return the targets of the page's links and pictures, in Markdown and in HTML."""
    text = without_code(page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    found += re.findall(r"^ *\[[^\]]+\]: *(\S+)", text, re.M)
    return found + re.findall(r"""(?:src|href|srcset)=["']([^"' ]+)""", text)


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: its own, and those that GitHub makes of headings."""
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"""<a (?:id|name)=["']([^"']+)""", text))
    times: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCED.sub("", text), re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link's text
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = times.get(slug, 0)
        times[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def inline_code(page: Path) -> list[str]:
    return INLINE.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
