"""What the sides of benchmarks/peers.py train: a base, data, and the settings of a step."""

from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import shutil

from common import QWEN_05B, read_jsonl, write_jsonl

LEARNING_RATE = 1e-3
RANK = 16
ALPHA = 32
NUM_HELD_OUT = 4  # examples
UNTIMED_STEPS = 2  # the first steps of a run

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "initializer_range": 0.05}
SHAPES = {
    "tiny": LLAMA
    | {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": LLAMA
    | {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    # A Llama, because transformers takes the tokenizer.json beside a "qwen2" for BPE.
    "0.5b": QWEN_05B | LLAMA,
}


@dataclass
class Work:
    """Some optimizer steps, and the sides that train them.

    Attributes:
        sides: keys of peers.SIDES. The first one is compared with the others.
        control: two of the sides that differ only in how they split a step. Their losses differ
            by the rounding of this machine. None where losses are not compared.
        shape: of the base, a key of SHAPES; or "smollm2", the base of real_base.py.
        data: "mixed" or "dense", which are synthetic, or a file below PLAINLORA_DATA.
        batch: examples of a step. With task "score", every step reads the same `batch` chains.
    """

    sides: tuple[str, ...]
    control: tuple[str, str] | None
    shape: str = "small"
    data: str = "mixed"
    steps: int = 6
    batch: int = 8
    script: str = "train_lora"
    task: str = "lm"


@dataclass
class Side:
    """A trainer and its settings.

    Attributes:
        library: "plainlora", "transformers" or "trl".
        dtype: plainlora's --dtype, or the dtype of the peer's base weights.
        settings: plainlora's flags, or arguments of the library's trainer.
        parts: micro-batches of a step. A peer's are made of sequences of similar length.
        keeps_memory: whether the C library keeps freed memory (lora/common/allocator.py).
        without: a technique of plainlora that is taken away, one of `take_away`'s.
    """

    library: str
    dtype: str = "bfloat16"
    settings: dict = field(default_factory=dict)
    parts: int = 1
    keeps_memory: bool = True
    without: str = ""


def prepare(work: Work, folder: Path) -> None:
    """Write base/, adapter/, train.jsonl, eval.jsonl and steps.json.

    steps.json holds the sequences of each step, [{"input_ids", "labels"}, ...].
    """
    import torch

    from lora.adapter import save_adapter
    from lora.data.raw_data import RawData
    from lora.data.sampler import TrainingData
    from lora.data.token_cache import load_or_tokenise
    from lora.layer import inject, lora_layers
    from lora.model.load import load_task

    torch.manual_seed(0)
    model = make_base(work, folder / "base")
    write_data(work, folder, model.config.vocab_size)

    inject(model, RANK, ALPHA)
    for layer in lora_layers(model).values():
        # While B is 0, a step's loss does not depend on A.
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02)
    save_adapter(model, folder / "adapter")

    config = plainlora_command(work, folder, Side("plainlora", "float32")).config
    rows, held_out, _ = load_or_tokenise(RawData(config), load_task(config, torch.float32))
    data = TrainingData(rows, held_out, config)
    steps = []
    for step in range(work.steps):
        sequences = []
        for row in data.rows_at(step):
            tokens = rows.tokens[rows.span(row)].tolist()
            # A target stands where it is predicted; a label of transformers one position later.
            labels = [-100, *rows.targets[rows.span(row)].tolist()[:-1]]
            sequences.append({"input_ids": tokens, "labels": labels})
        steps.append(sequences)
    (folder / "steps.json").write_text(json.dumps(steps))


def make_base(work: Work, folder: Path):
    """Write the base, and return it."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from lora.common.base_model_files import EMBEDDED_BASE

    if work.shape == "smollm2":
        from real_base import real_base  # needs gguf

        shutil.copytree(real_base(), folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shape = AutoConfig.for_model(**SHAPES[work.shape])
    model_class = AutoModel if work.task == "score" else AutoModelForCausalLM
    model = model_class.from_config(shape, dtype=shape.dtype or torch.float32)
    model.save_pretrained(folder)
    if is_synthetic(work):
        tokenizer = numbered_words(shape.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    tokenizer.save_pretrained(folder)
    return model


def is_synthetic(work: Work) -> bool:
    return work.data in ("mixed", "dense")


def numbered_words(vocab_size: int):
    """Return a tokenizer of </s> and the words w2, w3, ...; </s> ends a text and a turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] + ' </s> ' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def write_data(work: Work, folder: Path, vocab_size: int) -> None:
    """Write train.jsonl and eval.jsonl; of chains also prefixes.jsonl."""
    count = work.batch if work.task == "score" else work.steps * work.batch
    if is_synthetic(work):
        examples = synthetic_examples(work.data, count + NUM_HELD_OUT, vocab_size)
    else:
        rows = read_jsonl(Path(os.environ["PLAINLORA_DATA"]) / work.data)
        examples = rows[: count + NUM_HELD_OUT]
    training, held_out = examples[:count], examples[count:]
    if work.task == "score":
        write_jsonl(folder / "prefixes.jsonl", prefixes(training, work.batch))
    write_jsonl(folder / "train.jsonl", training)
    write_jsonl(folder / "eval.jsonl", held_out)


