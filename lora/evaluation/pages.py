"""Pages and drawings made from the jinja2 templates in lora/evaluation/templates/."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Every value is escaped, whatever the template's file is called; a missing name is an error.
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render_template(name: str, **values: object) -> str:
    """Fill in a template with `values`, which are escaped.

    Args:
        name: file of the template in lora/evaluation/templates/.
        **values: what the template refers to.
    """
    return ENVIRONMENT.get_template(name).render(**values)
