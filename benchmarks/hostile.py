"""Hostile, odd and interrupted inputs, tried again: what is answered now.

    python benchmarks/hostile.py        writes docs/hostile.md

A new case is one more entry of `cases`.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import os
from pathlib import Path
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cases import (
    BASE,
    CHATML,
    CHATS,
    Case,
    base_with,
    chat,
    chats,
    program,
    render,
    train,
    write,
    write_page,
)
from lora.common.checksums import file_sha256, write_checksums
from lora.common.toml_json import read_file, to_toml

PAGE = ROOT / "docs" / "hostile.md"
RUN = Path("outputs/changed")
CHECKPOINT = RUN / "checkpoints" / "checkpoint_step_1"
ARTIFACT = RUN / "final_artifact"

FROZEN = (
    *("--base_model", "embedded", "--task", "score", "--lora_r", 0, "--max_length", 64),
    *("--train_data", "arithmetic:train:60"),
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

HEAD = """# Hostile, odd and interrupted

Inputs that once ended in a traceback, in no answer at all, or in a file that was read or written
where it should not be, and what is answered now. The table is written by
[`hostile.py`](../benchmarks/hostile.py), which tries each line on a few rows with the embedded
base, and fails where the words are missing; the slow tests run it. Paths are shortened. Random
inputs of the same kinds are tried by [`fuzz.py`](../benchmarks/fuzz.py).

| what a user meets | tried | what is answered now |
|---|---|---|
"""


def cases() -> list[Case]:
    train(*CHATS, write("few.jsonl", *chats(13)), name="original")
    return [
        *security(),
        *odd_run_folders(),
        *odd_bases_and_checkpoints(),
        *no_hangs(),
        *no_tracebacks(),
        *words(),
    ]


def changed_run(change: Callable[[], object]) -> None:
    """Copy the run, and change the copy."""
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree("outputs/original", RUN, symlinks=True)
    change()


def tool(name: str, change: Callable[[], object] = lambda: None) -> Callable[[], str]:
    """A command of `plainlora` for a changed run, to be called."""

    def answer() -> str:
        changed_run(change)
        return program("lora", name, RUN)

    return answer


def replace(path: Path, target: str) -> None:
    """Put a link in the place of a file."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def set_json(path: Path, **values: object) -> None:
    tables = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tables | values), encoding="utf-8")


def with_environment(name: str, value: str, *flags: object) -> str:
    os.environ[name] = value
    try:
        return train(*CHATS, "few.jsonl", *flags)
    finally:
        del os.environ[name]


# --------------------------------------------------------------------------------------- the cases


def security() -> Iterator[Case]:
    private = str(Path(write("private.txt", "a secret")).absolute())
    log = next(Path("outputs/original/logs").glob("train_2*.log")).name
    yield Case(
        "a run folder from elsewhere, with a link in the place of its log",
        "report: logs/train_DATE.log is a link to another file",
        "error: .*a link that leads out of its folder",
        tool("report", lambda: replace(RUN / "logs" / log, private)),
    )
    yield Case(
        "the same with report.html as a link",
        "report: report.html is a link to another file",
        "the other file: a secret",
        written_through,
    )
    yield Case(
        "a damaged artifact",
        "report: a byte more in final_artifact/metadata.json",
        "metadata.json.*changed",
        tool("report", lambda: append(ARTIFACT / "metadata.json", " ")),
    )
    yield Case(
        "an artifact that names a private file as its held-out data, sealed again",
        "report: eval_data of training_config.toml is another file",
        "what it held out is not known",
        tool("report", with_secret_data),
    )
    yield Case(
        "a chat template that loops for hours",
        "render: two loops of 99,999 rounds in chat_template.jinja",
        "error: .*does not come to an end",
        lambda: render(*chats(1), base=base_with(CHATML + ENDLESS)),
    )
    yield Case(
        "an artifact without its list of checksums",
        "eval: without checksums.json",
        r"error: .*checksums\.json: no such file",
        without_checksums,
    )
    yield Case(
        "an artifact without its weights, sealed again",
        "eval --verify_only: without adapter_model.safetensors",
        r"error: .*must have it: adapter_model\.safetensors",
        without_weights,
    )
    yield Case(
        "a folder that holds no artifact, with a list of checksums that matches",
        "eval --verify_only: metadata.json = {}",
        r"error: .*metadata\.json: no task",
        empty_artifact,
    )
    for right, expected in ((False, "error: .*sha256"), (True, "verified")):
        yield Case(
            "an artifact whose files and list were written anew",
            f"eval --verify_only --expect_sha256: {'the' if right else 'not the'} one of training",
            expected,
            lambda right=right: with_sha256(right),
        )
    yield Case(
        "an experiment_name that leads out of output_dir",
        "train_lora --experiment_name ../elsewhere",
        "error: .*experiment_name",
        lambda: train(*CHATS, "few.jsonl", "--experiment_name", "../elsewhere"),
    )
    yield Case(
        "escapes of a terminal in a base's name",
        r"compare: base_model = b\x1b[31m\u202ec in one of two runs",
        r"^ *changed  +bc",
        compared_with_odd_name,
    )
    yield Case(
        "escapes of a terminal in a file's name",
        r"render: a\x1b[31m.jsonl",
        r"--- a\.jsonl:1",
        lambda: program(
            *("lora", "render", write("a\x1b[31m.jsonl", *chats(2)), "--base_model", "embedded")
        ),
    )


