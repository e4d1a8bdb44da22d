"""Pages and drawings made from the jinja2 templates in lora/evaluation/templates/."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from lora.common.printable_text import printable

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> Environment:
    """Return what reads the templates.

    Every value is escaped, whatever the template's file is called; a missing name is an error.
    """
    # Imported here, because it takes as long as all that runs before a wrong folder is reported.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        # A drawing (Markup) was made of texts that had no control characters any more.
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_template(name: str, values: Mapping[str, object]) -> Markup:
    """Fill in a template. Its values are escaped; it is not, so a page may include a drawing."""
    return Markup(environment().get_template(name).render(values))
