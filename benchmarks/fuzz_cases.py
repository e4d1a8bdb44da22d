"""What fuzz.py tries: things that work, and one mutation of each.

A kind of case is a function of random numbers, the folder of the originals, the folder of the case,
which it fills, and a kind of data. It returns a command and what that must lead to.
"""

import copy
from dataclasses import dataclass, field
from enum import Enum
import gzip
import json
import os
from pathlib import Path
import random
import re
import shutil
import tomllib
from typing import Any

from common import ROOT
from safetensors.torch import load_file, save_file
import torch
import yaml

from lora.common.checksums import write_checksums
from lora.common.toml_json import to_toml
from lora.config.schema import fields_by_key, get_lora_config, tables_of
from lora.config.set_keys import key_values
from lora.config.table import ALIASES


class Meant(Enum):
    """What a mutation must lead to, where it is no error of another kind."""

    SAME = "changes nothing: the same configuration, rows, targets and losses"
    REFUSED = "is refused"
    SEEN = "is refused, or the configuration of the run has exactly the values of `Case.values`"
    FELT = "the same, and another value than the original's changes the training or has a note"
    TOLD = "is refused, or changes the training, or the output has a note"
    ANY = "is refused or not"


@dataclass
class Case:
    """A command in the folder where its mutated files stand."""

    mutation: str  # in words
    command: list[str]
    meant: Meant
    values: dict[str, Any] = field(default_factory=dict)  # keys that differ from the original's


# -------------------------------------------------------------------------------- what works


def chat(question: str, answer: str) -> dict:
    user, assistant = {"role": "user", "content": question}, {"role": "assistant"}
    return {"messages": [user, assistant | {"content": answer}]}


def rows_of(kind: str, numbers: range) -> list[dict]:
    if kind == "chats":
        return [chat(f"say {n}", f"here it is: {n}") for n in numbers]
    if kind == "texts":
        return [{"text": f"number {n} is before {n + 1}"} for n in numbers]
    steps = ["first", "then"]
    return [{"prompt": f"p {n}", "steps": [*steps, f"{n}"], "labels": [1, 1, 0]} for n in numbers]


DATA_KINDS = {"chats": "lm", "texts": "lm", "chains": "score"}
SETTINGS = {
    "base_model": "embedded",
    "train_data": ["rows.jsonl"],
    "eval_data": ["held_out.jsonl"],
    "max_length": 64,
    "learning_rate": 1e-3,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "save_steps": 1,
    "eval_steps": 1,
    "logging_steps": 1,
    "experiment_name": "run",
    "output_dir": "out",
}