def with_secret_data() -> None:
    """Let an artifact name another file as its held-out data, and seal it again."""
    secret = str(Path(write("secret.jsonl", *chats(2))).absolute())
    path = ARTIFACT / "training_config.toml"
    tables = read_file(path)
    tables["data"]["eval_data"] = [secret]
    path.write_text(to_toml(tables), encoding="utf-8")
    write_checksums(ARTIFACT)


def without_weights() -> str:
    changed_run((ARTIFACT / "adapter_model.safetensors").unlink)
    write_checksums(ARTIFACT)
    return program("eval.py", "--checkpoint", ARTIFACT, "--verify_only")


def without_checksums() -> str:
    changed_run((ARTIFACT / "checksums.json").unlink)
    return program("eval.py", "--checkpoint", ARTIFACT)


def odd_base_name() -> None:
    path = RUN / "logs" / "config.json"
    tables = read_file(path)
    tables["model"]["base_model"] = "b\x1b[31m\u202ec"
    path.write_text(json.dumps(tables), encoding="utf-8")


def compared_with_odd_name() -> str:
    changed_run(odd_base_name)
    return program("lora", "compare", RUN, "outputs/original")


def written_through() -> str:
    said = tool("report", lambda: replace(RUN / "report.html", "../../private.txt"))()
    return f"{said}\nthe other file: {Path('private.txt').read_text(encoding='utf-8')}"


def with_sha256(right: bool) -> str:
    folder = "outputs/original/final_artifact"
    sha256 = file_sha256(Path(folder) / "checksums.json")
    flags = ("--verify_only", "--expect_sha256", sha256 if right else "0" * 64)
    return program("eval.py", "--checkpoint", folder, *flags)


def empty_artifact() -> str:
    shutil.rmtree("empty", ignore_errors=True)
    Path("empty").mkdir()
    write("empty/metadata.json", {})
    write_checksums(Path("empty"))
    return program("eval.py", "--checkpoint", "empty", "--verify_only")


def odd_run_folders() -> Iterator[Case]:
    metrics = RUN / "logs" / "train_metrics.jsonl"
    lines = (
        "NaN",
        "[9]",
        '{"val/loss": 1}',
        '{"step": 1, "val/loss": NaN}',
        '{"step": "x"}',
        "{",
    )
    for line in lines:
        for name in ("compare", "report"):
            yield Case(
                "a run folder with an odd line of metrics",
                f"{name}: {line} in train_metrics.jsonl",
                r"error: .*train_metrics\.jsonl",
                tool(name, lambda line=line: append(metrics, line + "\n")),
            )
    for content in ('{"best": 1}', '{"best": {"step": "x"}}', "\xff"):
        yield Case(
            "a run folder with odd results",
            f"compare: {content!r} as final_results.json",
            r"error: .*final_results\.json",
            tool("compare", lambda text=content: odd_results(text)),
        )


def odd_results(text: str) -> None:
    (RUN / "logs" / "final_results.json").write_bytes(text.encode("latin-1"))


