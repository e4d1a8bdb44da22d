"""A run as one page that needs no network: RUN/report.html.

    python -m lora.report outputs/RUN

Curves, configuration, what the run said of its data and of what it trained, the best checkpoints, the environment; and,
where there is a final artifact, what its model says of a few held-out examples: scored steps and how reliable the scores
are, or generated answers.
"""

from html import escape
import json
import math
import sys

from lora.command_line import Parser
from lora.compare import Run, shown
from lora.config import read_file, saved_config
from lora.errors import one_line_errors
from lora.prm_page import chains, document, number_table
from lora.show import printable
from lora.source import Source

SAMPLES = 5  # held-out examples that are shown
SCORED = 200  # held-out chains whose scores make the reliability picture
POINTS = 400  # of a curve
TOKENS = 80  # of a generated answer, and of the beginning of a text that is gone on with


# ------------------------------------------------------------------------------------------------------- curves


def ticks(low, high):
    """About five round numbers between the two."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * factor) <= 6)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, across, curves):
    """An SVG of {name: [(x, y)]} with axes; `across` names x. Empty where there is nothing to draw.

    Points (x, y, share) are circles of that share of an area, without a line."""
    curves = {name: curve[:: max(1, len(curve) // POINTS)] for name, curve in curves.items() if curve}
    if not curves:
        return ""
    xs, ys = ([point[i] for curve in curves.values() for point in curve] for i in (0, 1))
    (left, right), (low, high) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys))
    width, height, margin = 440, 260, 56

    def place(x, y):
        along, up = (x - left) / (right - left), (y - low) / (high - low)
        return margin + along * (width - margin - 12), height - 40 - up * (height - 76)

    parts = [f'<svg viewBox="0 0 {width} {height}" font-size=13 fill=currentColor role=img aria-label="{escape(title)}">']
    parts.append(f"<text x={margin} y=16 font-weight=bold>{escape(title)}</text>")
    parts.append(f"<text x={width - 12} y={height - 4} text-anchor=end>{escape(across)}</text>")
    for y in ticks(low, high):
        _, at = place(left, y)
        parts.append(f'<path d="M{margin} {at:.1f}H{width - 12}" stroke="var(--line)" stroke-width=0.5 />')
        parts.append(f"<text x={margin - 6} y={at + 4:.1f} text-anchor=end>{y:.4g}</text>")
    for x in ticks(left, right):
        at, _ = place(x, low)
        parts.append(f"<text x={at:.1f} y={height - 22} text-anchor=middle>{x:.4g}</text>")
    end = width - 12
    for (name, curve), colour in zip(reversed(curves.items()), "ab"):
        at = [place(*point[:2]) for point in curve]
        sizes = [2 + 14 * math.sqrt(point[2]) if len(point) > 2 else 2.5 for point in curve]
        if len(curve[0]) == 2:
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
            parts.append(f'<path d="M{line}" fill=none stroke="var(--{colour})" stroke-width=1.8 />')
        if len(curve) < 30:
            dots = "".join(f"<circle cx={x:.1f} cy={y:.1f} r={r:.1f} />" for (x, y), r in zip(at, sizes))
            parts.append(f'<g fill="var(--{colour})" fill-opacity=0.8>{dots}</g>')
        parts.append(f'<text x={end} y=16 text-anchor=end fill="var(--{colour})">{escape(name)}</text>')
        end -= 8 * len(name) + 14
    return "".join(parts) + "</svg>"


def curves_of(run):
    """The charts of a run's metrics."""
    of = {name: run.curve(name) for name in dict.fromkeys(key for line in run.lines for key in line)}
    yield chart("loss", "step", {"training": of.get("train/loss", []), "validation": of.get("val/loss", [])})
    names = {"validation r2": "val/r2", "validation token_accuracy": "val/token_accuracy"}
    names |= {"gradient norm": "train/grad_norm", "learning rate": "train/learning_rate"}
    yield from (chart(title, "step", {"": of.get(name, [])}) for title, name in names.items())


# ------------------------------------------------------------------------------------------------------- the page


def rows_of(values):
    """A table of names and values."""
    cells = (f"<tr><th>{escape(str(k))}<td>{escape(shown(v))}" for k, v in values.items() if v not in ("", None, [], {}))
    return "<div class=wide><table>" + "".join(cells) + "</table></div>"


def opening(folder):
    """What the run said before its first step: data, what is trained, warnings."""
    logs = sorted((folder / "logs").glob("train_*.log"))
    lines = logs[0].read_text(encoding="utf-8").splitlines() if logs else []
    first = next((i for i, line in enumerate(lines) if line.startswith("step ")), len(lines))
    return "\n".join(map(printable, lines[:first]))


def checkpoints(folder):
    """A table of the checkpoints that are there, the best first; "" of none."""
    from lora.checkpoint import best, saved

    states = saved(folder / "checkpoints")
    states = [*best(states), *(state for state in states if not state["val"])]
    names = list(dict.fromkeys(name for state in states for name in state["val"] or {}))
    rows = [[state["path"].name, *(shown((state["val"] or {}).get(name)) for name in names)] for state in states]
    return number_table([["checkpoint", *names], *rows]) if rows else ""


