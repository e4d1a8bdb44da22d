"""The configuration. These dataclasses are the TOML file, the flags, and what is saved with a run.

It is read before torch is loaded, so that a wrong flag is reported at once.
"""

import dataclasses
from dataclasses import dataclass, field
import json
from pathlib import Path
from typing import Any

from lora.common.toml_json import to_toml
from lora.config.parse_values import key

REVEAL_LABELS = ("type_label", "attribution_label", "correctness_label")
REVEAL_COLUMNS = ("answer_id", "question", "step_idx", "step", *REVEAL_LABELS)
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATION_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


@dataclass
class ModelConfig:
    base_model: str = key("", "folder or Hub name of the base; 'embedded' is the one in assets/")
    task: str = key("lm", "the next token, or a score for every step", choices=("lm", "score"))
    init_from: str = key(
        "", "checkpoint, artifact or adapter to load; 'scratch': random weights in the base's shape"
    )
    add_special_tokens: list[str] = key([], "tokens to add; with LoRA also set modules_to_save")
    head_dropout: float = key(0.0, "dropout inside the score head", low=0.0, high=0.9)
    head_tokens: list[str] = key(
        [], "start the score head from the output layer's rows of two tokens, good and bad"
    )
    score_loss: str = key("mse", "squared error, or binary cross entropy", choices=("mse", "bce"))


@dataclass
class DataConfig:
    train_data: list[str] = key(
        [], "training files, hf://datasets/OWNER/NAME/PATH, or arithmetic:SPLIT:COUNT"
    )
    data_weights: list[float] = key([], "each train_data's share of a step's examples", above=0)
    eval_data: list[str] = key([], "held-out files; default: eval_fraction of the training data")
    eval_fraction: float = key(0.1, "share of prompts held out, if no eval_data", above=0, high=0.9)
    max_length: int = key(2048, "tokens an example may have", low=2)
    max_samples: int | None = key(None, "use only the first N training examples", low=1)
    label_max: float = key(1.0, "the files' labels are 0..label_max, and divided by it", above=0)
    prompt_format: str = key("{prompt}\n", "how a chain's problem is written, for causal models")
    step_format: str = key("{step}\n", "how a step is written, with {step}, {number} and {marker}")
    step_marker: str = key(
        "", "one token after every step, where its score is read; default: the step's last token"
    )
    max_steps_per_example: int | None = key(None, "read at most N steps of a chain", low=1)
    neutral_label: float = key(0.5, "label of PRM800K's rating 0 (no progress)", low=0.0, high=1.0)
    use_prm800k: bool = key(False, "train on the file of PRM800K in prm800k_path")
    prm800k_path: str = key("", "phase1_train.jsonl or phase2_train.jsonl")
    prm800k_weight: float = key(1.0, "its weight beside data_weights (1 each by default)", above=0)
    use_eqasc: bool = key(False, "train on the file of eQASC (or eOBQA) in eqasc_path")
    eqasc_path: str = key("", "eqasc_train_grc.json, or eOBQA's table")
    eqasc_weight: float = key(1.0, "its weight", above=0)
    use_reveal: bool = key(False, "evaluate on REVEAL (reveal_path); its owners permit no training")
    reveal_path: str = key("", "reveal_eval.csv or reveal_open.csv")
    reveal_weight: float = key(1.0, "its weight, where it may be trained on", above=0)
    reveal_columns: dict[str, str] = key(
        {}, "REVEAL's columns that have other names in your file", choices=REVEAL_COLUMNS
    )
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