def flags_of(settings: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def train(data_kind: str, *more: str, **changed: Any) -> list[str]:
    settings = SETTINGS | {"task": DATA_KINDS[data_kind]} | changed
    return ["train_lora.py", *flags_of(settings), *more]


def prepare_rows(folder: Path, data_kind: str) -> None:
    folder.mkdir(parents=True)
    write_rows(folder / "rows.jsonl", rows_of(data_kind, range(8)))
    write_rows(folder / "held_out.jsonl", rows_of(data_kind, range(100, 104)))


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


RUN, ARTIFACT, CHECKPOINT = "out/run", "out/run/final_artifact", "checkpoint_step_1"
ACTIONS = {  # what reads a run: {its name: (what is mutated, the command)}
    "compare": (RUN, ["-m", "lora", "compare", RUN]),
    "report": (RUN, ["-m", "lora", "report", RUN]),
    "resume": (RUN, ["train_lora.py", "--resume_from", f"{RUN}/checkpoints/{CHECKPOINT}"]),
    "auto": (RUN, ["TRAIN", "--resume_from", "auto"]),
    "init_from": (ARTIFACT, ["TRAIN", "--init_from", ARTIFACT, "--experiment_name", "second"]),
    "eval": (ARTIFACT, ["eval.py", "--checkpoint", ARTIFACT]),
    "merge": (ARTIFACT, ["merge.py", "--adapter", ARTIFACT, "--output", "merged"]),
}


def action(name: str, data_kind: str) -> list[str]:
    command = ACTIONS[name][1]
    return train(data_kind, *command[1:]) if command[0] == "TRAIN" else list(command)


def flat(tables: dict[str, Any]) -> dict[str, Any]:
    """The keys of all tables, by our names; keys that stand in no table too."""
    keys = {}
    for name, value in tables.items():
        is_table = isinstance(value, dict) and not name.endswith(("pattern", "columns"))
        keys |= flat(value) if is_table else {ALIASES.get(name, name): value}
    return keys


DEFAULTS = key_values(get_lora_config())


# -------------------------------------------------------------------------------- mutations

ODD_NUMBERS = (0, -1, 1, 3, 0.5, 1e-9, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"))
ODD_TEXTS = (
    *("", " ", "abc", "1", "1e-4", "0x10", "1_0", "\u0663", "nan", "-inf", "true", "None", "none"),
    *("\x1b[31mred", "\u202eabc", "a\x00b", "a\nb", "../x", "a" * 5000, "{prompt}", "["),
    "<|im_end|>",
)
ODD = (*ODD_NUMBERS, *ODD_TEXTS, None, True, False, [], {}, [None], [[1]], {"a": {"b": 1}})


def places_in(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value below the top of a tree of JSON."""
    pairs: Any = tree.items() if isinstance(tree, dict) else ()
    pairs = enumerate(tree) if isinstance(tree, list) else pairs
    places = []
    for name, value in pairs:
        places += [(*path, name), *places_in(value, (*path, name))]
    return places


def mutate_json(draw: random.Random, tree: Any) -> tuple[Any, str]:
    """Return a tree with one value replaced, removed or added, and what was done."""
    tree, original = copy.deepcopy(tree), tree
    *above, name = draw.choice(places_in(tree))
    parent = tree
    for step in above:
        parent = parent[step]
    where = ".".join(map(str, (*above, name)))
    how = draw.choice(["replace", "replace", "replace", "remove", "add"])
    if how == "remove":
        del parent[name]
        return tree, f"{where} removed"
    value = draw.choice(ODD)
    if how == "add" and isinstance(parent, dict):
        parent["surprise"] = value
        return tree, f"surprise = {short(value)} beside {where}"
    parent[name] = value
    if tree == original:
        return mutate_json(draw, tree)
    return tree, f"{where} = {short(value)}"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 50 else text[:47] + "..."


def mutate_bytes(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    place = draw.randrange(max(1, len(content) - 1))
    flipped = bytearray(content or b" ")
    flipped[place] ^= 1 << draw.randrange(8)
    odd = draw.choice([b"\x00", b"\xff", b"\x1b[31m", b'"', b"}", b"\xed\xa0\x80"])
    choices = {
        "empty": b"",
        f"cut at {place}": content[:place],
        f"a flipped bit at {place}": bytes(flipped),
        f"{odd!r} at {place}": content[:place] + odd + content[place:],
        "garbage at the end": content + b"\n}garbage",
        "twice": content + content,
        "a page of HTML": b"<!DOCTYPE html><html>404</html>\n",
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    words = draw.choice(list(choices))
    return choices[words], words


def mutate_tensors(draw: random.Random, path: Path) -> str:
    """Mutate a file of weights in a way that must be refused; return what was done."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = draw.choice(sorted(tensors))
    how = draw.choice(
        ["dropped", "renamed", "NaN", "of one more dimension", "of another length", "integers"]
    )
    tensor = tensors.pop(name)
    if how == "renamed":
        tensors[name + "x"] = tensor
    elif how == "NaN":
        tensors[name] = tensor * float("nan")
    elif how == "of one more dimension":
        tensors[name] = tensor[None]
    elif how == "of another length":
        tensors[name] = tensor[1:].clone()
    elif how == "integers":
        tensors[name] = tensor.to(torch.int32)
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name} {how}"


def mutate_path(draw: random.Random, path: Path) -> str:
    """Put something that is no plain file in the place of one; return what was done."""
    path.unlink()
    links = {"/etc/passwd": "/etc/passwd", "nothing": "nowhere", "itself": path.name}
    how = draw.choice(["missing", "a folder", "a fifo", *links])
    if how == "a folder":
        path.mkdir()
    elif how == "a fifo":
        os.mkfifo(path)
    elif how in links:
        path.symlink_to(links[how])
        how = f"a link to {how}"
    return how


def mutate_file(draw: random.Random, path: Path) -> str:
    """Mutate a file in one of the ways above; return what was done."""
    how = draw.choice(["json", "json", "bytes", "path"])
    if path.suffix == ".safetensors" and draw.random() < 0.5:
        return mutate_tensors(draw, path)
    if how == "json" and path.suffix == ".json":
        tree, words = mutate_json(draw, json.loads(path.read_bytes()))
        path.write_text(json.dumps(tree), encoding="utf-8")
        return words
    if how == "path":
        return mutate_path(draw, path)
    content, words = mutate_bytes(draw, path.read_bytes())
    path.write_bytes(content)
    return words


# -------------------------------------------------------------------------------- kinds of cases

FLAGS = [
    field
    for _, field in fields_by_key(get_lora_config()).values()
    if field.name not in ("rank_pattern", "alpha_pattern", "reveal_columns", "compile")
]
LENGTHS = ("max_steps", "num_train_epochs")  # a large one is legal, and takes its time
# What a value of these must change, whatever the task; or a note says that it is not read.
FELT = {
    *("learning_rate", "seed", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "loraplus_lr_ratio"),
    *("load_in_4bit", "bnb_4bit_quant_type", "head_dropout", "head_tokens", "score_loss"),
    *("max_samples", "eval_fraction", "warmup_ratio", "prompt_format", "step_format"),
    *("prm800k_path", "prm800k_weight", "eqasc_path", "reveal_path", "reveal_weight"),
    *("add_special_tokens", "modules_to_save"),
}


def flags(draw: random.Random, originals: Path, folder: Path, data_kind: str) -> Case:
    """A flag with an odd value, two of legal values, or the same flags in another spelling."""
    prepare_rows(folder, data_kind)
    command = train(data_kind)
    how = draw.choice(["odd", "odd", "odd", "legal", "legal", "spelling"])
    if how == "spelling":
        return misspelt(draw, command)
    if how == "legal":
        values = {}
        for field in draw.sample(FLAGS, 2):
            values[field.name] = legal_value(draw, field)
        more = [f"--{name}={value}" for name, value in values.items()]
        return Case(" ".join(more), [*command, *more], Meant.SEEN, values)
    name = draw.choice([*(field.name for field in FLAGS), *SETTINGS, *FELT])
    value = draw.choice([str(odd) for odd in ODD_NUMBERS] + list(ODD_TEXTS))
    value = value.replace("\x00", "")  # no program can be given it
    if is_long(name, value):
        value = "0.0"
    meant = Meant.FELT if name in FELT and value != "1e-09" else Meant.SEEN
    return Case(f"--{name} {value!r}", [*command, f"--{name}={value}"], meant, {name: value})


def misspelt(draw: random.Random, command: list[str]) -> Case:
    place = 2 * draw.randrange(len(SETTINGS)) + 1
    flag, value = command[place : place + 2]
    before, after = command[:place], command[place + 2 :]
    cases = [
        Case(f"{flag} without a value", [*before, flag, *after], Meant.REFUSED),
        Case(f"{flag[:-1]}", [*before, flag[:-1], value, *after], Meant.REFUSED),
        Case(f"a stray word before {flag}", [*before, "stray", flag, value], Meant.REFUSED),
        Case(f"{flag}=", [*before, f"{flag}={value}", *after], Meant.SAME),
        Case(f"{flag} with dashes", [*before, flag.replace("_", "-"), value, *after], Meant.SAME),
        Case(f"{flag} last", [*before, *after, flag, value], Meant.SAME),
    ]
    return draw.choice(cases)


def legal_value(draw: random.Random, field: Any) -> str:
    """A value that a key may have on its own, as text."""
    limits, low = field.metadata, field.metadata["low"] or 0
    if limits["choices"]:
        return draw.choice(limits["choices"])
    if "bool" in str(field.type):
        return draw.choice(["true", "false"])
    if "float" in str(field.type):
        return str(draw.choice([low or 0.1, 0.1, 0.5]))
    if "int" in str(field.type):
        return str(max(low, draw.choice([low, 1, 2, 3, 8])))
    return draw.choice(["a", "1", "all-linear", "q_proj", "lm_head", "scratch", "none"])


def is_long(name: str, value: str) -> bool:
    return name in LENGTHS and re.fullmatch(r"[\d.e+]{3,}", value) is not None


def configs(draw: random.Random, originals: Path, folder: Path, data_kind: str) -> Case:
    """A configuration file with an odd value or character, or in another format."""
    prepare_rows(folder, data_kind)
    settings = SETTINGS | {"task": DATA_KINDS[data_kind]}
    tables = {"lora": {"lora_r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}}}
    for title, table in tables_of(get_lora_config()).items():
        if title != "lora":
            tables[title] = {name: settings[name] for name in settings if hasattr(table, name)}
    suffix = draw.choice(["toml", "json", "yaml"])
    how = draw.choice(["value", "value", "character", "character", "format"])
    words = "as it is"
    if how == "value":
        tables, words = mutate_json(draw, tables)
    if how == "value" and suffix == "toml":
        suffix = "json"  # TOML has no null
    writers = {"toml": to_toml, "json": json.dumps, "yaml": yaml.safe_dump}
    text = writers[suffix](tables)
    if how == "character":
        place = draw.randrange(len(text))
        character = draw.choice(
            ["", "#", "-", "0", "1", "_", '"', "\t", "[", "x", ":", " ", "\u00e9"]
        )
        text = text[:place] + character + text[place + draw.choice([0, 1]) :]
        words = f"{character!r} in {text[max(0, place - 12) : place + 12]!r}"
    if how == "format":
        words = draw.choice(["as it is", "CRLF", "a byte-order mark", "a comment"])
        text = text.replace("\n", "\r\n") if words == "CRLF" else text
        text = "\ufeff" + text if words == "a byte-order mark" else text
        text = text + "\n# x\n" if words == "a comment" and suffix != "json" else text
    path = folder / f"config.{suffix}"
    path.write_text(text, encoding="utf-8", newline="")
    command = ["train_lora.py", "--config", path.name]
    words = f"config.{suffix}: {words}"
    values = parsed(text, suffix)
    if values is None:
        return Case(words, command, Meant.REFUSED)
    values = {name: value for name, value in values.items() if value is not None}
    if any(is_long(name, str(values.get(name))) for name in LENGTHS):
        command += ["--max_steps", "2"]
        values["max_steps"] = 2
    nothing_given = {name: DEFAULTS.get(name) for name in SETTINGS}
    return Case(words, command, Meant.SEEN, nothing_given | values)


def parsed(text: str, suffix: str) -> dict[str, Any] | None:
    """The keys of a configuration as another parser reads them; None where it cannot."""
    readers = {"toml": tomllib.loads, "json": json.loads, "yaml": yaml.safe_load}
    try:
        tables = readers[suffix](text.removeprefix("\ufeff"))
    except (ValueError, yaml.YAMLError):
        return None
    return flat(tables) if isinstance(tables, dict) else None


def rows(draw: random.Random, originals: Path, folder: Path, data_kind: str) -> Case:
    """A row with an odd value, a damaged file, or the same rows in another form."""
    prepare_rows(folder, data_kind)
    path, name = folder / "rows.jsonl", "rows.jsonl"
    rows, content = rows_of(data_kind, range(8)), path.read_bytes()
    how = draw.choice(["value", "value", "value", "value", "bytes", "same", "twice"])
    meant = Meant.TOLD
    if how == "value":
        number = draw.randrange(8)
        rows[number], words = mutate_json(draw, rows[number])
        write_rows(path, rows)
        words = f"row {number + 1}: {words}"
    elif how == "bytes":
        content, words = mutate_bytes(draw, content)
        path.write_bytes(content)
    elif how == "twice":
        first = json.dumps({draw.choice(list(rows[0])): "x"}).removesuffix("}")
        path.write_bytes(f"{first}, ".encode() + content[1:])
        words, meant = "a key given twice", Meant.REFUSED
    else:
        forms = same_rows(rows, data_kind)
        words = draw.choice(list(forms))
        name, content = forms[words]
        path.unlink()
        (folder / name).write_bytes(content)
        meant = Meant.SAME
    command = train(data_kind, train_data=name)
    return Case(f"{data_kind}, {words}", command, meant, {"train_data": [name]})


def same_rows(rows: list[dict], data_kind: str) -> dict[str, tuple[str, bytes]]:
    """The rows in other forms: {words: (name of the file, its content)}."""
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines)
    backwards = "\n".join(json.dumps(dict(reversed(row.items()))) for row in rows)
    escaped = re.sub('[a-z](?=[ "])', lambda found: f"\\u{ord(found[0]):04x}", text)
    escaped = escaped if data_kind != "chains" and "ro\\u" not in escaped else text
    forms = {
        "no newline at the end": ("rows.jsonl", text),
        "blank lines": ("rows.jsonl", text.replace("\n", "\n\n  \n")),
        "CRLF": ("rows.jsonl", text.replace("\n", "\r\n")),
        "a byte-order mark": ("rows.jsonl", "\ufeff" + text),
        "keys in another order": ("rows.jsonl", backwards),
        "escapes": ("rows.jsonl", escaped),
        "a list of JSON": ("rows.json", json.dumps(rows, indent=1)),
        "spaces": ("rows.jsonl", text.replace(", ", " ,\t").replace("},\t", "}, ")),
    }
    if data_kind == "chats":
        pairs = [[message["content"] for message in row["messages"]] for row in rows]
        for names in (("prompt", "completion"), ("question", "answer"), ("instruction", "output")):
            in_pairs = "\n".join(json.dumps(dict(zip(names, pair))) for pair in pairs)
            forms[f"keys {' and '.join(names)}"] = ("rows.jsonl", in_pairs)
        turns = [[{"from": m["role"], "value": m["content"]} for m in r["messages"]] for r in rows]
        shared = "\n".join(json.dumps({"conversations": turn}) for turn in turns)
        forms["ShareGPT's keys"] = ("rows.jsonl", shared)
    if data_kind == "texts":
        table = "text\n" + "\n".join(row["text"] for row in rows)
        forms["a table"] = ("rows.csv", table)
    encoded = {words: (name, text.encode()) for words, (name, text) in forms.items()}
    return encoded | {"gzip": ("rows.jsonl.gz", gzip.compress(text.encode()))}


def runs(draw: random.Random, originals: Path, folder: Path, data_kind: str) -> Case:
    """The folder of a run with a mutated file, which is compared, reported, resumed, ..."""
    return read_again(draw, originals, folder, data_kind, ["compare", "report", "resume", "auto"])


def artifacts(draw: random.Random, originals: Path, folder: Path, data_kind: str) -> Case:
    """An artifact with a mutated file, sealed again or not."""
    return read_again(draw, originals, folder, data_kind, ["init_from", "eval", "merge"])


def read_again(draw: random.Random, originals: Path, folder: Path, *how: Any) -> Case:
    data_kind, names = how
    name = draw.choice(names)
    copy_run(originals / data_kind, folder, name)
    top = folder / ACTIONS[name][0]
    path = draw.choice(sorted(path for path in top.rglob("*") if path.is_file()))
    words = mutate_file(draw, path)
    sealed = next((up for up in path.parents if (up / "checksums.json").exists()), None)
    sealed = sealed or (path.parent if path.name == "checksums.json" else None)
    meant = Meant.ANY
    if sealed and name in ("resume", "auto", "init_from", "eval", "merge"):
        meant = Meant.REFUSED
        if draw.random() < 0.6 and path.name != "checksums.json" and not path.is_symlink():
            write_checksums(sealed)
            meant = Meant.ANY
            words += ", sealed again"
    words = f"{name} of {data_kind}: {path.relative_to(folder)}: {words}"
    return Case(words, action(name, data_kind), meant)


def copy_run(original: Path, folder: Path, name: str) -> None:
    """Copy a run with its data; what is resumed was interrupted after its first checkpoint."""
    shutil.copytree(original, folder)
    if name in ("resume", "auto"):
        shutil.rmtree(folder / ARTIFACT)
        shutil.rmtree(folder / RUN / "checkpoints" / "checkpoint_step_2")


def bases(draw: random.Random, originals: Path, folder: Path, data_kind: str) -> Case:
    """A base with a mutated file."""
    prepare_rows(folder, data_kind)
    shutil.copytree(ROOT / "assets" / "tiny_base", folder / "base")
    path = draw.choice([*sorted((folder / "base").iterdir()), folder / "base" / "config.json"])
    is_weights = path.suffix == ".safetensors"
    how = mutate_tensors if is_weights and draw.random() < 0.5 else mutate_file
    words = how(draw, path)
    meant = Meant.REFUSED if how is mutate_tensors else Meant.ANY
    return Case(f"{path.name}: {words}", train(data_kind, base_model="base"), meant)


KINDS = [flags, configs, rows, runs, bases, artifacts]
