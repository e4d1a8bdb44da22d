"""The checks of the model: equalities measured on a few rows in fp32 and without dropout."""

from pathlib import Path
import tempfile

import torch

from lora.adapter import load_adapter, save_adapter
from lora.evaluation.example_losses import per_target_losses
from lora.evaluation.predict import evaluate
from lora.layer import LoRALinear, lora_layers, merge
from lora.model.compatibility import find_incompatibility
from lora.model.heads import LMHead
from lora.model.weights import is_finite
from lora.preflight.trial import FAIL, OUR_FAULT, PASS, WARN, apart, distance, judged, required
from lora.target_modules import is_pooler, is_tied, matches_ending
from lora.training import checkpoint
from lora.training.base_integrity import frozen_sums
from lora.training.optimizer import make_optimizer

UPDATES = 10  # on a repeated batch
# Standard deviation of what is added to the factors B, so that the adapter does something
STIR = 0.02


def finite(trial):
    tensors = trial.task.state_dict()
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not is_finite(tensor)
    ]
    found = f"not in {', '.join(odd[:5])}" if odd else f"in all of {len(tensors)} tensors"
    return required(
        not odd, found, "the file is damaged: fetch it again, or begin from another --init_from"
    )


def tied(trial):
    model, declared = (
        trial.task.model,
        trial.task.model.config.get_text_config().tie_word_embeddings,
    )
    if not isinstance(trial.task.head, LMHead):
        return None
    said, found = ("tied" if one else "apart" for one in (declared, is_tied(model)))
    found = f"embeddings and output layer are {found}, in config.json {said}"
    return required(declared == is_tied(model), found, "mend tie_word_embeddings there")


def behaves(trial):
    problem = find_incompatibility(trial.task)
    trial.task.eval()
    return required(
        not problem, problem or "packing, causality and logits are as assumed", OUR_FAULT
    )


def injected(trial):
    """The model with a fresh adapter says what the base says, bit for bit; with DoRA to rounding."""
    model, layers = trial.task.model, lora_layers(trial.task.model)
    if not layers or trial.config.model.init_from not in ("", "scratch"):
        return None
    with_adapter = trial.outputs()
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    found = distance(with_adapter, trial.outputs())
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    limit = trial.tolerance if trial.config.lora.use_dora else 0.0
    return judged(found, limit, "largest difference")


def learns(trial):
    """Updates at the configured learning rate on the same rows, from the weights that the run will
    begin with.
    """
    optimizer = optimizer_of(trial)
    first = trial.gradients()[1]
    for _ in range(UPDATES):
        update(trial, optimizer)
    last = trial.gradients()[1]
    found = f"{first:.4f} -> {last:.4f} in {UPDATES} updates"
    mend = f"lower --learning_rate ({trial.config.training.learning_rate:g}), or what is trained does not act"
    return required(last < first, found, mend)


def optimizer_of(trial):
    return make_optimizer(checkpoint.trainable_parameters(trial.task), trial.config, trial.device)


def update(trial, optimizer):
    """One step of training, at the configured learning rate."""
    trial.gradients()
    for group in optimizer.param_groups:
        group["lr"] = trial.config.training.learning_rate * group["lr_ratio"]
    optimizer.step()


def acts(trial):
    """Other factors, another answer. From here on the factors B are no longer near zero."""
    layers = [
        layer for layer in lora_layers(trial.task.model).values() if isinstance(layer, LoRALinear)
    ]
    if not layers:
        return None
    before = trial.outputs()
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.weight += STIR * torch.randn_like(layer.lora_B.weight)
    found = distance(trial.outputs(), before)
    text = f"a small change of it changes what the model says by {found:.1e}"
    return required(found > trial.tolerance, text, f"raise --lora_alpha, or it is {OUR_FAULT}")


def trained_tensors(trial):
    """Which tensors get gradients: all that are meant to be trained, and no other."""
    lora, gradients = trial.config.lora, trial.gradients()[0]

    def meant(name):
        if not lora:
            return not is_pooler(name)
        return (
            ".lora_" in name
            or name.startswith("head.")
            or matches_ending(name.rpartition(".")[0], lora.modules_to_save)
        )

    tensors = {name: p for name, p in trial.task.named_parameters() if p.is_floating_point()}
    wanted = {name for name in tensors if meant(name)}
    strange = sorted(name for name, gradient in gradients.items() if name not in wanted)
    missing = sorted(name for name in wanted if gradients.get(name) is None)
    zero = sorted(name for name in wanted - {*missing} if not gradients[name].any())
    if strange:
        return (
            FAIL,
            f"gradients for what is to stay as it is: {', '.join(strange[:5])}; {OUR_FAULT}",
        )
    if missing or any(".lora_" in name for name in zero):
        return (
            FAIL,
            f"of {len(wanted)} get no gradient: {', '.join([*missing, *zero][:5])}; {OUR_FAULT}",
        )
    if zero:
        return (
            WARN,
            f"the gradient is 0 of {', '.join(zero[:5])}: these rows do not need them (experts nobody is sent to?)",
        )
    return (
        PASS,
        f"all {len(wanted)} that are meant to be trained get one, the other {len(tensors) - len(wanted)} none",
    )


