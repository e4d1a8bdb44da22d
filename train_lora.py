"""LoRA fine-tuning: the base is frozen, and a small update of every chosen linear layer is trained in its place.

    python train_lora.py --lora_r 16                     the embedded base and data
    python train_lora.py --base_model FOLDER --train_data FILE [--config FILE] [--lora_r 16 ...]
    python train_lora.py --lora_r 0                      the score head alone, on a base that reads every row once

The loop, the data, the heads, checkpoints and evaluation are train.py's. What follows is all the difference.
"""

import sys

from lora.command_line import read_command_line
from lora.config import ROOT, get_lora_config
from lora.errors import UserError, one_line_errors
from lora.source import Source

if __name__ == "__main__":  # above torch, as in train.py
    with one_line_errors():
        command = read_command_line(
            sys.argv[1:], get_lora_config(), ROOT / "configs" / "tiny_lora.toml", "LoRA fine-tuning."
        )
        source = Source(command.config)
        command.require_same(source.files)

from train import run  # before torch: it sets the allocators

import torch

from lora import distributed
from lora.data import seed_for
from lora.layer import inject
from lora.model import choose_device, choose_dtype, disagreement, load_task


def main(command, source):
    config, lora = command.config, command.config.lora
    device = choose_device(config.training.device)
    distributed.start(device)
    dtype = choose_dtype(config, device)
    task = load_task(config, dtype)  # frozen weights are kept in the type they are computed in
    if config.method == "head":
        task.model.requires_grad_(False)
        return run(task, command, source, device, dtype)
    torch.manual_seed(seed_for(config.training.seed, "lora"))  # not the numbers that the head was drawn with
    inject(
        task.model, lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.target_modules, lora.modules_to_save,
        rslora=lora.use_rslora, dora=lora.use_dora, rank_pattern=lora.rank_pattern, alpha_pattern=lora.alpha_pattern,
    )  # fmt: skip
    problem = disagreement(task)  # some models read the weights of a layer past the layer
    if problem:
        raise UserError(f"target_modules {' '.join(lora.target_modules)}: with LoRA there {problem}; name other layers.")
    return run(task, command, source, device, dtype)


if __name__ == "__main__":
    with one_line_errors():
        main(command, source)
