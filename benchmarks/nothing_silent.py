"""What was once trained or measured wrongly without a word, tried again: what is said now.

    python benchmarks/nothing_silent.py        writes docs/nothing_silent.md

A new case is one more entry of `cases`.
"""

from collections.abc import Callable, Iterator
import importlib.util
import json
import os
from pathlib import Path
import re
import resource
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from peft import PeftConfig
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

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
from lora.common.toml_json import read_file
from lora.config.schema import DataConfig, EvaluationConfig, get_lora_config
from lora.data.readers import read
from lora.data.tokenise import NO_TOKEN, tokenise
from lora.evaluation.text_metrics import score_answer

PAGE = ROOT / "docs" / "nothing_silent.md"
# bfloat16, the default of 4-bit layers, is emulated on many CPUs.
FLOAT32 = ("--bnb_4bit_compute_dtype", "float32")


def gptoss() -> Path:
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    template = (folder / "gptoss.jinja").read_text(encoding="utf-8")
    return base_with(template, *sorted(set(re.findall(r"<\|\w+\|>", template))))


# --------------------------------------------------------------------------------------- the cases


def cases() -> list[Case]:
    return [
        *keys_that_are_not_read(),
        *masks(),
        *tables_and_numbers(),
        *token_cache(),
        *bases(),
        *from_python(),
        *runs(),
        *other_systems(),
    ]


def keys_that_are_not_read() -> Iterator[Case]:
    for switch in ({"weight": 0}, {"train": False}, {"training": False}, {"loss_weight": 0}):
        row = chat({"content": "one", **switch}, {"content": "two"})
        yield Case(
            "a chat in which one answer is switched off",
            f"render: {shown(switch)} on the first of two answers",
            r"\b4 targets",
            lambda row=row: render(row),
        )
    yield Case(
        "an answer of half the weight",
        'tokenise: "weight": 0.5 on one of two answers',
        r"weights of the targets: 0\.5, 1\.0",
        weights_of_targets,
    )
    both = chat({"content": "one", "weight": 0, "train": True})
    yield Case(
        "two switches of one message that disagree",
        'render: "weight": 0 and "train": true',
        "weight and train of message 2 disagree",
        lambda: render(both),
    )
    kto = {"prompt": "q", "completion": "a bad answer", "label": False}
    yield Case(
        "KTO rows",
        f"render: {shown(kto)}",
        "label beside a conversation",
        lambda: render(kto),
    )
    beside = chat({"content": "one"}, system="Be kind.")
    yield Case(
        "Anthropic's system prompt, beside the messages",
        'render: "system": "Be kind."',
        r"Be kind\.<\|im_end\|>",
        lambda: render(beside),
    )
    alpaca = {"instruction": "q", "output": "a", "system": "Be kind.", "history": [["p", "b"]]}
    yield Case(
        "Alpaca's system and history",
        f"render: {shown(alpaca)}",
        "⟦b<.im_end.>⟧",
        lambda: render(alpaca),
    )
    context = {"question": "Who?", "context": "Bees make honey.", "answer": "Bees."}
    yield Case(
        "a context beside a question",
        f"render: {shown(context)}",
        r"Bees make honey\.<\|im_end\|>",
        lambda: render(context),
    )
    thinking = chat({"content": "one", "reasoning_content": "because"})
    yield Case(
        "reasoning that the chat template does not print",
        'render: "reasoning_content": "because", with the embedded base',
        r"left out, as the chat template does not print it: reasoning \(1\)",
        lambda: render(thinking),
    )
    with_tools = chat({"content": "one"}, tools=[{"name": "rain", "parameters": {}}])
    yield Case(
        "tools that the chat template does not print",
        f"render: {shown({'tools': with_tools['tools']})}, with the embedded base",
        r"left out, as the chat template does not print it: tools \(1\)",
        lambda: render(with_tools),
    )
    for key in ("images", "videos", "audio"):
        row = chat({"content": "one"}, **{key: ["a.png"]})
        yield Case(
            f"rows with {key}",
            f"render: {shown({key: ['a.png']})}",
            f"{key}: only text is read",
            lambda row=row: render(row),
        )
    other = [row | {"source": "web"} for row in chats(3)]
    yield Case(
        "a key that nothing reads",
        'render: three rows with "source"',
        r"keys not read: source \(3 rows\)",
        lambda: render(*other),
    )
    steps = {"prompt": "p", "steps": ["a"], "completions": ["b"], "labels": [1]}
    yield Case(
        "steps and completions that differ",
        f"render: {shown(steps)}",
        "steps and completions differ",
        lambda: render(steps, task="score"),
    )
    pair = {"sentence1": "a", "sentence2": "b", "score": 1, "label": 0}
    yield Case(
        "a score and a label that disagree",
        f"render: {shown(pair)}",
        "score and label disagree",
        lambda: render(pair, task="score"),
    )