def loss_of_targets(trial):
    """The loss of a step is the sum over its targets divided by their number, recomputed from what
    the head says.
    """
    batch = trial.batch.to(trial.device)
    each = (
        per_target_losses(trial.task.head, trial.outputs()[1], batch.targets) * batch.loss_weights
    )
    expected, found = each.double().mean().item(), trial.gradients()[1]
    difference = abs(found - expected) / max(abs(expected), 1e-12)
    return judged(
        difference,
        trial.tolerance,
        f"{found:.6f} over {batch.num_targets} targets, relative difference",
    )


def accumulated(trial):
    """Every row in a micro-batch of its own, against all in one."""
    found = apart(trial.gradients(trial.data_of_few_rows(max_tokens=1))[0], trial.gradients()[0])
    return judged(found, trial.tolerance, "relative difference of the gradients")


def ranks(trial):
    """The gradients of two processes' parts, added in the other order, against those of one
    process.
    """
    parts = [trial.gradients(trial.data_of_few_rows(rank=rank, world_size=2))[0] for rank in (1, 0)]
    summed = {
        n: None if g is None else g if parts[1][n] is None else g + parts[1][n]
        for n, g in parts[0].items()
    }
    found = apart(summed, trial.gradients()[0])
    return judged(found, trial.tolerance, "relative difference of the gradients")


def packed(trial):
    """Rows that share a micro-batch, against each alone."""
    apiece = [trial.outputs(trial.few.batch([i], trial.task.packed)) for i in range(len(trial.few))]
    alone = [torch.cat(parts) for parts in zip(*apiece)]
    return judged(distance(trial.outputs(), alone), trial.tolerance, "largest difference")


def after_evaluation(trial):
    """An evaluation between two steps changes no gradient."""
    before = trial.gradients()[0]
    evaluate(trial.run)
    trial.task.eval()
    # On a GPU sums have no fixed order
    limit = 0.0 if trial.device.type == "cpu" else trial.tolerance
    return judged(
        apart(trial.gradients()[0], before), limit, "relative difference of the gradients"
    )


def resumed(trial):
    """Saved, loaded and gone on with, the next step is the next step, bit for bit (on a GPU to
    rounding).
    """
    optimizer = optimizer_of(trial)
    update(trial, optimizer)
    with tempfile.TemporaryDirectory(prefix="plainlora_") as folder:
        checkpoint.save(folder, 1, trial.task, optimizer, {"val": None})
        update(trial, optimizer)
        after = {
            name: p.detach().clone()
            for name, p in checkpoint.trainable_parameters(trial.task).items()
        }
        optimizer = optimizer_of(trial)
        checkpoint.load(Path(folder) / "checkpoint_step_1", trial.task, optimizer)
    update(trial, optimizer)
    found = distance([*checkpoint.trainable_parameters(trial.task).values()], [*after.values()])
    limit = 0.0 if trial.device.type == "cpu" else trial.tolerance
    return judged(found, limit, "largest difference of the weights")


def through_peft(trial):
    """Written in PEFT's format and read back over other factors, the adapter is what it was."""
    model = trial.task.model
    if not lora_layers(model):
        return None
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    said = trial.outputs()
    with tempfile.TemporaryDirectory(prefix="plainlora_") as folder, torch.no_grad():
        save_adapter(model, folder)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        load_adapter(model, folder)
    changed = [
        name
        for name, p in model.named_parameters()
        if name in before and not torch.equal(p, before[name])
    ]
    if changed:
        return FAIL, f"other than before: {', '.join(changed[:5])}; {OUR_FAULT}"
    return judged(
        distance(trial.outputs(), said), 0.0, f"{len(before)} tensors, largest difference"
    )


def base_unchanged(trial):
    now = frozen_sums(trial.task.model)
    changed = sorted(name for name, total in trial.frozen_sums.items() if now.get(name) != total)
    found = (
        f"changed by training: {', '.join(changed[:5])}"
        if changed
        else f"{len(now)} frozen tensors are what they were"
    )
    return required(not changed, found, OUR_FAULT) if now else None


def merged(trial):
    """Ends the trial: the adapter is folded into the model."""
    if not lora_layers(trial.task.model):
        return None
    before = trial.outputs()
    merge(trial.task.model)
    trial.task.float()
    return judged(distance(trial.outputs(), before), trial.tolerance, "largest difference")


MODEL = {
    "finite weights": finite,
    "tied as declared": tied,
    "model as assumed": behaves,
    "injected = base": injected,
    "loss on a repeated batch": learns,
    "adapter acts": acts,
    "trained tensors": trained_tensors,
    "loss = mean over targets": loss_of_targets,
    "accumulated = whole": accumulated,
    "two processes = one": ranks,
    "packed = alone": packed,
    "after an evaluation": after_evaluation,
    "save, load, next step": resumed,
    "PEFT format and back": through_peft,
    "base unchanged": base_unchanged,
    "merged = unmerged": merged,
}  # fmt: skip
