"""LoRA fine-tuning: the base is frozen, and a small update of every chosen linear layer is trained
in its place.

    python train_lora.py --lora_r 16                     the embedded base and data
    python train_lora.py --base_model FOLDER --train_data FILE [--config FILE] [--lora_r 16 ...]
    python train_lora.py --lora_r 0                      the score head alone, on a base that reads every row once

The loop, the data, the heads, checkpoints and evaluation are train.py's. What follows is all the
difference.
"""

import sys

from lora.common.allocator import keep_memory
from lora.common.errors import UserError
from lora.common.exit_status import one_line_errors
from lora.common.paths import ROOT
from lora.config.command_line import read_command_line
from lora.config.schema import get_lora_config
from lora.data.raw_data import Source

if __name__ == "__main__":
    # Above `import torch`: torch reads the allocators' settings when it is imported, and a mistake
    # in the command line or the data is reported before the seconds that importing torch takes.
    keep_memory()
    with one_line_errors():
        command = read_command_line(
            sys.argv[1:],
            get_lora_config(),
            ROOT / "configs" / "tiny_lora.toml",
            "LoRA fine-tuning.",
        )
        source = Source(command.config)
        command.require_same(source.files)

import torch

from lora.common.seeds import seed_for
from lora.distributed import process_group
from lora.layer import inject
from lora.model.compatibility import disagreement
from lora.model.device import choose_device, choose_dtype
from lora.model.load import load_task
from train import run


def main(command, source):
    config, lora = command.config, command.config.lora
    device = choose_device(config.training.device)
    process_group.start(device)
    dtype = choose_dtype(config, device)
    task = load_task(config, dtype)  # frozen weights are kept in the type they are computed in
    if config.method == "head":
        task.model.requires_grad_(False)
        return run(task, command, source, device, dtype)
    # Not the numbers that the head was drawn with
    torch.manual_seed(seed_for(config.training.seed, "lora"))
    inject(
        task.model, lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.target_modules, lora.modules_to_save,
        rslora=lora.use_rslora, dora=lora.use_dora, rank_pattern=lora.rank_pattern, alpha_pattern=lora.alpha_pattern,
    )  # fmt: skip
    problem = disagreement(task)  # some models read the weights of a layer past the layer
    if problem:
        raise UserError(
            f"target_modules {' '.join(lora.target_modules)}: with LoRA there {problem}; name other layers."
        )
    return run(task, command, source, device, dtype)


if __name__ == "__main__":
    with one_line_errors():
        main(command, source)
