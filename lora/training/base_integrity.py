"""The base, hashed before and after training: that it is unchanged is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
import hashlib
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.adapter import factors
from lora.common.atomic_files import write_text_atomically
from lora.common.checkpoint_folders import model_folder
from lora.common.checksums import file_sha256, map_in_threads
from lora.common.errors import Stopped
from lora.common.toml_json import read_file, to_json
from lora.config.schema import Config, ModelConfig
from lora.layer import lora_layers
from lora.model.task import Task
from lora.model.weights import weight_files
from lora.target_modules import find_modules_to_save
from lora.training.checkpoint import trainable_parameters


@dataclass
class BaseSums:
    """The sha256 of each part of a base. Full fine-tuning freezes nothing."""

    files: dict[str, str]  # of its weight files; none for random weights
    frozen: dict[str, str]  # of the frozen tensors, as they lie in memory


def measure_base(task: Task, config: Config, files: dict[str, str] | None = None) -> BaseSums:
    """Hash a base; `files` are the hashes of its weight files, where they are known already."""
    frozen = frozen_sums(task.model) if config.lora else {}
    if files is None:
        files = file_sums(config.model)
    return BaseSums(files, frozen)


def file_sums(model: ModelConfig) -> dict[str, str]:
    return map_in_threads(file_sha256, {path.name: path for path in weight_files(model)})


def frozen_sums(model: nn.Module) -> dict[str, str]:
    """Return the sha256 of each frozen tensor. Each thread copies one at a time from a GPU."""
    return map_in_threads(sha256_of_tensor, frozen_tensors(model))


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the frozen tensors of the model's state, with the scales of 4-bit weights.

    The model itself makes the other buffers anew (rotary frequencies, for the length it reads).
    """
    state = model.state_dict(keep_vars=True)
    frozen = {}  # by identity: a tied tensor has two names in the state, and one here
    for name, tensor in state.items():
        if not tensor.requires_grad:
            frozen[id(tensor)] = (name, tensor)
    return dict(frozen.values())


def sha256_of_tensor(tensor: Tensor) -> str:
    sha256 = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    plain = tensor.detach()  # without this a 4-bit weight takes its scales along to the CPU
    sha256.update(plain.cpu().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def sha256_over(sums: dict[str, str]) -> str:
    lines = [f"{name} {sha256}\n" for name, sha256 in sorted(sums.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def record_base(run_dir: Path, config: Config, base: BaseSums) -> None:
    """Write baseline_checksums.json: the sha256 of each file, and one over the frozen tensors."""
    record = {
        "base_model": config.model.base_model,
        "files": base.files,
        "frozen_tensors": len(base.frozen),
        "frozen_sha256": sha256_over(base.frozen),
    }
    write_text_atomically(run_dir / "baseline_checksums.json", to_json(record))


def warn_other_base(folder: str | Path, base_model: str, files: dict[str, str]) -> str:
    """Return a warning if the weights in `folder` were trained on another base, "" if not.

    Only what plainlora has written records the weight files of its base, and only an adapter or a
    head needs one. `files` are those of `base_model`, with their sha256.
    """
    folder = Path(folder).resolve()
    checkpoint = folder.parent if folder.name == "lora_adapter" else folder
    if model_folder(checkpoint):
        return ""
    recorded = None
    if (checkpoint / "metadata.json").is_file():
        recorded = read_file(checkpoint / "metadata.json").get("base_files")
    elif (checkpoint / "trainer_state.json").is_file():
        recorded = read_file(checkpoint / "trainer_state.json").get("facts", {}).get("base_model")
    if recorded and recorded != files:
        return f"warning: {base_model} does not hold the weights that {folder} was trained on"
    return ""


def compare_base(before: BaseSums, after: BaseSums) -> str:
    """Return a line that says that nothing changed; raise Stopped where something did."""
    sums_before = {**before.files, **before.frozen}
    sums_after = {**after.files, **after.frozen}
    names = sums_before.keys() | sums_after.keys()
    changed = sorted(name for name in names if sums_before.get(name) != sums_after.get(name))
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        what = f"the base's weights changed during training: {', '.join(changed[:5])}{more}"
        raise Stopped(f"{what}; no artifact is made of this run.")
    frozen = ""
    if before.frozen:
        frozen = f"{len(before.frozen)} frozen tensors, sha256 {sha256_over(before.frozen)}; "
    return f"base model weights unchanged: {frozen}weight files: {len(before.files)}"


def adapter_parameters(
    model: nn.Module, modules_to_save: Sequence[str], head: nn.Module | None
) -> dict[str, list[nn.Parameter]]:
    """Return what is trained of an adapter; the modules to save and the score head belong to it."""
    parts = {"LoRA tensors": [], "of modules_to_save": [], "of the score head": []}
    for layer in lora_layers(model).values():
        parts["LoRA tensors"].extend(factors(layer).values())
    for name in find_modules_to_save(model, modules_to_save):
        parts["of modules_to_save"].extend(model.get_submodule(name).parameters())
    if head is not None:
        parts["of the score head"].extend(head.parameters())
    return parts


def only_adapters_train(
    model: nn.Module, modules_to_save: Sequence[str], head: nn.Module | None = None
) -> str:
    """Return a line that counts what is trained; raise Stopped if it is more than the adapter."""
    parts = adapter_parameters(model, modules_to_save, head)
    allowed = {id(p) for p in chain.from_iterable(parts.values())}
    unexpected = [name for name, p in trainable_parameters(model).items() if id(p) not in allowed]
    if unexpected:
        mend = "freeze them, or name them in modules_to_save"
        raise Stopped(f"trained beside the adapter: {', '.join(unexpected[:5])}; {mend}.")
    counts = [f"{len(parameters)} {what}" for what, parameters in parts.items() if parameters]
    return "only adapter parameters are trainable: " + ", ".join(counts)
