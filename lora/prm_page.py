"""Chains to look at: every step in the colour of its score, in the terminal or on one page that needs nothing else."""

from html import escape

from lora.metrics import first_below
from lora.show import printable

STYLE = """
:root { color-scheme: light dark; --ink: #222; --page: #fff; --line: #bbb; --faint: #666;
  --a: #1a66b3; --b: #c05a00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --page: #181a1c; --line: #555; --faint: #999; --a: #6db3f2; --b: #f0a050 } }
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
body { color: var(--ink); background: var(--page) }
h1 { overflow-wrap: anywhere } .wide { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: 0 1em 0 0; text-align: left; vertical-align: top }
table.numbers td, table.numbers th { padding: 0 1em; text-align: right; white-space: nowrap }
section { border-top: 1px solid var(--line); margin-top: 1.5em } .problem { font-weight: bold; white-space: pre-wrap }
ol { padding-left: 2.5em } li { white-space: pre-wrap; margin: 2px 0; padding: 2px 6px; color: #222 }
li::marker { color: var(--ink) } .of { float: right; font-family: monospace; padding-left: 1em }
.first { outline: 2px solid #c00 } .gold::marker { color: #c00; font-weight: bold } .note { color: var(--faint) }
pre { white-space: pre-wrap; overflow-wrap: anywhere } svg { width: 100%; max-width: 30em; display: block }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20em, 1fr)); gap: 1em }
"""


def colour(score):
    """(red, green, blue) from red (0) over yellow to green (1); grey where there is no score."""
    if score != score:
        return 225, 225, 225
    return int(255 - 105 * max(0.0, 2 * score - 1)), int(150 + 95 * min(1.0, 2 * score)), 150


def number(value, ends):
    """A figure as a cell of a table: the value, and the interval it lies in."""
    interval = f"[{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    return interval if value is None else f"{value:.3f} {interval}".rstrip()


def table(report):
    """The rows of cells that show what `prm_metrics.report` found."""
    measures, differences = report["measures"], report["differences"]
    rows = [["measure", *measures, *(f"less {name}" for name in differences)]]
    for measure in measures["scores"]:
        cells = [number(of[measure], report["intervals"][name].get(measure)) for name, of in measures.items()]
        rows.append([measure, *cells, *(number(None, of.get(measure)) for of in differences.values())])
    return rows


def lines(example, scores, threshold, colours):
    """The steps as lines for a terminal: the score, the label where there is one, and a mark at the first wrong one."""
    first = first_below(scores, threshold)
    for i, (step, label, score) in enumerate(zip(example.steps, example.labels, scores)):
        gold = "" if label is None else f" ({label:g})"
        mark = "  <- first error" if i == first else ""
        text = f"{score:.3f}{gold}  {printable(step)}{mark}"
        red, green, blue = colour(score)
        yield f"\x1b[48;2;{red};{green};{blue}m\x1b[30m{text}\x1b[0m" if colours else text


def document(title, parts):
    """A whole page, which needs no other file."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    phone = '<meta name=viewport content="width=device-width, initial-scale=1">'
    return "\n".join([head + phone, f"<h1>{escape(title)}</h1>", *parts]) + "\n"


def number_table(rows):
    """Rows of cells, the first of them a heading."""
    kinds = ["th", *["td"] * len(rows)]
    cells = ["".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) for kind, row in zip(kinds, rows)]
    return "<div class=wide><table class=numbers><tr>" + "</tr><tr>".join(cells) + "</tr></table></div>"


def page(title, examples, scores, threshold, numbers):
    """The page of scored steps as a text. `numbers`: rows of cells, the first of them a heading."""
    return document(title, [*([number_table(numbers)] if numbers else []), *chains(examples, scores, threshold)])


def chains(examples, scores, threshold):
    """Every step in the colour of its score."""
    parts = ["<p class=note>Each step has its score and, in brackets, its label. A frame: the first step under "]
    parts.append(f"the threshold {threshold:g}. A red number: the first step that is labelled wrong.</p>")
    for example, of_steps in zip(examples, scores):
        said = first_below(of_steps, threshold)
        gold = first_below([1.0 if label is None else label for label in example.labels], 0.5)
        parts.append(f"<section><p class=note>{escape(example.where)}</p><p class=problem>{escape(example.prompt)}</p><ol>")
        for i, (step, label, score) in enumerate(zip(example.steps, example.labels, of_steps)):
            kinds = " ".join(["first"] * (i == said) + ["gold"] * (i == gold))
            numbers = f"{score:.3f}" + ("" if label is None else f" ({label:g})")
            style = "background: rgb({}, {}, {})".format(*colour(score))
            parts.append(f'<li class="{kinds}" style="{style}"><span class=of>{numbers}</span>{escape(step)}</li>')
        parts.append("</ol></section>")
    return parts