def weights_of_targets() -> str:
    path = write("rows.jsonl", chat({"content": "one", "weight": 0.5}, {"content": "two"}))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = DataConfig(max_length=256)
    (row,) = tokenise(read([path], "lm"), tokenizer, "lm", data, True)[0].rows
    weights = {
        weight for target, weight in zip(row.targets, row.target_weights) if target != NO_TOKEN
    }
    return f"weights of the targets: {', '.join(map(str, sorted(weights)))}"


def masks() -> Iterator[Case]:
    only_thought = chat({"content": "<think>r</think>"})
    yield Case(
        "an answer that is only reasoning, for gpt-oss",
        "render: <think>r</think>, with gpt-oss's template",
        "message 2: cannot tell where the chat template of .* writes it",
        lambda: render(only_thought, base=gptoss()),
    )
    thinking = chat({"content": "one", "thinking": "r"})
    yield Case(
        "gpt-oss's own chats",
        'render: "thinking": "r", with its template',
        r"⟦<.channel.>analysis<.message.>r<.end.>.*<.channel.>final<.message.>one<.return.>⟧",
        lambda: render(thinking, base=gptoss()),
    )
    lines = chat({"content": "one\r\ntwo"})
    rewriting = CHATML.replace("CONTENT", r"m.content | replace('\r\n', '\n')")
    yield Case(
        "a template that rewrites line ends",
        r"render: one\r\ntwo, template with replace('\r\n', '\n')",
        "message 2: cannot tell where the chat template of .* writes it",
        lambda: render(lines, base=base_with(rewriting)),
    )
    lookalike = chat({"content": "<|im_end|> ends a turn"})
    for name in ("upper", "truncate(9, true, '')", "length"):
        template = CHATML.replace("CONTENT", "m.content }} {{ m.content | " + name)
        yield Case(
            "a text like a special token, and a template with a filter",
            f"render: <|im_end|> in an answer, template with {name}",
            r"does more than print <\|im_end\|>, which the chat holds",
            lambda template=template: render(lookalike, base=base_with(template)),
        )
    empty = chat({"content": "<think>\n\n</think>\n\none"})
    yield Case(
        "empty reasoning before an answer",
        r"render: <think>\n\n</think>\n\none",
        r"⟦<think>",
        lambda: render(empty),
    )
    blank = chat({"content": " "})
    yield Case(
        "one blank message in a hundred rows",
        "render",
        r"left out: 1 rows \(a blank message\)",
        lambda: render(*chats(99), blank),
    )
    yield Case(
        "two blank messages in a hundred rows",
        "render",
        "2 of 100 rows have a blank message; expected at most 1%",
        lambda: render(*chats(98), blank, blank),
    )


def tables_and_numbers() -> Iterator[Case]:
    rows = ("text", 'a 5" pipe', '"one', "two", "three")
    yield Case(
        'a stray " in a TSV file',
        "render: four rows, two of them with a quote",
        r"data: 4 examples",
        lambda: render(*rows, name="rows.tsv"),
    )
    for number in ("0_1", "1_6", "\u0661"):
        pairs = ("sentence1,sentence2,score", f"a,b,{number}")
        yield Case(
            "a label that Python's float() reads and JSON does not",
            f"render: score {number} in a CSV file",
            f"label '{number}'; expected 0..1",
            lambda pairs=pairs: render(*pairs, name="rows.csv", task="score"),
        )
    twice = '{"training": {"batch_size": 4, "batch_size": 8}}'
    yield Case(
        "a key that stands twice in a configuration",
        f"train_lora --config: {twice}",
        "'batch_size' is given twice",
        lambda: program("train_lora.py", "--config", write("config.json", twice)),
    )


