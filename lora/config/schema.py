"""The configuration. These dataclasses are the TOML file, the flags, and what is saved with a run.

It is read before torch is loaded, so that a wrong flag is reported at once.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.common.atomic_files import write_text_atomically
from lora.common.toml_json import to_json, to_toml
from lora.config.parse_values import key, kind_of
from lora.config.table import Table, key_hint

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATION_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


@dataclass
class ModelConfig(Table):
    base_model: str = key("", "folder or Hub name of the base; 'embedded': a small built-in one")
    task: str = key("lm", "predict the next token, or score every step", choices=("lm", "score"))
    init_from: str = key("", "weights to start from; 'scratch': random ones", metavar="DIR")
    add_special_tokens: list[str] = key([], "tokens to add; with LoRA also set modules_to_save")
    head_dropout: float = key(0.0, "dropout inside the score head", low=0.0, high=0.9)
    head_tokens: list[str] = key([], "two tokens, good and bad, that the score head starts from")
    score_layer: int | None = key(None, "layer that the score head reads; default: the last", low=1)
    score_loss: str = key("mse", "squared error or binary cross entropy", choices=("mse", "bce"))


@dataclass
class DataConfig(Table):
    train_data: list[str] = key([], "files, folders, or hf://datasets/OWNER/NAME", metavar="FILE")
    data_weights: list[float] = key([], "weight of each file of train_data in a step", above=0)
    eval_data: list[str] = key([], "held-out files, in place of eval_fraction", metavar="FILE")
    eval_fraction: float = key(0.1, "share of the prompts to hold out", above=0, high=0.9)
    max_length: int = key(
        "auto", "most tokens of an example; auto: 2048, or the base's limit", low=2, word="auto"
    )
    columns: dict[str, str] = key({}, "our key = theirs, for all files", metavar="OURS=THEIRS")
    max_samples: int | None = key(None, "use only the first N training examples", low=1)
    label_max: float = key(1.0, "maximum of the files' labels, which are divided by it", above=0)
    prompt_format: str = key("{prompt}\n", "how a chain's problem is written, for causal models")
    step_format: str = key("{step}\n", "how a step is written, with {step}, {number} and {marker}")
    step_marker: str = key("", "token after every step, at which its score is read")
    max_steps_per_example: int | None = key(None, "read only the first N steps of a chain", low=1)
    neutral_label: float = key(0.5, "label of PRM800K's rating 0, no progress", low=0.0, high=1.0)
    use_prm800k: bool = key(False, "train on PRM800K, the file prm800k_path")
    prm800k_path: str = key("", "phase1_train.jsonl or phase2_train.jsonl")
    prm800k_weight: float = key(1.0, "weight of PRM800K beside data_weights", above=0)
    use_eqasc: bool = key(False, "train on eQASC or eOBQA, the file eqasc_path")
    eqasc_path: str = key("", "eqasc_train_grc.json, or the table of eOBQA")
    eqasc_weight: float = key(1.0, "weight of eQASC beside data_weights", above=0)
    use_reveal: bool = key(False, "evaluate on REVEAL (reveal_path); its owners permit no training")
    reveal_path: str = key("", "reveal_eval.csv or reveal_open.csv")
    reveal_weight: float = key(1.0, "weight of REVEAL beside data_weights", above=0)
    reveal_train_i_have_permission: bool = key(False, "train on REVEAL with its owners' permission")

    @property
    def named_sets(self) -> dict[str, float]:
        """{path: weight} of the data sets that use_* keys add to train_data."""
        sets = {}
        if self.use_prm800k:
            sets[self.prm800k_path] = self.prm800k_weight
        if self.use_eqasc:
            sets[self.eqasc_path] = self.eqasc_weight
        if self.use_reveal and self.reveal_train_i_have_permission:
            sets[self.reveal_path] = self.reveal_weight
        return sets

    @property
    def train_paths(self) -> list[str]:
        return [*self.train_data, *self.named_sets]

    @property
    def weights(self) -> list[float]:
        """A weight for each of train_paths; [] where the rows of all files form one set."""
        if not self.named_sets:
            return self.data_weights
        file_weights = self.data_weights or [1.0] * len(self.train_data)
        return [*file_weights, *self.named_sets.values()]

    @property
    def only_evaluated(self) -> list[str]:
        may_not_train = self.use_reveal and not self.reveal_train_i_have_permission
        return [self.reveal_path] if may_not_train else []

    @property
    def eval_paths(self) -> list[str]:
        """What is evaluated on; the dataset_id of an example is a position in this list."""
        return [*(self.eval_data or self.train_paths), *self.only_evaluated]

    @property
    def held_out_paths(self) -> list[str]:
        """The files that are held out as a whole."""
        return self.eval_paths if self.eval_data else self.only_evaluated


@dataclass
class LoraConfig(Table):
    lora_r: int = key(16, "rank of the update; 0: only the score head is trained", low=0)
    lora_alpha: float = key(32, "the update is scaled by lora_alpha / lora_r", above=0)
    lora_dropout: float = key(0.0, "dropout on the input of A; it costs speed", low=0.0, high=0.9)
    target_modules: list[str] = key(
        ["all-linear"], "ends of layer names, or regular expressions", word="none"
    )
    modules_to_save: list[str] = key(
        [], "also trained, in full: lm_head", metavar="MODULE", word="none"
    )
    use_rslora: bool = key(False, "scale the update by lora_alpha / sqrt(lora_r)")
    use_dora: bool = key(False, "DoRA: also train the magnitude of each row of a weight")
    rank_pattern: dict[str, int] = key({}, "name endings -> a rank of their own, as in PEFT", low=1)
    alpha_pattern: dict[str, float] = key({}, "name endings -> an alpha of their own", above=0)
    loraplus_lr_ratio: float = key(1.0, "learning rate of B over that of A; LoRA+ uses 16", above=0)
    load_in_4bit: bool = key(False, "QLoRA: quantise the base to 4 bits (or USE_BNB_QUANT)")
    bnb_4bit_quant_type: str = key("nf4", "data type of the 4-bit weights", choices=("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = key(True, "also quantise the scales of the blocks")
    bnb_4bit_compute_dtype: str = key("bfloat16", "dtype of 4-bit layers' products", choices=DTYPES)


@dataclass
class TrainingConfig(Table):
    learning_rate: float = key(2e-5, "peak learning rate", above=0)
    batch_size: int = key(4, "up to N x max_length tokens a micro-batch", low=1, word="auto")
    gradient_accumulation_steps: int = key(4, "a step is batch_size x N examples", low=1)
    max_steps: int | None = key(None, "optimizer steps, unless the epochs end before", low=1)
    num_train_epochs: float | None = key(
        None, "passes over the data; default: 3, if no max_steps", above=0
    )
    warmup_steps: int | None = key(
        None, "steps of warmup; default: 5 % of the run, 500 at most", low=0
    )
    warmup_ratio: float | None = key(None, "warmup as a share of the run", low=0.0, high=1.0)
    lr_scheduler_type: str = key("cosine", "after warmup", choices=("cosine", "linear", "constant"))
    max_grad_norm: float = key(1.0, "clip gradients to this norm; 0: no clipping", low=0.0)
    skip_nonfinite: int = key(0, "skip up to N steps whose loss or gradient is not finite", low=0)
    weight_decay: float = key(0.0, "weight decay of AdamW", low=0.0)
    optimizer: str = key(
        "adamw", "8 bits: bitsandbytes' AdamW", choices=("adamw", "adamw_8bit", "paged_adamw_8bit")
    )
    adam_beta2: float = key(0.999, "beta2; lower it to train from scratch", low=0.0, high=0.9999)
    seed: int = key(42, "for initial weights, data order and dropout", low=0, high=2**63 - 1)
    eval_steps: int = key(100, "evaluate every N steps", low=1)
    max_eval_batches: int = key(100, "evaluate on the first 4 x N sequences; 0: on all", low=0)
    early_stopping_patience: int = key(
        0, "stop after N evaluations without a new best; 0: never", low=0
    )
    gradient_checkpointing: bool = key("auto", "recompute activations: less memory", word="auto")
    offload_activations: bool = key(False, "keep checkpointed layers' inputs in main memory")
    compile: bool = key(False, "torch.compile each layer; the first steps are slow")
    deterministic: bool = key(False, "the same bits from the same run on a GPU too; slower there")
    device: str = key("auto", "or DEVICE_PREFERENCE", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = key("auto", "dtype to compute in", choices=("auto", *DTYPES))

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"

    @bf16.setter
    def bf16(self, value: bool) -> None:
        self.switch_dtype("bfloat16", value)

    @property
    def fp16(self) -> bool:
        return self.dtype == "float16"

    @fp16.setter
    def fp16(self, value: bool) -> None:
        self.switch_dtype("float16", value)

    def switch_dtype(self, dtype: str, value: bool) -> None:
        if value:
            self.dtype = dtype
        elif self.dtype in ("auto", dtype):
            self.dtype = "float32"


@dataclass
class OutputConfig(Table):
    experiment_name: str = key("", "folder below output_dir; default: CONFIG_DATE-TIME")
    output_dir: str = key("outputs", "folder of all runs")
    artifact_version: str = key("", "your name of the artifact's version: v1.1.0-more-citations")
    logging_steps: int = key(10, "log metrics every N steps", low=1)
    save_steps: int = key(500, "save a checkpoint every N steps", low=1)
    save_optimizer: str = key(
        "auto",
        "which checkpoints hold its state; auto: the last in train.py, else all",
        choices=("auto", "all", "last"),
    )
    report_to: list[str] = key(
        [], "also log to these", choices=("tensorboard", "wandb"), word="none"
    )


@dataclass
class EvaluationConfig(Table):
    """What eval.py asks of generated answers and of scored steps; training does not read it."""

    max_new_tokens: int = key(256, "maximum number of tokens of an answer", low=1)
    temperature: float = key(0.0, "sampling temperature; 0: greedy decoding", low=0.0)
    top_p: float = key(
        1.0, "sample from the likeliest tokens of this total probability", above=0, high=1.0
    )
    refusal_pattern: str = key("", "regular expression: an answer that matches is a refusal")
    citation_pattern: str = key("", "regular expression: its matches in an answer are citations")
    json_keys: list[str] = key([], "keys that an answer must have, as a JSON object")
    threshold: float = key(0.5, "a step is judged wrong below this score", above=0, high=1.0)
    tune_threshold_on: str = key("", "choose threshold on the set of this name", metavar="SET")


@dataclass
class Config:
    """The configuration of full fine-tuning; `get_lora_config()` is that of LoRA."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a table, or a key of a table: config.experiment_name = "x"."""
        if name in [table_field.name for table_field in dataclasses.fields(self)]:
            object.__setattr__(self, name, value)
        else:
            setattr(self.table_with(name), name, value)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:  # called for what is no attribute
            return getattr(self.table_with(name), name)

    def table_with(self, name: str) -> Any:
        for table in tables_of(self).values():
            if hasattr(table, name):
                return table
        hint = key_hint(name, fields_by_key(self))
        raise AttributeError(f"the configuration has no key {name}.{hint}")

    @property
    def method(self) -> str:
        """What is trained: "full", "lora", or with lora_r 0 the score "head" alone."""
        if self.lora is None:
            return "full"
        return "lora" if self.lora.lora_r else "head"

    @property
    def save_optimizer(self) -> str:
        """Which checkpoints hold the optimizer's state: "all", or the "last" alone."""
        if self.output.save_optimizer != "auto":
            return self.output.save_optimizer
        return "last" if self.method == "full" else "all"

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the tables of the keys that have a value; `from_dict` reads them back."""
        tables = {}
        for title, table in tables_of(self).items():
            values = dataclasses.asdict(table)
            tables[title] = {name: value for name, value in values.items() if value is not None}
        return tables

    def save(self, path: str | Path) -> None:
        """Write TOML, or JSON where the path ends in .json."""
        to_text = to_json if Path(path).suffix == ".json" else to_toml
        write_text_atomically(Path(path), to_text(self.as_dict()))


def get_lora_config() -> Config:
    """Return LoRA's defaults: a [lora] table, and a learning rate that suits adapters."""
    return Config(lora=LoraConfig(), training=TrainingConfig(learning_rate=1e-4))


def rows_per_batch(training: TrainingConfig) -> int:
    """Return batch_size as a number; "auto" begins with the default."""
    return TrainingConfig.batch_size if training.batch_size == "auto" else training.batch_size


def max_batch_tokens(config: Config) -> int:
    """Return how many tokens a micro-batch has at most, padding included."""
    return rows_per_batch(config.training) * config.data.max_length


def tables_of(config: Config) -> dict[str, Any]:
    """Return {"model": the ModelConfig, ...} of the tables that the configuration has."""
    return {title: table for title, table in vars(config).items() if table is not None}


def fields_by_key(config: Config) -> dict[str, tuple[Any, dataclasses.Field]]:
    """Return {key: (its table, its dataclass field)}."""
    fields = {}
    for table in tables_of(config).values():
        for key_field in dataclasses.fields(table):
            fields[key_field.name] = (table, key_field)
    return fields


def table_keys() -> list[str]:
    """Return our keys that have a table as their value."""
    fields = fields_by_key(get_lora_config()).items()
    return [name for name, (_, key_field) in fields if kind_of(key_field.type)[0] is dict]
