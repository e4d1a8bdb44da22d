"""The checks of the model: equalities measured on a few rows in fp32 and without dropout."""

from itertools import chain
from pathlib import Path
import tempfile

import torch
from torch import Tensor, nn

from lora.adapter import load_adapter, save_adapter
from lora.evaluation.predict import evaluate
from lora.layer import LoRALinear, lora_layers, merge
from lora.model.compatibility import find_incompatibility
from lora.model.heads import LMHead
from lora.preflight.check_result import BUG, FAIL, PASS, WARN, Result, require, require_at_most
from lora.preflight.trial import Trial, largest_difference, same_gradients, same_tensors
from lora.target_modules import is_pooler, is_tied
from lora.training import checkpoint
from lora.training.base_integrity import adapter_parameters, frozen_sums
from lora.training.optimizer import make_optimizer

UPDATES = 10  # on a repeated batch


def first_names(names: list[str]) -> str:
    return ", ".join(names[:5])


def tied_as_declared(trial: Trial) -> Result | None:
    if not isinstance(trial.task.head, LMHead):
        return None
    tied = is_tied(trial.task.model)
    declared = trial.task.model.config.get_text_config().tie_word_embeddings
    words = {True: "tied", False: "not tied"}
    in_config = f"config.json says {words[bool(declared)]}"
    measured = f"embeddings and output layer are {words[tied]}, {in_config}"
    return require(declared == tied, measured, "correct its tie_word_embeddings")


def model_as_assumed(trial: Trial) -> Result:
    problem = find_incompatibility(trial.task)
    trial.task.eval()
    measured = problem or "packing, causality and logits are as plainlora expects them"
    return require(not problem, measured, BUG)


def fresh_adapter(trial: Trial) -> Result | None:
    """A fresh adapter changes no bit of the base's outputs; with DoRA they differ by rounding."""
    model, layers = trial.task.model, lora_layers(trial.task.model)
    if not layers or trial.config.model.init_from not in ("", "scratch"):
        return None
    with_adapter = trial.outputs()
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    base_outputs = trial.outputs()
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    limit = trial.tolerance if trial.config.lora.use_dora else 0.0
    return same_tensors(with_adapter, base_outputs, limit, "largest difference")


def loss_falls(trial: Trial) -> Result:
    """Updates on the same rows lower the loss, from the weights that the run will begin with."""
    optimizer = new_optimizer(trial)
    first_loss = trial.step().loss
    for _ in range(UPDATES):
        update(trial, optimizer)
    last_loss = trial.step().loss
    measured = f"{first_loss:.4f} -> {last_loss:.4f} in {UPDATES} updates"
    learning_rate = trial.config.training.learning_rate
    advice = f"lower --learning_rate ({learning_rate:g}); or what is trained has no effect"
    return require(last_loss < first_loss, measured, advice)


def new_optimizer(trial: Trial) -> torch.optim.Optimizer:
    return make_optimizer(checkpoint.trainable_parameters(trial.task), trial.config, trial.device)


def update(trial: Trial, optimizer: torch.optim.Optimizer) -> None:
    trial.step()
    for group in optimizer.param_groups:
        group["lr"] = trial.config.training.learning_rate * group["lr_ratio"]
    optimizer.step()


def adapter_acts(trial: Trial) -> Result | None:
    """Changing B changes the outputs. B stays changed, because later checks need an adapter with an
    effect.
    """
    all_layers = lora_layers(trial.task.model).values()
    layers = [layer for layer in all_layers if isinstance(layer, LoRALinear)]
    if not layers:
        return None
    before = trial.outputs()
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.weight += 0.02 * torch.randn_like(layer.lora_B.weight)
    difference = largest_difference(trial.outputs(), before)
    measured = f"a small change of it changes the outputs by {difference:.1e}"
    advice = f"raise --lora_alpha; or it is {BUG}"
    return require(difference > trial.tolerance, measured, advice)


def trained_tensors(trial: Trial) -> Result:
    """All tensors that are meant to be trained get gradients, and no other does."""
    gradients = trial.step().gradients
    tensors = {n: p for n, p in trial.task.named_parameters() if p.is_floating_point()}
    expected = names_to_train(tensors, trial)
    unexpected = sorted(gradients.keys() - expected)
    missing = [name for name in expected if name not in gradients]
    zero = [name for name in expected if name not in missing and not gradients[name].any()]
    if unexpected:
        frozen = first_names(unexpected)
        return Result(FAIL, f"frozen tensors get gradients: {frozen}; {BUG}")
    if missing or any(".lora_" in name for name in zero):
        names = first_names(missing + zero)
        return Result(FAIL, f"some of {len(expected)} get no gradient: {names}; {BUG}")
    if zero:
        reason = "these sequences do not use them (experts that no token is sent to?)"
        return Result(WARN, f"the gradient of {first_names(zero)} is 0: {reason}")
    trained = f"all {len(expected)} trained tensors get a gradient"
    return Result(PASS, f"{trained}, and none of the other {len(tensors) - len(expected)}")


def names_to_train(tensors: dict[str, nn.Parameter], trial: Trial) -> list[str]:
    """Return the names of the tensors that are meant to be trained."""
    lora, task = trial.config.lora, trial.task
    if not lora:
        return sorted(name for name in tensors if not is_pooler(name))
    # By id: a tied tensor has two names, and named_parameters() lists it once.
    parts = adapter_parameters(task.model, lora.modules_to_save, task.head)
    ids = {id(parameter) for parameter in chain.from_iterable(parts.values())}
    return sorted(name for name, parameter in tensors.items() if id(parameter) in ids)


