"""LoRA fine-tuning: the base is frozen, and a low-rank update of each chosen layer is trained.

    python train_lora.py --lora_r 16                the embedded base and data
    python train_lora.py --base_model FOLDER --train_data FILE [--config FILE] [--lora_r 16 ...]
    python train_lora.py --lora_r 0                 linear probing: only the score head is trained

The loop, the data, the heads and the evaluation are train.py's. This is the whole difference.
"""

import sys

from lora.common.allocator import keep_freed_memory
from lora.common.exit_status import one_line_errors
from lora.common.signals import begin_loading_torch
from lora.config.command_line import Command, read_command_line
from lora.config.schema import get_lora_config
from lora.data.raw_data import RawData

if __name__ == "__main__":
    keep_freed_memory()  # above `import torch`, for the reason in train.py
    with one_line_errors():
        description = "LoRA fine-tuning."
        command = read_command_line(sys.argv[1:], get_lora_config(), "tiny_lora.toml", description)
        raw_data = RawData(command.config)
        command.require_same(raw_data.files)
    begin_loading_torch()

import torch

from lora.common.seeds import seed_for
from lora.layer import inject
from lora.model.compatibility import refuse_incompatible_layers
from lora.model.load import load_task
from lora.training.startup import start_loading
from train import run_training


def main(command: Command, raw_data: RawData) -> dict | None:
    config, lora = command.config, command.config.lora
    device, dtype, hashing = start_loading(command)
    # Frozen weights are kept in the dtype they are computed in.
    task = load_task(config, dtype, device=device)
    if config.method == "head":
        task.model.requires_grad_(False)
    else:
        # A seed of its own: not the random numbers that the score head was drawn with.
        torch.manual_seed(seed_for(config.training.seed, "lora"))
        inject(
            task.model, lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.target_modules,
            lora.modules_to_save, rslora=lora.use_rslora, dora=lora.use_dora,
            rank_pattern=lora.rank_pattern, alpha_pattern=lora.alpha_pattern,
        )  # fmt: skip
        refuse_incompatible_layers(task, lora.target_modules)
    return run_training(task, command, raw_data, hashing)


if __name__ == "__main__":
    with one_line_errors(command.status):
        main(command, raw_data)