def odd_bases_and_checkpoints() -> Iterator[Case]:
    for name, value in (
        ("num_attention_heads", 3),
        ("hidden_size", "abc"),
        ("num_hidden_layers", 10**9),
    ):
        yield Case(
            "a base with an odd config.json",
            f"train_lora: {name} = {value!r}",
            "error: .*odd_base",
            lambda name=name, value=value: with_odd_base(name, value),
        )
    yield Case(
        "a base whose tokenizer.json is no tokenizer",
        "train_lora: tokenizer.json = []",
        "error: .*odd_base",
        lambda: with_odd_base("tokenizer", []),
    )
    for name, value in (("step", "x"), ("without_best", None), ("surprise", 1)):
        yield Case(
            "a checkpoint with an odd state, sealed again",
            f"train_lora --resume_from: {name} = {json.dumps(value)}",
            rf"error: .*{name}",
            lambda name=name, value=value: resumed_with(name, value),
        )


def with_odd_base(name: str, value: object) -> str:
    shutil.rmtree("odd_base", ignore_errors=True)
    shutil.copytree(BASE, "odd_base")
    if name == "tokenizer":
        write("odd_base/tokenizer.json", "[]")
    else:
        set_json(Path("odd_base/config.json"), **{name: value})
    return train("--base_model", "odd_base", "--max_length", 64, "--train_data", "few.jsonl")


def resumed_with(name: str, value: object) -> str:
    changed_run(lambda: set_json(CHECKPOINT / "trainer_state.json", **{name: value}))
    write_checksums(CHECKPOINT)
    return program("train_lora.py", "--resume_from", CHECKPOINT, "--experiment_name", "resumed")


def no_hangs() -> Iterator[Case]:
    for flag, value in (
        ("--batch_size", 10**9),
        ("--gradient_accumulation_steps", 10**7),
    ):
        yield Case(
            "a step of more examples than a hundred passes over the data have",
            f"train_lora {flag} {value}",
            "error: .*pass",
            lambda flag=flag, value=value: train(*CHATS, "few.jsonl", flag, value),
        )
    yield Case(
        "a step of more examples than the data have",
        "train_lora --batch_size 50, of 12 examples",
        r"one step is 4\.17 passes over the training data",
        lambda: train(*CHATS, "few.jsonl", "--batch_size", 50),
    )
    yield Case(
        "a frozen base and more steps than there is time for",
        "train_lora --lora_r 0 --max_steps 1000000000000000, ended after its first line",
        "Step 0/1000000000000000 .*validation loss",
        lambda: watched("Step 0", interrupt, *FROZEN, "--max_steps", 10**15),
    )
    yield Case(
        "a rank larger than any layer",
        'train_lora: rank_pattern = {"q_proj": 999999}',
        "error: .*rank",
        lambda: train(
            *("--config", write("ranks.json", {"lora": {"rank_pattern": {"q_proj": 999999}}})),
            *CHATS,
            "few.jsonl",
        ),
    )
    yield Case(
        "more embedded problems than there is time for",
        "train_lora --train_data arithmetic:train:99999999999",
        "error: .*arithmetic",
        lambda: train(*CHATS, "arithmetic:train:99999999999"),
    )


def no_tracebacks() -> Iterator[Case]:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "abc")):
        yield Case(
            "a variable of torchrun without torchrun",
            f"{name}={value}, train_lora",
            f"error: .*{name}",
            lambda name=name, value=value: with_environment(name, value),
        )
    yield Case(
        "a folder's name that the disk does not take",
        "train_lora --output_dir of 5,000 characters",
        "[Ff]ile name too long|too long",
        lambda: train(*CHATS, "few.jsonl", "--output_dir", "a" * 5000),
    )
    yield Case(
        "a reader of the output that has seen enough",
        "train_lora --dry_run | head -1",
        r"loading .*status (0|141)",
        read_one_line,
    )
    yield Case(
        "an added token that is a letter of the chat template",
        "train_lora --add_special_tokens a --modules_to_save embed_tokens",
        "Step 1/1 .*New best validation loss",
        lambda: train(
            *(*CHATS, "few.jsonl", "--add_special_tokens", "a"),
            *("--modules_to_save", "embed_tokens"),
        ),
    )
    yield Case(
        "a run folder that is deleted while it trains",
        "train_lora, rm -r outputs/RUN after its first step",
        "error: outputs/watched.*No such file or directory",
        lambda: watched("Step 1", delete_run, *CHATS, "few.jsonl", "--max_steps", 10_000),
    )
    yield Case(
        "two runs without a name that start in one second",
        "train_lora & train_lora &",
        r"two folders, [^,]*\d{8}-\d{6}-\d+, .*-\d+$",
        two_unnamed_runs,
    )
    private = {"content": "".join(map(chr, range(0xE000, 0xF900)))}
    yield Case(
        "a chat with every character for private use",
        "render: U+E000 to U+F8FF in an answer",
        r"data: 1 examples|error: ",
        lambda: render(chat(private)),
    )
    yield Case(
        "a name with a NUL",
        r"train_lora --config: output_dir = a\x00b",
        "error: .*output_dir.*NUL",
        lambda: train(
            *("--config", write("nul.json", {"output": {"output_dir": "a\x00b"}})),
            *CHATS,
            "few.jsonl",
        ),
    )