def loss_is_mean(trial: Trial) -> Result:
    """The loss of a step is the mean over its targets, recomputed from the predictions."""
    batch = trial.batch.to(trial.device)
    _, predictions = trial.outputs()
    losses = trial.task.head.losses(predictions, batch.targets) * batch.loss_weights
    expected = losses.cpu().double().mean().item()  # MPS has no float64
    loss = trial.step().loss
    difference = abs(loss - expected) / max(abs(expected), 1e-12)
    what = f"{loss:.6f} over {batch.num_targets} targets, relative difference"
    return require_at_most(difference, trial.tolerance, what)


def accumulation(trial: Trial) -> Result:
    """A micro-batch for each row gives the gradients of a single micro-batch."""
    accumulated = trial.step(trial.data(max_tokens=1))
    return same_gradients(accumulated, trial.step(), trial.tolerance)


def two_processes(trial: Trial) -> Result:
    """The sum of two processes' gradients is the gradient of one process."""
    # This process computes the parts of both ranks, rank 1 first: the order may only change
    # rounding.
    total = trial.step(trial.data(rank=1, world_size=2))
    for name, gradient in trial.step(trial.data(rank=0, world_size=2)).gradients.items():
        total.gradients[name] = total.gradients.get(name, 0) + gradient
    return same_gradients(total, trial.step(), trial.tolerance)


def packing(trial: Trial) -> Result:
    """Rows that share a micro-batch have the outputs that each has alone."""
    hidden, predictions = [], []
    for i in range(len(trial.sample)):
        row_hidden, row_predictions = trial.outputs(trial.sample.batch([i], trial.task.packed))
        hidden.append(row_hidden)
        predictions.append(row_predictions)
    alone = [torch.cat(hidden), torch.cat(predictions)]
    return same_tensors(trial.outputs(), alone, trial.tolerance, "largest difference")


def after_evaluation(trial: Trial) -> Result:
    """An evaluation between two steps changes no gradient."""
    before = trial.step()
    evaluate(trial.run)
    return same_gradients(trial.step(), before, trial.repetition_tolerance)


def resumed(trial: Trial) -> Result:
    """A step after saving and loading gives the weights of a step without, bit for bit.

    On a GPU with deterministic algorithms; how far it is without them is said as well.
    """
    what = "largest difference of the weights"
    if trial.device.type != "cuda":
        return same_tensors(*weights_after_resuming(trial), trial.repetition_tolerance, what)
    torch.use_deterministic_algorithms(False)
    otherwise = largest_difference(*weights_after_resuming(trial))
    torch.use_deterministic_algorithms(True)
    try:
        result = same_tensors(*weights_after_resuming(trial), 0.0, f"with --deterministic, {what}")
    finally:
        torch.use_deterministic_algorithms(trial.config.training.deterministic)
    return Result(result.status, f"{result.text} ({otherwise:.2g} without it)")


def weights_after_resuming(trial: Trial) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights after a step that follows saving and loading, and after one without."""
    optimizer = new_optimizer(trial)
    update(trial, optimizer)
    parameters = checkpoint.trainable_parameters(trial.task)
    with tempfile.TemporaryDirectory(prefix="plainlora_") as folder:
        checkpoint.save(Path(folder), 1, trial.task, optimizer, {"val": None})
        update(trial, optimizer)
        expected = [parameter.detach().clone() for parameter in parameters.values()]
        optimizer = new_optimizer(trial)
        checkpoint.load(Path(folder) / "checkpoint_step_1", trial.task, optimizer)
    update(trial, optimizer)
    return list(parameters.values()), expected


def through_peft(trial: Trial) -> Result | None:
    """Save the adapter in PEFT's format, set it to zero, load it: it has the same tensors and
    outputs.
    """
    model = trial.task.model
    if not lora_layers(model):
        return None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    outputs = trial.outputs()
    with tempfile.TemporaryDirectory(prefix="plainlora_") as folder, torch.no_grad():
        save_adapter(model, folder)
        for parameter in trained.values():
            parameter.zero_()
        load_adapter(model, folder)
    loaded = dict(model.named_parameters())
    changed = [name for name, tensor in before.items() if not torch.equal(loaded[name], tensor)]
    if changed:
        return Result(FAIL, f"changed: {first_names(changed)}; {BUG}")
    return same_tensors(trial.outputs(), outputs, 0.0, f"{len(before)} tensors, largest difference")


def base_unchanged(trial: Trial) -> Result | None:
    sums = frozen_sums(trial.task.model)
    if not sums:
        return None
    before = trial.frozen_sums
    changed = sorted(name for name in before if sums.get(name) != before[name])
    if changed:
        return Result(FAIL, f"changed by training: {first_names(changed)}; {BUG}")
    return Result(PASS, f"{len(sums)} frozen tensors are bit for bit the same")


def merged(trial: Trial) -> Result | None:
    """Merging the adapter into the base keeps the outputs. This ends the trial."""
    if not lora_layers(trial.task.model):
        return None
    before = trial.outputs()
    merge(trial.task.model)
    trial.task.float()
    return same_tensors(trial.outputs(), before, trial.tolerance, "largest difference")


MODEL = {
    "tied embeddings": tied_as_declared,
    "model compatibility": model_as_assumed,
    "fresh adapter changes nothing": fresh_adapter,
    "loss on a repeated batch": loss_falls,
    "adapter has an effect": adapter_acts,
    "trained tensors": trained_tensors,
    "loss is the mean over targets": loss_is_mean,
    "gradient accumulation is exact": accumulation,
    "two processes equal one": two_processes,
    "packing changes nothing": packing,
    "evaluation changes nothing": after_evaluation,
    "resuming is exact": resumed,
    "saved and loaded as PEFT": through_peft,
    "base unchanged": base_unchanged,
    "merging changes nothing": merged,
}
