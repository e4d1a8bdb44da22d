"""Keys that were set, and that a run of this kind does not read."""

from lora.common.printable_text import print_on_rank_zero
from lora.config.schema import QUANTIZATION_KEYS, Config, get_lora_config
from lora.config.set_keys import key_values

SCORE_KEYS = (
    "head_dropout", "head_tokens", "score_loss",
    "prompt_format", "step_format", "step_marker",
    "label_max", "neutral_label", "max_steps_per_example",
)  # fmt: skip

LORA_KEYS = (
    "lora_alpha", "lora_dropout", "target_modules", "use_rslora",
    "alpha_pattern", "loraplus_lr_ratio",
)  # fmt: skip


def unread_keys(config: Config) -> dict[str, str]:
    """Return {key: why it is not read} of the keys with another value than the default."""
    data = config.data
    reasons = {}
    if config.model.task == "lm":
        reasons |= dict.fromkeys(SCORE_KEYS, "task is lm")
    for name in ("prm800k", "eqasc", "reveal"):
        if not getattr(data, f"use_{name}"):
            reasons |= dict.fromkeys((f"{name}_path", f"{name}_weight"), f"no use_{name}")
    if data.eval_data:
        reasons["eval_fraction"] = "eval_data is given"
    if config.training.warmup_steps is not None:
        reasons["warmup_ratio"] = "warmup_steps is given"
    if config.lora and not config.lora.load_in_4bit:
        reasons |= dict.fromkeys((*QUANTIZATION_KEYS, "bnb_4bit_compute_dtype"), "no load_in_4bit")
    if config.model.init_from == "scratch":
        reasons["head_tokens"] = "init_from is scratch"
    if config.method == "head":
        reasons |= dict.fromkeys(LORA_KEYS, "lora_r is 0")
    values = key_values(config)
    defaults = key_values(get_lora_config())
    return {name: why for name, why in reasons.items() if values[name] != defaults[name]}


def print_unread_keys(config: Config) -> None:
    unread = [f"{name} ({reason})" for name, reason in unread_keys(config).items()]
    if unread:
        print_on_rank_zero(f"note: set, but not read: {', '.join(unread)}")