@dataclass
class LoraConfig:
    lora_r: int = key(16, "rank of the update; 0: none, the score head alone is trained", low=0)
    lora_alpha: float = key(32, "the update is scaled by lora_alpha / lora_r", above=0)
    lora_dropout: float = key(
        0.0, "dropout on the input of A (0.05 costs a quarter of the speed)", low=0.0, high=0.9
    )
    target_modules: list[str] = key(
        ["all-linear"], "name endings, regular expressions, or all-linear (all but the head)"
    )
    modules_to_save: list[str] = key([], "modules trained in full, such as embed_tokens lm_head")
    use_rslora: bool = key(False, "scale the update by lora_alpha / sqrt(lora_r)")
    use_dora: bool = key(False, "train the lengths of the weights' rows as well (DoRA)")
    rank_pattern: dict[str, int] = key({}, "name endings -> a rank of their own, as in PEFT", low=1)
    alpha_pattern: dict[str, float] = key({}, "name endings -> an alpha of their own", above=0)
    loraplus_lr_ratio: float = key(1.0, "learning rate of B over that of A (LoRA+: 16)", above=0)
    load_in_4bit: bool = key(
        False, "QLoRA: the base in 4 bits, by bitsandbytes; USE_BNB_QUANT in the environment too"
    )
    bnb_4bit_quant_type: str = key("nf4", "the 16 values a weight can have", choices=("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = key(True, "quantise the scales of the blocks as well")
    bnb_4bit_compute_dtype: str = key("bfloat16", "of the 4-bit layers' products", choices=DTYPES)


@dataclass
class TrainingConfig:
    learning_rate: float = key(2e-5, "peak learning rate", above=0)
    batch_size: int = key(
        4, "at most N x max_length tokens a micro-batch; auto: 4 or fewer", low=1, word="auto"
    )
    gradient_accumulation_steps: int = key(4, "a step is batch_size x this many examples", low=1)
    max_steps: int | None = key(None, "optimizer steps; default: num_train_epochs, or 10000", low=1)
    num_train_epochs: float | None = key(None, "passes over the data, at most max_steps", above=0)
    warmup_steps: int | None = key(None, "default: the smaller of 500 and 5 % of the run", low=0)
    warmup_ratio: float | None = key(None, "share of the run (or warmup_steps)", low=0.0, high=1.0)
    lr_scheduler_type: str = key("cosine", "after warmup", choices=("cosine", "linear", "constant"))
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm; 0: not clipped", low=0.0)
    skip_nonfinite: int = key(0, "skip up to N steps with non-finite loss or gradient", low=0)
    weight_decay: float = key(0.0, "AdamW's", low=0.0)
    optimizer: str = key(
        "adamw", "8 bits: bitsandbytes' AdamW", choices=("adamw", "adamw_8bit", "paged_adamw_8bit")
    )
    adam_beta2: float = key(0.999, "smaller when training from scratch", low=0.0, high=0.9999)
    seed: int = key(42, "of initial weights, data order and dropout", low=0, high=2**63 - 1)
    eval_steps: int = key(100, "evaluate every N steps", low=1)
    max_eval_batches: int = key(100, "evaluate on the first N x 4 rows; 0: all", low=0)
    early_stopping_patience: int = key(0, "evaluations without a new best; 0: never stop", low=0)
    gradient_checkpointing: bool = key(False, "keep one state per layer, recompute: a third slower")
    offload_activations: bool = key(False, "keep activations in main memory instead of on the GPU")
    compile: bool = key(False, "torch.compile each layer: faster on a GPU after slow first steps")
    device: str = key(
        "auto", "where to run (or DEVICE_PREFERENCE)", choices=("auto", "cuda", "mps", "cpu")
    )
    dtype: str = key("auto", "of the computation", choices=("auto", *DTYPES))


@dataclass
class OutputConfig:
    experiment_name: str = key("", "folder below output_dir; default: <config name>_<date>-<time>")
    output_dir: str = key("outputs", "where runs are kept")
    logging_steps: int = key(10, "a line of metrics every N steps", low=1)
    save_steps: int = key(500, "save a checkpoint every N steps", low=1)
    report_to: str = key("", "also log to tensorboard,wandb (with WANDB_PROJECT, WANDB_ENTITY)")


@dataclass
class EvaluationConfig:
    """What eval.py asks of generated answers and of scored steps; training does not read it."""

    max_new_tokens: int = key(256, "tokens an answer may have", low=1)
    temperature: float = key(0.0, "sampling temperature; 0: always the likeliest token", low=0.0)
    refusal_pattern: str = key("", "regular expression: an answer that matches it refuses")
    citation_pattern: str = key("", "regular expression: its matches in an answer are citations")
    json_keys: list[str] = key([], "answers are to be JSON objects with these keys")
    threshold: float = key(0.5, "a step is judged right from this score on", above=0, high=1.0)
    tune_threshold_on: str = key("", "set (its file's name) whose best threshold is used for all")


@dataclass
class Config:
    """The configuration of full fine-tuning; `get_lora_config()` is that of LoRA."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def method(self) -> str:
        """What is trained: "full", "lora", or with lora_r 0 the score "head" alone."""
        if self.lora is None:
            return "full"
        return "lora" if self.lora.lora_r else "head"

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the tables of the keys that have a value; `from_dict` reads them back."""
        tables = {}
        for title, table in tables_of(self).items():
            values = dataclasses.asdict(table)
            tables[title] = {name: value for name, value in values.items() if value is not None}
        return tables

    def save(self, path: str | Path) -> None:
        """Write TOML, or JSON where the path ends in .json."""
        text = to_toml(self.as_dict())
        if Path(path).suffix == ".json":
            text = json.dumps(self.as_dict(), indent=2) + "\n"
        Path(path).write_text(text, encoding="utf-8")


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