def section(title, *parts):
    parts = [part for part in parts if part]
    return [f"<section><h2>{title}</h2>", *parts, "</section>"] if parts else []


def page(run, samples):
    """The page of a Run as a text; `samples` are the parts that its model has said."""
    folder, artifact = run.folder, run.folder / "final_artifact"
    facts = read_file(artifact / "metadata.json") if (artifact / "metadata.json").is_file() else {}
    config = json.loads((folder / "logs" / "config.json").read_text())
    seconds = {"tokens/s": run.values["tokens/s"], "seconds": run.values["seconds"], "peak memory, GB": run.values["GB"]}
    best = run.results.get("best", {})
    ended = "" if run.results else "<p class=note>This run has not ended (or has not ended well).</p>"
    trained = {name: facts.get(name) for name in ("method", "trainable_parameters", "parameters", "base_unchanged")}
    environment = {**facts.get("versions", {}), **facts.get("hardware", {}), "commit": facts.get("git_commit")}
    tables = [f"<h3>{escape(name)}</h3>{rows_of(table)}" for name, table in config.items()]
    parts = [
        *section("Result", ended, rows_of({f"best {name}": value for name, value in best.items()} | seconds)),
        *section("Curves", "<div class=charts>", *curves_of(run), "</div>"),
        *section("Checkpoints", checkpoints(folder)),
        *section("What its model says", *samples),
        *section("Data, and what was trained", f"<pre>{escape(opening(folder))}</pre>", rows_of(trained)),
        *section("Environment", rows_of(environment)),
        *section("Configuration", *tables),
    ]
    return document(run.name, parts)


# ------------------------------------------------------------------------------------------------------- samples


def samples_of(folder):
    """Parts of a page: what the final artifact's model says of held-out examples."""
    import torch

    from lora.model import choose_device, load_task

    config = saved_config(folder / "final_artifact")
    task = load_task(config, torch.float32)
    task.load(folder / "final_artifact")
    task.to(choose_device(config.training.device)).eval()
    held_out = Source(config).examples()[1]
    return (scored if config.model.task == "score" else answered)(task, held_out, config)


def scored(task, examples, config):
    """Coloured steps, and the mean label against the mean score."""
    import torch

    from lora.generate import step_scores
    from lora.prm_metrics import calibration, expected_calibration_error, measured

    examples = examples[:SCORED]
    scores = step_scores(examples, task, config, torch.float32)
    parts = chains(examples[:SAMPLES], scores[:SAMPLES], config.evaluation.threshold)
    labels, said = measured(examples, scores)
    if len(labels):
        found = [(score, label, count / len(said)) for score, label, count in calibration(said, labels)]
        error = expected_calibration_error(said, labels)
        parts.append(f"<p>Reliability: the mean label of the steps with about the same score, {len(said)} in all; ")
        parts.append(f"a circle's area is their share. Expected calibration error {error:.3f}.</p>")
        parts.append(chart("mean label", "mean score", {"as it should be": [(0, 0), (1, 1)], "": found}))
    return parts


def answered(task, examples, config):
    """Generated answers beside what was expected; texts gone on with."""
    import torch

    from lora.generate import answers, prompt_tokens, text_tokens
    from lora.text_metrics import last_question

    prompts, expected = [], []
    length = min(TOKENS, config.data.max_length // 2)
    room = config.data.max_length - length
    for example in examples[:SAMPLES]:
        if example.messages:
            asked = last_question(example)
            prompts.append((asked.where, prompt_tokens(asked.where, asked.messages, asked.tools, task.tokenizer)[-room:]))
            expected.append(asked.reference)
        else:
            tokens = text_tokens(example.text, task.tokenizer)
            begin = min(len(tokens) // 2, length) or 1
            prompts.append((example.where, tokens[:begin]))
            expected.append(task.tokenizer.decode(tokens[begin : begin + length]))
    config.evaluation.max_new_tokens = length
    said = answers(task, prompts, config, torch.float32)
    for (where, tokens), wanted, answer in zip(prompts, expected, said):
        prompt = printable(task.tokenizer.decode(tokens))
        yield f"<section><p class=note>{escape(where)}</p><pre>{escape(prompt)}</pre>"
        yield rows_of({"says": printable(answer) or " ", "expected": printable(wanted)}) + "</section>"


def main(argv):
    parser = Parser("A run as one page, RUN/report.html.")
    parser.add_argument("run", metavar="RUN", help="its folder")
    run = Run.of(parser.parse_args(argv).run)
    samples = samples_of(run.folder) if (run.folder / "final_artifact").is_dir() else ()
    (run.folder / "report.html").write_text(page(run, list(samples)), encoding="utf-8")
    print(run.folder / "report.html")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
