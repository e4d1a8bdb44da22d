"""The README.md of a final artifact: a model card for the Hub, whose commands work as they stand
there.
"""

import json
import shlex

from lora.common.base_files import locate_base
from lora.common.paths import ROOT

HEAD = "`mlp_head.safetensors` is Linear - ReLU - Linear - sigmoid, on the last hidden state of each step's last token.\n"
PROMPTS = {"lm": "From left to right: 12+9-1", "score": "From left to right: 12+9-1\n12+9=21"}


CARD = """\
---
base_model: {base_in_yaml}
library_name: {library}
tags: {tags}
---

# {name}

{what} of `{base}`, made by plainlora for the task `{task}`: {trainable_parameters:,} of {parameters:,} parameters were
trained, in {seconds:g} s. The weights are those of step {step}, which had the lowest validation loss.

| on the held-out data | |
|---|---|
{figures}

| data | sha256 |
|---|---|
{data}

`metadata.json` holds the versions, the hardware and the hash of the base; `checksums.json` the hash of every file here.

## Use

In the folder above this one:

```sh
code={code}  # where plainlora lies
{commands}
```

```python
{loading}
```

{head}The paths are those of the machine it was made on: `--base_model` and `--eval_data` name others.
"""


def model_card(task, config, facts):
    """The text of the card. `facts` is the artifact's metadata, `config` the configuration with
    whole paths.
    """
    base, _ = locate_base(config.model.base_model)
    figures = {name: value for name, value in facts["best"].items() if name != "step"}
    of_data, lora = {**facts["train_data"], **facts["eval_data"]}, config.lora
    without_adapter = {"head": "A score head on the frozen base", "full": "A full fine-tuning"}
    what = without_adapter.get(config.method) or f"A LoRA adapter of rank {lora.lora_r}"
    if lora and lora.load_in_4bit:
        what += ", trained on 4 bits,"
    return CARD.format(
        **{key: facts[key] for key in ("task", "trainable_parameters", "parameters", "seconds")},
        base=base,
        base_in_yaml=json.dumps(base, ensure_ascii=False),
        library="peft" if config.method == "lora" else "transformers",
        tags=json.dumps(["plainlora", facts["method"], facts["task"]]),
        name=config.output.experiment_name,
        what=what,
        step=facts["best"]["step"],
        figures="\n".join(
            f"| {name} | {value:.6g} |" for name, value in figures.items() if value is not None
        ),
        data="\n".join(
            f"| `{path}` | {sha256 or 'generated'} |" for path, sha256 in of_data.items()
        ),
        code=shlex.quote(str(ROOT)),
        commands="\n".join(commands(config)),
        loading="\n".join(loading(task, config, base)),
        head=HEAD if config.model.task == "score" else "",
    )


def commands(config):
    yield 'python "$code/eval.py" --verify_only --artifact_dir final_artifact'
    yield 'python "$code/eval.py" --checkpoint final_artifact'
    yield f'python "$code/eval.py" --checkpoint final_artifact --prompt {shlex.quote(PROMPTS[config.model.task])}'
    if config.lora and config.model.init_from != "scratch":
        yield 'python "$code/merge.py" --adapter final_artifact --output merged'


def loading(task, config, base):
    """Lines of Python that load the model without plainlora."""
    # PEFT's names are those of such a model
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
            yield "base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))"
        yield "from peft import PeftModel"
        yield 'model = PeftModel.from_pretrained(base, "final_artifact/lora_adapter")'
