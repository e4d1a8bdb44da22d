"""The base, hashed before and after training: that it is unchanged is measured, and so is what
alone is trained.

outputs/RUN/baseline_checksums.json   sha256 of the base's weight files, and one over the frozen tensors in memory
"""

import hashlib
import json
from pathlib import Path

import torch

from lora.adapter import factors
from lora.common.atomic_files import write_text_atomically
from lora.common.checksums import file_sha256, map_in_threads
from lora.common.errors import Stopped
from lora.common.serialization import read_file
from lora.distributed.sharded_checkpoint import INDEX_FILE
from lora.layer import lora_layers
from lora.model.heads import MLPHead
from lora.model.weights import weight_files
from lora.target_modules import find_modules_to_save
from lora.training.checkpoint import trainable_parameters


def measure_base(task, config):
    """{"files": {weight file of the base: sha256}, "frozen": {frozen tensor: sha256, as it lies in
    memory}}.

    Full fine-tuning freezes nothing, and random weights come from no file.
    """
    return {
        "files": file_sums(config.model),
        "frozen": frozen_sums(task.model) if config.lora else {},
    }


def frozen_sums(model):
    """{frozen tensor: sha256}."""
    # From a GPU each thread holds one in main memory
    return map_in_threads(sha256_of_tensor, frozen_tensors(model))


def file_sums(model):
    """{weight file of the base: sha256}. `model` is the [model] table of a configuration."""
    return map_in_threads(file_sha256, {path.name: path for path in weight_files(model)})


def warn_other_base(folder, base_model, sums):
    """A warning, if adapter or head in `folder` were made by a run of ours on other weight files
    than `sums`; else "".
    """
    folder = Path(folder).resolve()
    place = folder.parent if folder.name == "lora_adapter" else folder
    if (place / "backbone").is_dir() or (place / INDEX_FILE).is_file():  # whole models
        return ""
    records = [place / name for name in ("metadata.json", "trainer_state.json")]
    facts = next((read_file(path) for path in records if path.is_file()), {})
    known = (facts.get("base_files") or facts.get("facts", {}).get("base_model")) in (
        None,
        {},
        sums,
    )
    return (
        ""
        if known
        else f"warning: {base_model} does not hold the weights that {folder} was trained on"
    )


def frozen_tensors(model):
    """Name -> tensor, for all that the model's state holds and that is not trained, a 4-bit
    weight's scales among it.

    Buffers outside of the state are made anew by the model itself (rotary frequencies, for the
    length it reads).
    """
    state = model.state_dict(keep_vars=True)
    # Tied ones have two names
    once = {id(tensor): name for name, tensor in state.items() if not tensor.requires_grad}
    return {name: state[name] for name in sorted(once.values())}


def sha256_of_tensor(tensor):
    total = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    plain = tensor.detach()  # or a 4-bit weight would take its scales along to the CPU
    total.update(plain.cpu().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def sha256_over(sums):
    """One sha256 over {name: sha256}."""
    return hashlib.sha256(
        "".join(f"{name} {one}\n" for name, one in sorted(sums.items())).encode()
    ).hexdigest()


def record_base(run_dir, config, before):
    """Write baseline_checksums.json."""
    frozen = {
        "frozen_tensors": len(before["frozen"]),
        "frozen_sha256": sha256_over(before["frozen"]),
    }
    sums = {"base_model": config.model.base_model, "files": before["files"], **frozen}
    write_text_atomically(
        Path(run_dir) / "baseline_checksums.json", json.dumps(sums, indent=2) + "\n"
    )


def compare_base(before, after):
    """A line that says that nothing changed. Raises Stopped with the names of what did."""
    changed = sorted(
        {name for part in before for name, _ in before[part].items() ^ after[part].items()}
    )
    if changed:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if changed[5:] else "")
        raise Stopped(
            f"the base's weights changed during training: {listed}; no artifact is made of this run."
        )
    frozen = (
        f"{len(before['frozen'])} frozen tensors, sha256 {sha256_over(before['frozen'])}; "
        if before["frozen"]
        else ""
    )
    return f"base model weights unchanged: {frozen}weight files: {len(before['files'])}"


def only_adapters_train(task, modules_to_save):
    """A line that says so. Raises Stopped where anything but LoRA's tensors, modules to save and
    the head is trained.
    """
    lora = [p for layer in lora_layers(task.model).values() for p in factors(layer).values()]
    whole = [
        p
        for name in find_modules_to_save(task.model, modules_to_save)
        for p in task.model.get_submodule(name).parameters()
    ]
    head = list(task.head.parameters()) if isinstance(task.head, MLPHead) else []
    allowed = {id(p) for p in (*lora, *whole, *head)}
    strange = [name for name, p in trainable_parameters(task).items() if id(p) not in allowed]
    if strange:
        mend = "freeze them, or name them in modules_to_save"
        raise Stopped(f"trained beside the adapter: {', '.join(strange[:5])}; {mend}.")
    counts = (lora, "LoRA tensors"), (whole, "of modules to save"), (head, "of the head")
    return "only adapter parameters are trainable: " + ", ".join(
        f"{len(some)} {what}" for some, what in counts if some
    )