def token_cache() -> Iterator[Case]:
    yield Case(
        "a flipped bit in the token cache",
        "train_lora twice, one bit of train_tokens.bin changed between",
        "train_tokens changed since they were written; the entry is removed",
        lambda: after_damage("train_tokens.bin", flip),
    )
    yield Case(
        "a file of the cache cut short",
        "the same, with half of train_tokens.bin",
        "damaged .*; the data are tokenised again",
        lambda: after_damage("train_tokens.bin", halve),
    )
    yield Case(
        "a cache without its facts",
        "the same, without facts.json",
        "damaged .*; the data are tokenised again",
        lambda: after_damage("facts.json", Path.unlink),
    )
    yield Case(
        "a full disk (ulimit -f)",
        "train_lora, files of 1,024 bytes at most",
        "no room for it.*exit status 4",
        on_full_disk,
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # it may be mapped
    path.write_bytes(content)


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def after_damage(name: str, damage: Callable[[Path], None]) -> str:
    """What a run says whose entry of the token cache was damaged."""
    shutil.rmtree(os.environ["PLAINLORA_CACHE"], ignore_errors=True)
    path = write("chats.jsonl", *chats(24))
    train(*CHATS, path, name="before")
    (damaged,) = Path(os.environ["PLAINLORA_CACHE"]).glob(f"*/*/{name}")
    damage(damaged)
    return train(*CHATS, path, name="after")


def on_full_disk() -> str:
    path = write("chats.jsonl", *chats(40))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        return train(*CHATS, path, name="full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def bases() -> Iterator[Case]:
    yield Case(
        "a base with more layers in its files than config.json says",
        "train_lora: num_hidden_layers one less",
        "its files have more layers than config.json says",
        lambda: with_base(fewer_layers),
    )
    yield Case(
        "a base with integer weights and no quantization_config",
        "train_lora: one weight as int8",
        "its files are quantised, and config.json does not say how",
        lambda: with_base(integer_weight),
    )
    yield Case(
        "all-linear on a mixture of experts, each layer's in one tensor",
        "train_lora: a Qwen3-MoE",
        "warning: experts that are one tensor stay as they are .* LoRA reaches",
        lambda: with_base(experts),
    )


def with_base(change: Callable[[Path], None]) -> str:
    """What a dry run says of a changed copy of the embedded base."""
    folder = Path("changed_base")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(BASE, folder)
    change(folder)
    flags = ("--base_model", folder, "--max_length", 64, "--train_data")
    return train(*flags, write("few.jsonl", *chats(13)), "--dry_run")


def fewer_layers(folder: Path) -> None:
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")


def integer_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path, {"format": "pt"})


def experts(folder: Path) -> None:
    shape = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        max_position_embeddings=512,
    )
    Qwen3MoeForCausalLM(shape).save_pretrained(folder)


def from_python() -> Iterator[Case]:
    for table, name, value, expected in (
        ("training", "per_device_train_batch_size", 2, r"training\.batch_size = 2"),
        ("training", "bf16", True, r"training\.dtype = 'bfloat16'"),
        ("training", "lerning_rate", 1e-4, "has no key lerning_rate.* learning_rate"),
        ("", "experiment_name", "x", "experiment_name"),
    ):
        yield Case(
            "a key of another name, from Python",
            f"config.{table + '.' if table else ''}{name} = {value!r}",
            expected,
            lambda table=table, name=name, value=value: set_in_python(table, name, value),
        )


