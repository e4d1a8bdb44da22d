"""The README.md of a final artifact: a model card for the Hub, whose commands and code work."""

import json
from pathlib import Path
import shlex

from jinja2 import Environment, FileSystemLoader, StrictUndefined
import torch

from lora.common.base_model_files import locate_base
from lora.config.schema import Config
from lora.data.chat_template import bos_tokens
from lora.model.task import Task

PROMPTS = {"lm": "A question", "score": "A problem\nA step\nA step"}
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "card"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["shell"] = shlex.quote
# A string, or a list of strings, as Python and YAML write it.
TEMPLATES.filters["code"] = lambda value: json.dumps(value, ensure_ascii=False)


def model_card(task: Task, config: Config, facts: dict) -> str:
    """Return the text of the card. `facts` is the content of metadata.json."""
    metrics = {name: value for name, value in facts["best"].items() if value is not None}
    step = metrics.pop("step")
    data = {}
    for path, sha256 in {**facts["train_data"], **facts["eval_data"]}.items():
        name = path if "://" in path else Path(path).name
        if data.get(name, sha256) != sha256:
            name = path  # another file of this name
        data[name] = sha256
    bos = bos_tokens(task.tokenizer)
    prompt_format = config.data.prompt_format.replace("{bos}", task.tokenizer.bos_token or "")
    stops = task.model.generation_config.eos_token_id if config.model.task == "lm" else None
    is_rounded = config.method == "full" and task.base_dtype != torch.float32
    rounded_to = str(task.base_dtype).removeprefix("torch.") if is_rounded else ""
    # PEFT's names of the layers are those of a model with its output layer.
    with_output = config.method == "lora" or config.model.task == "lm"
    return TEMPLATES.get_template("README.jinja").render(
        name=config.output.experiment_name,
        version=config.output.artifact_version,
        method=config.method,
        task=config.model.task,
        what=describe_method(config),
        base=base_facts(config.model.base_model),
        from_scratch=config.model.init_from == "scratch",
        rounded_to=rounded_to,
        trained=f"{facts['trainable_parameters']:,}",
        total=f"{facts['parameters']:,}",
        seconds=facts["seconds"],
        step=step,
        metrics=metrics,
        data=data,
        prompt=PROMPTS[config.model.task],
        model_class="AutoModelForCausalLM" if task.causal and with_output else "AutoModel",
        adds_tokens=bool(config.model.add_special_tokens),
        chat=task.tokenizer.chat_template is not None,
        stops=stops,
        causal=task.causal,
        score_layer=config.model.score_layer,
        begins_with_bos=bool(bos) and not prompt_format.startswith(task.tokenizer.bos_token),
        prompt_format=prompt_format,
        step_format=config.data.step_format,
        step_marker=config.data.step_marker,
    )


def base_facts(base_model: str) -> dict:
    """Return what the card says of the base; only its code holds the full path of a folder."""
    path, is_folder = locate_base(base_model)
    if base_model == "embedded":
        description = "the small base that comes with plainlora (`--base_model embedded`)"
    elif is_folder:
        description = f"`{Path(path).name}`"
    else:
        description = f"`{base_model}`"
    base = {"path": path, "description": description}
    return {**base, "embedded": base_model == "embedded", "on_hub": not is_folder}


def describe_method(config: Config) -> str:
    """Return what the artifact is, up to "of" and the base."""
    is_scratch = config.model.init_from == "scratch"
    if config.method == "full":
        return "A model from random weights in the shape" if is_scratch else "A full fine-tuning"
    what = "A score head on the frozen weights"
    if config.method == "lora":
        what = f"A LoRA adapter of rank {config.lora.lora_r}"
    if is_scratch:
        return f"{what}, trained on random weights in the shape"
    return f"{what}, trained on 4-bit weights," if config.lora.load_in_4bit else what