def read_one_line() -> str:
    """The first line of a dry run of which no more is read, and the exit status."""
    flags = ("--base_model", "embedded", "--train_data", "few.jsonl", "--dry_run")
    command = shlex.join([sys.executable, str(ROOT / "train_lora.py"), *flags])
    command += " 2>&1 | head -1 | tr '\\n' ' '; echo status ${PIPESTATUS[0]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = ["bash", "-c", command]
    return subprocess.run(call, env=environment, capture_output=True, text=True).stdout


def watched(first: str, react: Callable[[subprocess.Popen], object], *flags: object) -> str:
    """What a run says. After its first line that begins with `first`, `react` is called."""
    shutil.rmtree("outputs/watched", ignore_errors=True)
    flags = (*flags, "--logging_steps", 1, "--save_steps", 5)
    process = start(*flags, "--output_dir", "outputs", "--experiment_name", "watched")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(first):
            react(process)
            break
    rest, _ = process.communicate()
    return "".join(lines) + rest


def start(*flags: object, output: int = subprocess.PIPE) -> subprocess.Popen:
    """Start a run in a process of its own."""
    command = [sys.executable, str(ROOT / "train_lora.py"), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # What this process ignores, as in the background of a shell, the new one would ignore too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    errors = subprocess.STDOUT
    return subprocess.Popen(command, text=True, env=environment, stdout=output, stderr=errors)


def interrupt(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)


def delete_run(process: subprocess.Popen) -> None:
    while Path("outputs/watched").exists():
        shutil.rmtree("outputs/watched", ignore_errors=True)


def two_unnamed_runs() -> str:
    flags = (*CHATS, "few.jsonl", "--max_steps", 1, "--output_dir", "unnamed")
    for process in [start(*flags), start(*flags)]:
        process.communicate()
    names = sorted(path.name for path in Path("unnamed").iterdir())
    return f"two folders, {', '.join(names)}"


def in_a_terminal(*flags: object) -> str:
    """What a run shows in a terminal."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(ours, (40, 160))
    process = start(*flags, output=its)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # of Linux, at the end
        while part := os.read(ours, 1024):
            shown += part
    process.wait()
    os.close(ours)
    return shown.decode()


def words() -> Iterator[Case]:
    for what, expected in (
        ("a step, in a run whose output is a file", r"Step 1/1 \(100\.0%\) loss .*tokens/s"),
        ("an evaluation", r"Step 1/1 \(100\.0%\) .*validation loss: .*perplexity .*\*"),
        ("a checkpoint", r"[Ss]aved .*checkpoint_step_1.* MB in .* s"),
    ):
        yield Case(
            what,
            "train_lora",
            expected,
            finished,
        )
    yield Case(
        "the pass over a frozen base, in a run whose output is a file",
        "train_lora --lora_r 0",
        r"features of train: micro-batch \d+/\d+ \(100\.0%\)",
        lambda: train(*FROZEN),
    )
    yield Case(
        "a terminal",
        "train_lora --max_steps 14 --logging_steps 2",
        r" 1\d/14 \[.*tokens/s, \d\d:\d\d left\]",
        lambda: in_a_terminal(
            *(*CHATS, "few.jsonl", "--max_steps", 14, "--logging_steps", 2),
            *("--output_dir", "outputs", "--experiment_name", "shown"),
        ),
    )
    yield Case(
        "the end of a run, with the next commands",
        "train_lora",
        "eval.py --checkpoint .*--prompt",
        finished,
    )
    yield Case(
        "Ctrl-C while torch is loaded",
        'train_lora, SIGINT after "loading torch ..."',
        r"^interrupted\.$",
        lambda: watched("loading", interrupt, *CHATS, "few.jsonl"),
    )
    yield Case(
        "the same mistakes in many rows",
        'train_lora: 6 rows {"text": 1} in turn with 6 of {,}',
        "error: .*12 bad rows: 2, 5, 8 and 3 more: .* 3, 6, 9 and 3 more: not JSON",
        lambda: train(*CHATS, write("bad.jsonl", *([{"text": "a"}, {"text": 1}, "{,}"] * 6))),
    )
    yield Case(
        "Ctrl-C while the model is trained",
        "train_lora, SIGINT after the first step",
        "finishing this step and saving; again to leave without saving",
        interrupted,
    )
    yield Case(
        "Ctrl-C, once the step is saved",
        "the same",
        "after step .*saved.*--resume_from",
        interrupted,
    )
    yield Case(
        "runs as a table for other programs",
        "compare --format csv",
        "^run,",
        lambda: program("lora", "compare", "outputs/original", "--format", "csv"),
    )
    yield Case(
        "a run that a guard stopped",
        'compare: "exit": 3 in status.json',
        "stopped by a guard: step 2: loss nan",
        tool("compare", stopped_by_a_guard),
    )
    yield Case(
        "what a merge changed",
        "merge",
        "fine: merged, the model computes what base . adapter compute",
        lambda: program(
            *("merge.py", "--adapter", "outputs/original/final_artifact", "--output", "merged")
        ),
    )
    yield Case(
        "runs of two tasks, compared",
        "compare --plot, of chats and of step scores",
        "cross entropy and mse; the picture is 2 times as high|mse and cross entropy; .* 2 times",
        compared_by_two_losses,
    )
    yield Case(
        "the commands of a sweep",
        "compare --sweep seed=42,7",
        "--experiment_name original_seed_7 --output_dir outputs",
        lambda: program("lora", "compare", "outputs/original", "--sweep", "seed=42,7"),
    )
    yield Case(
        "an evaluation into a file that has a second name",
        "eval --output",
        "new: True; the other name has: before",
        output_beside_a_link,
    )
    yield Case(
        "--init_from of another rank",
        "train_lora --init_from an adapter of rank 16 --lora_r 8",
        "error: .*add --lora_r 16",
        lambda: train(
            *(*CHATS, "few.jsonl", "--lora_r", 8),
            *("--init_from", "outputs/original/final_artifact"),
        ),
    )
    yield Case(
        "merging into the artifact itself",
        "merge --output inside final_artifact",
        "error: .*--output",
        lambda: program(
            *("merge.py", "--adapter", "outputs/original/final_artifact"),
            *("--output", "outputs/original/final_artifact/merged"),
        ),
    )


def stopped_by_a_guard() -> None:
    (RUN / "logs" / "final_results.json").unlink()
    write(str(RUN / "status.json"), {"exit": 3, "error": "step 2: loss nan"})


@functools.cache
def interrupted() -> str:
    """What a run says in which Ctrl-C is pressed after its first step."""
    return watched("Step 1", interrupt, *CHATS, "few.jsonl", "--max_steps", 10_000)


@functools.cache
def finished() -> str:
    return train(*CHATS, "few.jsonl", "--logging_steps", 1)


def compared_by_two_losses() -> str:
    """The axes for a run of texts and one of a scorer, in the terminal and in the picture."""
    train(*FROZEN, name="scorer")
    heights = []
    for runs in (["original"], ["original", "scorer"]):
        folders = [f"outputs/{name}" for name in runs]
        said = program("lora", "compare", *folders, "--plot", "runs.png")
        heights.append(int.from_bytes(Path("runs.png").read_bytes()[20:24], "big"))
    axes = re.findall(r"validation loss \((.*?)\)", said)
    times = round(heights[1] / heights[0])
    return f"{' and '.join(axes)}; the picture is {times} times as high as of one"


def output_beside_a_link() -> str:
    """Evaluate into a file that has a second name, and return what that has then."""
    kept, output = Path("kept.json"), Path("output.json")
    kept.write_text("before", encoding="utf-8")
    output.unlink(missing_ok=True)
    output.hardlink_to(kept)
    flags = ("--checkpoint", "outputs/original/final_artifact", "--output", output)
    said = program("eval.py", *flags, "--eval_data", "few.jsonl")
    is_new = output.read_text(encoding="utf-8") != "before"
    return f"{said}\nnew: {is_new}; the other name has: {kept.read_text(encoding='utf-8')}"


def main() -> int:
    return write_page(cases, PAGE, HEAD)


if __name__ == "__main__":
    sys.exit(main())
