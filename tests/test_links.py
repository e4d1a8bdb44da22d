"""What the pages point at is there: files, headings, flags."""

from pathlib import Path
import re

import pytest

from lora.common.paths import ROOT
from lora.config.schema import fields_by_key, get_lora_config
from lora.config.table import ALIASES, DTYPE_SWITCHES
from tests.pages import ALL_PAGES, PAGES, PROGRAMS, anchors, inline_code, links, relative

FOREIGN_FLAGS = {  # between backticks, without their program before them
    *("max_restarts", "nproc_per_node", "nnodes", "shutdown_timeout"),  # torchrun's
    "no_deps",  # pip's
}


@pytest.mark.parametrize("page", ALL_PAGES, ids=relative)
def test_every_relative_link_and_anchor_leads_somewhere(page):
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            dead.append(link)
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            dead.append(link)
    assert not dead, relative(page)


def known_flags() -> set[str]:
    names = {*fields_by_key(get_lora_config()), *ALIASES, *DTYPE_SWITCHES, *FOREIGN_FLAGS}
    files = [*ROOT.glob("*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("benchmarks/*.py")]
    for file in [*files, *ROOT.glob("lora/**/*.py")]:
        names |= set(re.findall(r"--([a-z0-9_]+)", file.read_text(encoding="utf-8")))
    return names


def test_every_flag_on_a_page_exists():
    known = known_flags()
    for page in PAGES:
        for code in inline_code(page):
            is_foreign = code.split()[:1] and code.split()[0] in PROGRAMS
            flags = [] if is_foreign else re.findall(r"(?:^|\s)--([a-zA-Z][\w-]*)", code)
            unknown = [flag for flag in flags if flag.replace("-", "_") not in known]
            assert not unknown, (relative(page), code)


def test_every_page_of_docs_is_in_its_index():
    index = {Path(link).name for link in links(ROOT / "docs" / "README.md")}
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= index
