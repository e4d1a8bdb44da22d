"""The README.md of a final artifact: a model card for the Hub with commands that work."""

from collections.abc import Iterator
import json
import shlex

from lora.common.base_model_files import locate_base
from lora.common.paths import ROOT
from lora.config.schema import Config
from lora.model.task import Task

HEAD = """\
`mlp_head.safetensors` is Linear - ReLU - Linear - sigmoid, \
on the last hidden state of each step's last token.
"""
PROMPTS = {"lm": "From left to right: 12+9-1", "score": "From left to right: 12+9-1\n12+9=21"}


CARD = """\
---
base_model: {base_in_yaml}
library_name: {library}
tags: {tags}
---

# {name}

{what} of `{base}`, made by plainlora for the task `{task}`: \
{trainable_parameters:,} of {parameters:,} parameters were
trained, in {seconds:g} s. The weights are those of step {step}, \
which had the lowest validation loss.

| on the held-out data | |
|---|---|
{metrics}

| data | sha256 |
|---|---|
{data}

`metadata.json` holds the versions, the hardware and the hash of the base; \
`checksums.json` the hash of every file here.

## Use

In the folder above this one:

```sh
code={code}  # where plainlora lies
{commands}
```

```python
{loading}
```

{head}The paths are those of the machine it was made on: \
`--base_model` and `--eval_data` name others.
"""


def model_card(task: Task, config: Config, facts: dict) -> str:
    """Return the text of the card. `facts` is the content of metadata.json."""
    base, _ = locate_base(config.model.base_model)
    best = {name: value for name, value in facts["best"].items() if value is not None}
    step = best.pop("step")
    metrics = [f"| {name} | {value:.6g} |" for name, value in best.items()]
    files = {**facts["train_data"], **facts["eval_data"]}
    data = [f"| `{path}` | {sha256 or 'generated'} |" for path, sha256 in files.items()]
    return CARD.format(
        **facts,
        base=base,
        base_in_yaml=json.dumps(base, ensure_ascii=False),
        library="peft" if config.method == "lora" else "transformers",
        tags=json.dumps(["plainlora", facts["method"], facts["task"]]),
        name=config.output.experiment_name,
        what=describe_method(config),
        step=step,
        metrics="\n".join(metrics),
        data="\n".join(data),
        code=shlex.quote(str(ROOT)),
        commands="\n".join(commands(config)),
        loading="\n".join(loading(task, config, base)),
        head=HEAD if config.model.task == "score" else "",
    )


def describe_method(config: Config) -> str:
    if config.method == "full":
        return "A full fine-tuning"
    what = "A score head on the frozen base"
    if config.method == "lora":
        what = f"A LoRA adapter of rank {config.lora.lora_r}"
    return f"{what}, trained on 4 bits," if config.lora.load_in_4bit else what


def commands(config: Config) -> Iterator[str]:
    prompt = shlex.quote(PROMPTS[config.model.task])
    yield 'python "$code/eval.py" --verify_only --artifact_dir final_artifact'
    yield 'python "$code/eval.py" --checkpoint final_artifact'
    yield f'python "$code/eval.py" --checkpoint final_artifact --prompt {prompt}'
    if config.lora and config.model.init_from != "scratch":
        yield 'python "$code/merge.py" --adapter final_artifact --output merged'


def loading(task: Task, config: Config, base: str) -> Iterator[str]:
    """Yield lines of Python that load the model without plainlora."""
    # PEFT's names of the layers are those of a model with its output layer.
    with_output = config.method == "lora" or config.model.task == "lm"
    model_class = "AutoModelForCausalLM" if task.causal and with_output else "AutoModel"
    yield f"from transformers import {model_class}, AutoTokenizer"
    yield 'tokenizer = AutoTokenizer.from_pretrained("final_artifact")'
    if not config.lora:
        yield f'model = {model_class}.from_pretrained("final_artifact/backbone")'
    elif config.model.init_from == "scratch":
        yield "# The base was random weights, which no folder holds: eval.py makes them again."
    elif config.method == "head":
        yield f"model = {model_class}.from_pretrained({base!r})"
    else:
        yield f"base = {model_class}.from_pretrained({base!r})"
        if config.model.add_special_tokens:
            rows = "max(len(tokenizer), base.get_input_embeddings().num_embeddings)"
            yield f"base.resize_token_embeddings({rows})"
        yield "from peft import PeftModel"
        yield 'model = PeftModel.from_pretrained(base, "final_artifact/lora_adapter")'