def prefixes(chains: list[dict], batch: int) -> list[dict]:
    """Return an example for each labelled step of the chains: the chain up to this step.

    The last chain loses the labels of its last steps, so that these are whole batches.
    """
    surplus = sum(len(chain["labels"]) for chain in chains) % batch
    last = chains[-1]["labels"]
    last[len(last) - surplus :] = [None] * surplus
    examples = []
    for chain in chains:
        for i, label in enumerate(chain["labels"]):
            if label is not None:
                steps = chain["steps"][: i + 1]
                labels = [None] * i + [label]
                examples.append({"prompt": chain["prompt"], "steps": steps, "labels": labels})
    return examples


def synthetic_examples(kind: str, count: int, vocab_size: int) -> list[dict]:
    """Return random words.

    mixed: chats of 24 to 512 tokens, log-normal with median 180 and sigma 0.6, of which 0.4 are
    the answer. dense: texts of 512 tokens.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    examples = []
    for length in generator.lognormal(np.log(180), 0.6, count).clip(24, 512).astype(int):
        num_words = length - 2 if kind == "mixed" else 511  # and a </s> for each turn or text
        words = [f"w{i}" for i in generator.integers(2, vocab_size, num_words)]
        cut = round(0.6 * length)
        if kind == "mixed":
            chat = {"prompt": " ".join(words[:cut]), "completion": " ".join(words[cut:])}
            examples.append(chat)
        else:
            examples.append({"text": " ".join(words)})
    return examples


def plainlora_command(work: Work, folder: Path, side: Side):
    from lora.config.command_line import read_command_line
    from lora.config.schema import Config, get_lora_config

    settings = {
        "base_model": folder / "base",
        "task": work.task,
        "dtype": side.dtype,
        "train_data": "train.jsonl",
        "eval_data": folder / "eval.jsonl",
        # A micro-batch holds at most batch_size x max_length tokens. Where a step is whole, all of
        # it fits; where it is in parts, the longest sequence does.
        "max_length": 2048 if side.parts == 1 else 520,
        "batch_size": work.batch // side.parts,
        "max_steps": work.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "max_eval_batches": 1,
        "eval_steps": 10**6,
        "save_steps": 10**6,
        "output_dir": folder / "runs",
        "experiment_name": os.getpid(),
        **side.settings,
    }
    settings["train_data"] = folder / settings["train_data"]
    num_examples = work.batch
    if work.task == "score":  # a step reads the whole file: the chains, or all of their prefixes
        num_examples = len(read_jsonl(settings["train_data"]))
    settings["gradient_accumulation_steps"] = num_examples // settings["batch_size"]
    config = Config()
    if work.script == "train_lora":
        config = get_lora_config()
        settings |= {"lora_r": RANK, "lora_alpha": ALPHA, "init_from": folder / "adapter"}
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", str(value)]
    return read_command_line(flags, config, "", "")
