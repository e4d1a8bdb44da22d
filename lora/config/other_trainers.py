"""Configuration files and flags of other trainers: their words and tables become ours.

Imported where a key, a table, a flag or a value is none of ours. The words are in other_words.py.
"""

from collections.abc import Collection, Sequence
from typing import Any

from lora.common.base_model_files import require_base
from lora.common.errors import UserError
from lora.common.printable_text import print_on_rank_zero
from lora.config.other_words import AUTOMATIC, EVALUATED, MEANINGS, SAME, UNSUPPORTED
from lora.config.parse_values import parse_text
from lora.config.schema import Config, EvaluationConfig, LoraConfig, fields_by_key, table_keys
from lora.config.table import ALIASES, DTYPE_SWITCHES, key_hint

# These words are LoRA's in one of these tables, or outside of any table.
LORA_WORDS = ("r", "rank", "alpha", "dropout")
LORA_TABLES = {"lora", "adapter", "peft", "qlora", "lora_config", "peft_config"}
# In one of these tables, batch_size or max_samples are not those of training.
EVALUATION_TABLES = {"eval", "evaluation", "validation", "generation", "inference", "test"}
OF_EVALUATION = (*vars(EvaluationConfig()), "eval_", "max_eval_batches", "early_stopping_patience")


def our_tables(config: Config, tables: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Return a file's tables with our keys. Raises UserError that names every key without one.

    They keep their names, which begin the messages; "a.b" is the table b in a, "" the file itself.
    """
    if config.lora is None and isinstance(tables.get("lora"), dict):
        no_lora = "train.py trains all weights and has no such table; use train_lora.py"
        raise UserError(f"{where}: [lora]: {no_lora}.")
    translation = Translation(config)
    translation.read_table([], tables)
    if translation.problems:
        raise UserError(f"{where}: {' '.join(translation.problems)}")
    translation.print_notes(where)
    return translation.tables


def our_arguments(config: Config, argv: Sequence[str], unknown: Sequence[str]) -> list[str]:
    """Return a command line with our flags. Raises UserError that names every flag without one.

    `unknown` is what argparse did not know of `argv`.
    """
    unknown_flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    ours: list[str] = []
    own_keys: set[str] = set()
    translation = Translation(config, prefix="--")
    for flag, values in split_flags(argv):
        name, equals, attached = flag.partition("=")
        name = "--" + name[2:].replace("-", "_")
        if name not in unknown_flags:
            ours += [flag, *values]
            own_keys.add(ALIASES.get(name[2:], name[2:]))
            continue
        values = [attached, *values] if equals else values
        value = values if len(values) > 1 else "".join(values)
        if name.removeprefix("--") in table_keys():
            expected = "expected a table, which only a config file can hold"
            translation.problems.append(f"{name} = {value!r}: {expected}.")
        else:
            translation.read_word([], name.removeprefix("--"), value or True)
    if translation.problems:
        raise UserError(" ".join(translation.problems))
    translation.print_notes("flags")
    for table in translation.tables.values():
        for key, value in table.items():
            if key in own_keys:
                raise UserError(f"--{key} is given twice.")
            values = value if isinstance(value, list) else [value]
            ours += [f"--{key}", *[str(item) for item in values if item is not True]]
    return ours


def split_flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each flag of a command line with the words after it."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") or not flags:
            flags.append((word, []))
        else:
            flags[-1][1].append(word)
    return flags


class Translation:
    """What was read: our keys with their values, and lines about words that have none.

    Attributes:
        tables: {the table where a key stood: {our key: its value}}.
        notes: words that need nothing, with the reason.
        problems: words that are not supported or not known, with the reason.
    """

    def __init__(self, config: Config, prefix: str = "") -> None:
        self.config = config
        self.prefix = prefix  # of a word in a message
        # Our own keys keep their names.
        own_names = {name: name for name in (*fields_by_key(config), *DTYPE_SWITCHES)}
        self.key_of = {**SAME, **ALIASES, **own_names}
        self.tables: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []

    def read_table(self, parents: list[str], table: dict[str, Any]) -> None:
        """Read a table and the tables in it; `parents` are the names of those around it."""
        # rank_pattern is a table of ours, and deepspeed is one that is not read.
        whole = [*table_keys(), *AUTOMATIC, *UNSUPPORTED]
        for word, value in table.items():
            name = word.replace("-", "_")
            if isinstance(value, dict) and not find_word(parents, name, whole):
                self.read_table([*parents, name], value)
            else:
                self.read_word(parents, name, value)

    def read_word(self, parents: list[str], name: str, value: Any) -> None:
        """Read one word with its value."""
        label = self.prefix + ".".join([*parents, name])
        word = find_word(parents, name, [*MEANINGS, *self.key_of, *AUTOMATIC, *UNSUPPORTED])
        if not word:
            # train.py has no keys of LoRA, and needs none where they are off.
            if not (is_lora_key(name) and value in (None, False)):
                self.problems.append(f"{label}: {why_unknown(self.config, name)}")
        elif value is None and word == "clip_grad_norm":
            self.set_key(parents, label, "max_grad_norm", 0.0)  # torchtune's: no clipping
        elif value is None and self.key_of.get(word) == "max_grad_norm":
            self.notes.append(f"{label} (null: the default, 1.0; 0 is no clipping)")
        elif value is None and self.key_of.get(word) == "max_length":
            self.notes.append(f"{label} (null: the default, 2048 tokens at most)")
        elif value is None:
            return  # the word is there, but not given
        elif word in MEANINGS:
            self.read_meaning(parents, label, word, value)
        elif word == "model_name":
            self.read_model_name(parents, label, value)
        elif word in self.key_of:
            self.read_key(parents, label, word, value)
        elif word in AUTOMATIC:
            self.notes.append(f"{label} ({AUTOMATIC[word]})")
        elif plain(value) in UNSUPPORTED[word][0]:
            self.notes.append(f"{label} (already so here)")
        else:
            self.problems.append(f"{label}: not supported: {UNSUPPORTED[word][1]}.")

    def read_meaning(self, parents: list[str], label: str, word: str, value: Any) -> None:
        """Read a word whose values mean a script of ours, or a key of another name."""
        meanings = MEANINGS[word]
        value = plain(value)
        if value not in list(meanings):
            expected = ", ".join(str(known).lower() for known in meanings)
            self.problems.append(f"{label} = {value!r}: expected one of {expected}.")
            return
        meaning = meanings[value]
        script = "train.py" if self.config.lora is None else "train_lora.py"
        if isinstance(meaning, tuple):
            self.set_key(parents, label, *meaning)
        elif meaning not in (None, script):
            self.problems.append(f"{label} = {value!r}: use {meaning}.")

    def read_key(self, parents: list[str], label: str, word: str, value: Any) -> None:
        """Read a word that is a key of ours, unless it may be another's."""
        key = self.key_of[word]
        if EVALUATION_TABLES.intersection(parents) and key == "batch_size":
            self.notes.append(f"{label} ({AUTOMATIC['eval_batch_size']})")
        elif word in LORA_WORDS and parents and not LORA_TABLES.intersection(parents):
            self.problems.append(f"{label}: {key} is LoRA's; if it is meant, give it in [lora].")
        elif key == "eval_fraction" and plain(value) == 0:
            held_out = "some examples are held out, or eval_data names them"
            self.problems.append(f"{label} = {value}: {held_out}; {EVALUATED}.")
        else:
            if word == "lora_target" and value in ("all", ["all"]):  # LLaMA-Factory's word
                value = "all-linear"
            self.set_key(parents, label, key, value)

    def read_model_name(self, parents: list[str], label: str, value: Any) -> None:
        """Read the name of the base, which some trainers' users give the run."""
        try:
            self.set_key(parents, label, "base_model", require_base(str(value)))
        except UserError as error:
            self.problems.append(str(error))

    def set_key(self, parents: list[str], label: str, key: str, value: Any) -> None:
        """Keep the value of a key of ours, if there was none before."""
        if key not in self.key_of:
            self.problems.append(f"{label}: {why_unknown(self.config, key)}")
        elif EVALUATION_TABLES.intersection(parents) and not key.startswith(OF_EVALUATION):
            hint = f"{key} is that of training; if it is meant, give it outside of this table"
            self.problems.append(f"{label}: {hint}.")
        elif key == "report_to":  # wandb.enabled and tensorboard.enabled may both be true
            names = self.tables.setdefault("", {}).setdefault("report_to", [])
            names += value if isinstance(value, list) else [value]
        elif any(key in table for table in self.tables.values()):
            before = [table[key] for table in self.tables.values() if key in table]
            if key != "load_in_4bit" or value not in before:  # Axolotl has adapter: qlora beside it
                self.problems.append(f"{label}: {key} is given twice.")
        else:
            self.tables.setdefault(".".join(parents), {})[key] = value

    def print_notes(self, where: str) -> None:
        if self.notes:
            words = "1 key needs" if len(self.notes) == 1 else f"{len(self.notes)} keys need"
            print_on_rank_zero(f"note: {where}: {words} nothing here: {', '.join(self.notes)}")


def find_word(parents: list[str], name: str, known: Collection[str]) -> str:
    """Return "table.name" or the name, whichever is known, or ""."""
    for word in (".".join([*parents[-1:], name]), name):
        if word in known:
            return word
    return ""


def plain(value: Any) -> Any:
    """Return a text in lower case, or the boolean or the number that it stands for."""
    if not isinstance(value, str):
        return value
    text = value.lower()
    if text in ("true", "false"):
        return text == "true"
    return parse_text(text, float)


def is_lora_key(name: str) -> bool:
    return ALIASES.get(name, name) in vars(LoraConfig())


def why_unknown(config: Config, name: str) -> str:
    """Return why the configuration has no key of this name."""
    if config.lora is None and is_lora_key(name):
        return "train.py trains all weights and has no such key; use train_lora.py."
    known = [*DTYPE_SWITCHES, *fields_by_key(config)]
    return f"no such key.{key_hint(name, known) or ' See --help.'}"