def set_in_python(table: str, name: str, value: object) -> str:
    """What changes in the tables of a configuration, or the error."""
    config, default = get_lora_config(), get_lora_config()
    try:
        setattr(getattr(config, table) if table else config, name, value)
    except (AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    changed = []
    for title in ("model", "data", "lora", "training", "output"):
        before = vars(getattr(default, title))
        for key, found in vars(getattr(config, title)).items():
            if found != before[key]:
                changed.append(f"{title}.{key} = {found!r}")
    return "; ".join(changed)


def runs() -> Iterator[Case]:
    yield Case(
        "how many parameters a base in 4 bits has",
        "train_lora, with and without --load_in_4bit",
        r"the same: trainable parameters: [\d,]+ of [\d,]+",
        counts_in_4_bits,
    )
    yield Case(
        "a finished run, started again with --resume_from auto",
        "train_lora, twice",
        "complete since step 1; nothing to do",
        twice,
    )
    yield Case(
        "another number of threads in a resumed run",
        "OMP_NUM_THREADS=2, --resume_from a run of one thread",
        "resumed with threads 1 -> 2: .* results differ by rounding",
        with_other_threads,
    )
    weightless = [row | {"weight": 0} for row in chats(12)]
    yield Case(
        "all rows of weight 0",
        'train_lora: twelve rows with "weight": 0',
        "every train example has weight 0",
        lambda: train(*CHATS, write("weightless.jsonl", *weightless)),
    )
    few = write("few.jsonl", *chats(13))  # 12 of them to train on
    yield Case(
        "a warm-up longer than the run",
        "train_lora --warmup_steps 9 --max_steps 1",
        "warning: 9 warmup steps: learning_rate is never reached",
        lambda: train(*CHATS, few, "--warmup_steps", 9, "--dry_run"),
    )
    yield Case(
        "very many epochs",
        "train_lora --num_train_epochs 62",
        "warning: 62 epochs over the same data",
        lambda: train(*CHATS, few, "--num_train_epochs", 62, "--dry_run"),
    )
    yield Case(
        "neither max_steps nor num_train_epochs",
        "train_lora",
        r"\b3(\.\d+)? epochs of",
        lambda: train(*CHATS, few, "default", "--dry_run"),
    )
    yield Case(
        "which configuration is for a real base",
        "learning_rate of the files in configs/",
        r"sft_lora 0\.0002.*tiny_chat 0\.005",
        learning_rates,
    )
    yield Case(
        "--config configs/sft_qlora.toml with the embedded base, which has 512 positions",
        "train_lora --base_model embedded",
        "max_length = ",
        longest_of_qlora,
    )
    yield Case(
        "DEVICE_PREFERENCE that is not there, and --device cpu",
        "DEVICE_PREFERENCE=cuda or mps, train_lora --device cpu",
        "base model: .* on cpu",
        lambda: with_preference("--device", "cpu"),
    )
    yield Case(
        "DEVICE_PREFERENCE that is not there, alone",
        "DEVICE_PREFERENCE=cuda or mps, train_lora",
        "DEVICE_PREFERENCE .* is not available here",
        with_preference,
    )


def twice() -> str:
    flags = (*CHATS, write("few.jsonl", *chats(13)))
    train(*flags, name="finished")
    settings = ("--batch_size", 4, "--gradient_accumulation_steps", 1, "--max_steps", 1)
    where = ("--output_dir", "outputs", "--experiment_name", "finished", "--resume_from", "auto")
    return program("train_lora.py", *settings, *where, *flags)


def other_systems() -> Iterator[Case]:
    few = write("few.jsonl", *chats(13))
    flat = {"num_train_epochs": "1", "learning_rate": "2e-4", "lora": {"r": 4, "lora_alpha": 8}}
    yield Case(
        "a flat JSON configuration, with numbers as text and keys of another trainer",
        'train_lora --config: {"learning_rate": "2e-4", "lora": {"r": 4}, "save_total_limit": 2}',
        "save_total_limit",
        lambda: train(
            *("--config", write("flat.json", flat | {"save_total_limit": 2}), *CHATS, few),
            "--dry_run",
        ),
    )
    for flags, expected in (
        (("--lr", "1e-4", "--deepspeed", "ds.json"), "deepspeed"),
        (("--load_in_8bit",), "load_in_8bit"),
        (("--model-name", "crisis_agent_v2"), "base_model.*experiment_name"),
        (("--base_model", "allenai/OLMo-7B-Instruct"), "OLMo-7B-Instruct-hf"),
    ):
        yield Case(
            "words of other trainers on the command line",
            f"train_lora {' '.join(flags)}",
            expected,
            lambda flags=flags: train("--train_data", few, *flags, "--dry_run"),
        )
    yield Case(
        "an artifact that is given to PEFT",
        "PeftConfig.from_pretrained(RUN/final_artifact)",
        "peft_type LORA, rank 16",
        lambda: read_by_peft(few),
    )
    yield from answers_and_artifacts(few)


def answers_and_artifacts(few: str) -> Iterator[Case]:
    by_category = write(
        "by_category.jsonl", *chats(4), *[{**row, "category": "json"} for row in chats(3)]
    )
    yield Case(
        "rows with a category, evaluated",
        'eval --test_set: three rows of seven with "category": "json"',
        "category/json/questions 3",
        lambda: evaluate("--test_set", by_category),
    )
    yield Case(
        "the same, of a step scorer",
        'eval --eval_data: "category": "algebra" beside the labels',
        r"category/algebra/mse 0\.\d+",
        lambda: evaluate("--task", "score", "--eval_data", write("steps.jsonl", CHAIN, CHAIN)),
    )
    yield Case(
        "a category that is a list",
        'render: "category": ["a", "b"]',
        r"keys not read: category \(1 rows\)",
        lambda: render(chat({"content": "one"}, category=["a", "b"])),
    )
    yield Case(
        "a version of the artifact",
        "train_lora --artifact_version v1.1.0-more-citations",
        "metadata.json and README.md: v1.1.0-more-citations",
        lambda: version_of_artifact(few),
    )
    yield Case(
        "another version of a run that is finished",
        "--artifact_version v2 --resume_from auto, on the run above",
        "artifact_version 'v2', and it is complete as 'v1.1.0-more-citations'; take another",
        lambda: version_of_artifact(few, "--artifact_version", "v2", "--resume_from", "auto"),
    )
    yield Case(
        "templates in another language, with the row's title",
        "cite_or_refuse --templates FILE",
        r'Wo steht .*"content": "Quelle \[\d\], T\d+\."',
        lambda: cite(CITE_TEXTS, title=True),
    )
    yield Case(
        "a template's {title}, where the rows have none",
        "the same, with rows of text alone",
        r"error: documents\.jsonl:\d+: no title for the template",
        lambda: cite(CITE_TEXTS, title=False),
    )
    yield Case(
        "a question for the place of a sentence, and not for its words",
        "cite_or_refuse, with the templates that come along",
        r'Where does it say .*"content": "It stands in \[\d\]\."',
        lambda: cite(),
    )
    yield Case(
        "a question about nothing in particular",
        "the same",
        r'"content": "The sources do not say what you mean\.',
        lambda: cite(),
    )
    patterns = EvaluationConfig(
        refusal_pattern="^I cannot", citation_pattern=r"\[\d+\]", json_keys=["a"]
    )
    yield Case(
        "one invented citation where a refusal was due",
        'score_answer: "yes [1]" for "I cannot say"',
        "'citation_precision': 0.0",
        lambda: str(score_answer("yes [1]", "I cannot say", patterns, None)),
    )
    yield Case(
        "JSON between ```json and ```",
        r'score_answer: ```json\n{"a": 1}\n```',
        "'json_validity': 1.0",
        lambda: str(score_answer('```json\n{"a": 1}\n```', "x", patterns, None)),
    )
    yield Case(
        "where TensorBoard's files lie",
        "train_lora --report_to tensorboard",
        r"outputs/board/tensorboard/events\.out\.tfevents",
        lambda: files_of_tensorboard(few),
    )


CHAIN = {"prompt": "1+1", "steps": ["1+1=2", "2=3"], "labels": [1, 0], "category": "algebra"}
CITE_TEXTS = """
instructions = ["Antworte aus den Quellen."]
sources = ["[{number}] {title}: {text}"]
quotation_questions = ['Zitiere, was auf "{opening}" folgt.']
quotation_answers = ['"{rest}" [{number}]']
reference_questions = ["Wo steht '{opening}'?"]
reference_answers = ["Quelle [{number}], {title}."]
refusal_answers = ["Das steht nicht da."]
generic_questions = ["Was meinst du?"]
generic_answers = ["Das steht nicht da. Wonach fragst du?"]
"""


def evaluate(*flags: object) -> str:
    length = ("--max_length", 64, "--max_new_tokens", 2, "--device", "cpu")
    return program("eval.py", "--base_model", "embedded", *length, *flags)


def version_of_artifact(data: str, *flags: object) -> str:
    label = "v1.1.0-more-citations"
    if flags:
        version = ("--output_dir", "outputs", "--max_steps", 1, "--experiment_name", "version")
        settings = ("--batch_size", 4, "--gradient_accumulation_steps", 1)
        return program("train_lora.py", *CHATS, data, *settings, *version, *flags)
    said = train(*CHATS, data, "--artifact_version", label, name="version")
    artifact = Path("outputs/version/final_artifact")
    if not artifact.is_dir():
        return said
    metadata = read_file(artifact / "metadata.json")["artifact_version"]
    card = (artifact / "README.md").read_text(encoding="utf-8")
    return f"metadata.json and README.md: {metadata if f'Version {label}.' in card else None}"


def cite(templates: str = "", title: bool = False) -> str:
    """What cite_or_refuse says of forty documents, and the chats that it writes."""
    rows = []
    for number in range(40):
        text = f"Machine {number} of this hall was built in the year {1900 + number} by hand."
        rows.append({"text": text, **({"title": f"T{number}"} if title else {})})
    shutil.rmtree("cited", ignore_errors=True)
    flags = ("--templates", write("de.toml", templates)) if templates else ()
    said = program(
        *("lora", "cite_or_refuse", write("documents.jsonl", *rows), "--output", "cited", *flags)
    )
    chats_of = Path("cited/train.jsonl")
    return said + (chats_of.read_text(encoding="utf-8") if chats_of.exists() else "")


def files_of_tensorboard(data: str) -> str:
    train(*CHATS, data, "--report_to", "tensorboard", name="board")
    files = [str(path) for path in Path("outputs/board").rglob("events.out*")]
    return re.sub(r"tfevents.*", "tfevents...", " ".join(files))


def read_by_peft(data: str) -> str:
    train(*CHATS, data, name="for_peft")
    config = PeftConfig.from_pretrained("outputs/for_peft/final_artifact")
    return f"peft_type {config.peft_type.value}, rank {config.r}"


def counts_in_4_bits() -> str:
    path = write("few.jsonl", *chats(13))
    lines = []
    for flags in ((), ("--load_in_4bit", *FLOAT32)):
        said = train(*CHATS, path, *flags, "--dry_run")
        lines.append(re.search("trainable parameters: .*", said)[0])
    return f"the same: {lines[0]}" if lines[0] == lines[1] else " / ".join(lines)


def with_other_threads() -> str:
    path = write("few.jsonl", *chats(13))
    threads, chosen = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    try:
        torch.set_num_threads(1)
        train(*CHATS, path, name="threads")
        torch.set_num_threads(2)
        os.environ["OMP_NUM_THREADS"] = "2"
        checkpoint = "outputs/threads/checkpoints/checkpoint_step_1"
        flags = ("--resume_from", checkpoint, "--max_steps", 2, "--experiment_name", "threads2")
        return program("train_lora.py", "--output_dir", "outputs", *flags)
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("OMP_NUM_THREADS")
        if chosen is not None:
            os.environ["OMP_NUM_THREADS"] = chosen


def learning_rates() -> str:
    rates = []
    for path in sorted((ROOT / "configs").glob("*.toml")):
        rate = read_file(path).get("training", {}).get("learning_rate")
        if rate is not None:
            rates.append(f"{path.stem} {rate:g}")
    return ", ".join(rates)


def longest_of_qlora() -> str:
    path = write("few.jsonl", *chats(13))
    config = ("--config", ROOT / "configs" / "sft_qlora.toml", "--base_model", "embedded")
    said = train(*config, *FLOAT32, "--train_data", path, name="qlora")
    saved = Path("outputs/qlora/logs/config.json")
    if not saved.exists():
        return said
    return f"max_length = {read_file(saved)['data']['max_length']}"


def with_preference(*flags: object) -> str:
    missing = "mps" if torch.cuda.is_available() else "cuda"
    os.environ["DEVICE_PREFERENCE"] = missing
    try:
        return train(*CHATS, write("few.jsonl", *chats(13)), *flags, "--dry_run")
    finally:
        del os.environ["DEVICE_PREFERENCE"]


# ---------------------------------------------------------------------------------------- the page


def shown(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False)


HEAD = """# Nothing wrong in silence

Data, settings and files that were once trained on or measured wrongly without a word, and what the
program says now. The table is written by [`nothing_silent.py`](../benchmarks/nothing_silent.py),
which tries each line on a few rows with the embedded base, and fails where the words are missing;
the slow tests run it. Paths are shortened. What the targets of chats must be is compared token by
token in [a table of its own](../benchmarks/results/chat_masks.md).

| what a user does | tried | what is said now |
|---|---|---|
"""


def main() -> int:
    return write_page(cases, PAGE, HEAD)


if __name__ == "__main__":
    sys.exit(main())
