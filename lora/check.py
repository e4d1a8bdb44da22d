"""`--check`: the user's own data and model, proved before a run: one line each, PASS, WARN or FAIL, and how to mend it.

A check is a function of a Trial that gives (PASS, WARN or FAIL, what was found), or None where it has no bearing. They run
in the order of DATA and MODEL, and train the task they are given; the last of them merges it. The equalities are measured
on a few training rows in fp32 and without dropout, where only a fault makes a difference that rounding does not.
"""

from dataclasses import replace
from functools import partial
import itertools
import json
from pathlib import Path
import re
import sys
import tempfile

import numpy as np
import torch

from lora import checkpoint
from lora.adapter import load_adapter, save_adapter
from lora.baseline import frozen_sums
from lora.config import DataConfig
from lora.data import Rows, TrainingData, is_target
from lora.errors import Exhausted, Stopped
from lora.example_losses import losses
from lora.generate import stop_tokens
from lora.heads import LMHead
from lora.layer import LoRALinear, lora_layers, merge
from lora.model import disagreement, is_finite
from lora.optimizer import make_optimizer
from lora.quantize import is_4bit
from lora.render import NO_TOKEN, render
from lora.show import shown
from lora.targets import decoder_layers, ends_with_one, is_pooler, is_tied

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
SAMPLE = 200  # examples that are rendered again and looked at one by one
ROWS, TOKENS = 8, 1024  # that the equalities are measured on, at most
WORK = 25e9  # parameters times tokens: of a large model there are fewer tokens
BODY = 30_000_000  # parameters of the layers that are kept of a larger model
UPDATES = 10  # on a repeated batch
OUR_FAULT = "a fault of the program or of this model's code: do not train with it, report it"
STIR = 0.02  # standard deviation of what is added to the factors B, so that the adapter does something


class Trial:
    """What is checked: a task in fp32 (4-bit weights stay), on `device`, ready to be trained, and the data of its run."""

    def __init__(self, task, source, rows, facts, config, device, backward, evaluate):
        """rows, facts: of `store.tokenised`. backward, evaluate: train.py's."""
        self.task, self.config, self.device = task.float().to(device).eval(), config, device
        self.rows, self.facts, self.examples = rows, facts, source.examples()  # (training, held out)
        self.backward, self.evaluate = backward, evaluate
        sample = self.examples[0][:SAMPLE]
        self.sample = list(zip(sample, render(sample, task.tokenizer, config.model.task, config.data, task.causal)))
        self.few = few(rows, max(16, int(min(TOKENS, WORK / sum(p.numel() for p in task.parameters())))))
        self.batch = self.few.batch(range(len(self.few)), task.packed)
        self.data = self.relaid()
        in_4bit = any(is_4bit(layer.base_layer) for layer in lora_layers(task.model).values())
        self.tolerance = 0.05 if in_4bit else 1e-4  # of the largest number: fp32 sums in another order
        self.started = frozen_sums(task.model)

    def relaid(self, max_tokens=2**40, rank=0, world=1):
        """TrainingData whose step is the few rows, in micro-batches of so many tokens; or a process's part of it."""
        data = DataConfig(train_data=["the rows"], max_length=self.config.data.max_length)
        layout = {"examples_per_step": len(self.few), "max_tokens": max_tokens}
        config = replace(self.config, data=data)
        return TrainingData(self.few, self.few, config, self.task.packed, rank, world, layout)

    def gradients(self, data=None):
        """({trained tensor: gradient or None}, loss) of the step."""
        self.task.zero_grad(set_to_none=True)
        place = 0, torch.amp.GradScaler(enabled=False), 0, self.device, torch.float32
        loss, out_of_memory, _ = self.backward(self.task, data or self.data, *place).tolist()
        if out_of_memory:
            raise Exhausted("out of memory in a check; add --device cpu.")
        named = self.task.named_parameters()
        return {name: p.grad for name, p in named if p.requires_grad or p.grad is not None}, loss

    @torch.no_grad()
    def outputs(self, batch=None):
        """(hidden states at the targets [n, width], what the head says [n, ...]) of all rows, or of a micro-batch."""
        batch = (batch or self.batch).to(self.device)
        hidden = self.task.at_targets(batch)
        return hidden.float(), self.task.head.predict(hidden, batch.targets).float()


def few(rows, tokens):
    """The shortest of the first rows, so many that they have at most so many tokens; two at least.

    Of a row with more than half of the tokens a part of so many, with its first target in the middle.
    """
    parts = []
    for i in range(min(len(rows), 4 * ROWS)):
        begin, end = rows.offsets[i : i + 2]
        if end - begin > tokens // 2:
            begin = max(begin, begin + np.flatnonzero(is_target(rows.targets[begin:end]))[0] - tokens // 4)
        parts.append((min(end - begin, tokens // 2), i, begin))
    parts.sort()
    total = np.cumsum([length for length, *_ in parts])
    parts = parts[: min(ROWS, max(2, int((total <= tokens).sum())))]
    lengths, chosen, _ = zip(*parts)
    at = np.concatenate([np.arange(begin, begin + length) for length, _, begin in parts])
    flat = rows.tokens[at], rows.targets[at], rows.segments[at]
    of_rows = rows.weights[[*chosen]], np.zeros(len(parts), np.int16)
    return Rows(*flat, np.cumsum([0, *lengths]), *of_rows)


def cut(task):
    """Keep so many of a large model's first layers that they have BODY parameters, two at least; a note, or ""."""
    layers = decoder_layers(task.model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    kept = max(2, sum(size <= BODY for size in itertools.accumulate(sizes)))
    if kept >= len(sizes):
        return ""
    shape = task.model.config.get_text_config()
    del layers[kept:]
    shape.num_hidden_layers = kept
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(shape, key, None):
            setattr(shape, key, getattr(shape, key)[:kept])
    return f"the model is large: of its {len(sizes)} layers the first {kept} are checked"


def distance(ones, others):
    """The largest difference of two lists of tensors, each relative to the largest number of the second."""
    pairs = [(a, b) for a, b in zip(ones, others, strict=True) if b.numel()]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs)


def apart(ones, others):
    """The distance of two sets of gradients: the norm of the difference, relative to that of the second."""
    pairs = [(a, others[name]) for name, a in ones.items() if a is not None and others[name] is not None]
    norms = [torch.stack([x.norm() for x in xs]).norm() for xs in ([a - b for a, b in pairs], [b for _, b in pairs])]
    return (norms[0] / norms[1]).item()


def required(fine, found, mend, otherwise=FAIL):
    """PASS, or another verdict with how to mend it."""
    return (PASS, found) if fine else (otherwise, f"{found}; {mend}")


def judged(found, limit, what):
    """PASS where `found` is at most `limit`; a NaN is not."""
    return required(found <= limit, f"{what} {found:.2g}", f"expected at most {limit:g}; {OUR_FAULT}")


def counted(count, of, found, mend):
    """WARN from the first of so many on, FAIL from half of them on."""
    return required(not count, found, mend, FAIL if 2 * count >= of else WARN)


# ------------------------------------------------------------------------------------------------------- the data


def amount(trial):
    facts = trial.facts["train"]
    share = facts["targets"] / facts["tokens"]
    found = f"{facts['rows']} rows, {facts['targets']} targets, {share:.1%} of the tokens are trained on"
    little = share < 0.01 and trial.config.model.task == "lm"
    return required(not little, found, "are the answers really so short?", WARN)


def share_of(key, what, mend, trial):
    facts = trial.facts | trial.facts["train"]
    return counted(facts[key], facts["examples"], f"{facts[key]} of {facts['examples']} examples {what}", mend)


def overlap(trial):
    count, of = trial.facts["overlap"], len({example.subject for example in trial.examples[1]})
    found = f"{count} of {of} held-out prompts or texts are in the training data"
    mend = "the validation loss flatters: split by prompt, or leave --eval_data out"
    return required(not count, found, mend, FAIL if 100 * count > of else WARN)


def beginnings(trial):
    bos, rows = trial.task.tokenizer.bos_token_id, trial.rows
    if bos is None:
        return PASS, "this tokenizer has no BOS"
    first = rows.offsets[:-1][rows.lengths(np.arange(len(rows))) > 1]
    count = int(((rows.tokens[first] == bos) & (rows.tokens[first + 1] == bos)).sum())
    found = f"{count} of {len(rows)} rows begin with two BOS"
    return required(not count, found, "take it out of the texts, or out of the chat template")


def ends(trial):
    """Whether the last thing that is learned of an answer or a text is to stop there."""
    if trial.config.model.task == "score":
        return None
    stops = set(stop_tokens(trial.task.model, trial.task.tokenizer))
    rows = [rendered.rows[-1] for _, rendered in trial.sample if rendered.rows and not rendered.cut]
    asked = [[target for target in row.targets if target != NO_TOKEN][-2:] for row in rows]  # a line end may follow it
    count = sum(not stops & set(last) for last in asked)
    found = f"{len(rows) - count} of {len(rows)} looked at end with a trained end token"
    mend = "the model would not learn to stop; mend eos_token or the chat template of the tokenizer"
    return counted(count, len(rows), found, mend)


def special_tokens(trial):
    """Chats take them as mere text, texts and steps as the tokens they are."""
    tokenizer = trial.task.tokenizer
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = [re.escape(token) for token in sorted(added | {*tokenizer.all_special_tokens}) if token]
    if not names:
        return PASS, "this tokenizer has no special tokens"
    pattern = re.compile("|".join(names))
    written = [(example, " ".join([*texts_of(example)])) for example in trial.examples[0]]
    odd = [example for example, text in written if pattern.search(text)]
    found = f"{len(odd)} of {len(written)} examples have special tokens written in them"
    if not odd:
        return PASS, found
    read = "in a chat they are read as mere text" if odd[0].messages else "they are read as the control tokens they name"
    return WARN, f"{found}, {odd[0].where} first: {read}"


def texts_of(example):
    """What somebody wrote of an example."""
    yield from (example.text, example.prompt, *example.steps)
    yield from (message["content"] for message in example.messages if isinstance(message.get("content"), str))


def mask(trial):
    """Every target is the token that comes next, all that the assistant says is one, and nothing that others say."""
    if trial.config.model.task == "score":
        return None
    rows = [row for _, rendered in trial.sample for row in rendered.rows]
    wrong = sum(target not in (NO_TOKEN, after) for row in rows for target, after in zip(row.targets, row.tokens[1:]))
    if wrong:
        return FAIL, f"{wrong} targets are not the token that follows; {OUR_FAULT}"
    lost, strange = [], []
    for example, rendered in trial.sample:
        if not example.messages or rendered.cut or not rendered.rows:
            continue
        learned = [target for row in rendered.rows for target in row.targets if target != NO_TOKEN]
        text = letters(trial.task.tokenizer.decode(learned))
        mine = [message for message in example.messages if message["role"] == "assistant"]
        others = [letters(message.get("content")) for message in example.messages if message["role"] != "assistant"]
        if not all(letters(message.get("content")) in text for message in mine):
            lost.append(example.where)
        if any(len(other) >= 12 and other in text and other not in letters(mine) for other in others):
            strange.append(example.where)
    if strange:
        return FAIL, f"{len(strange)} chats train on what the user or the system says, {strange[0]} first; {OUR_FAULT}"
    chats = sum(bool(example.messages) for example, _ in trial.sample)
    if lost:
        found = f"of {len(lost)} of {chats} chats an answer is not learned word for word, {lost[0]} first"
        mend = "the chat template changes or drops it: look with python -m lora.render"
        return counted(len(lost), chats, found, mend)
    return PASS, f"of {len(trial.sample)} looked at, all that is to be learned is a target, and nothing else"


def letters(content):
    """A message's content without blanks and what JSON escapes; tool calls may quote what a user said."""
    return re.sub(r'\\[nt]|[\s"\\]', "", json.dumps(content, ensure_ascii=False)) if content else ""


def labels(trial):
    """The targets are the labels, in their order; and there is something to tell apart."""
    if trial.config.model.task == "lm":
        return None
    for example, rendered in trial.sample:
        kept = [label for label in example.labels if label is not None]
        asked = [target for row in rendered.rows for target in row.targets if target == target]
        if asked != kept[: len(asked)] or (len(asked) < len(kept) and not rendered.cut):
            return FAIL, f"{example.where}: targets {asked[:5]}, labels {kept[:5]}; {OUR_FAULT}"
    targets = trial.rows.targets[is_target(trial.rows.targets)]
    values, counts = np.unique(targets, return_counts=True)
    most = counts.max() / counts.sum()
    found = f"mean {targets.mean():.3f}; the commonest label, {values[counts.argmax()]:g}, is {most:.1%} of them"
    if len(values) == 1:
        return FAIL, f"{found}: there is nothing to tell apart; add steps of the other kind"
    return required(most <= 0.95, found, "a scorer that always says so looks good", WARN)


# ------------------------------------------------------------------------------------------------------- the model


def finite(trial):
    tensors = trial.task.state_dict()
    odd = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)]
    found = f"not in {', '.join(odd[:5])}" if odd else f"in all of {len(tensors)} tensors"
    return required(not odd, found, "the file is damaged: fetch it again, or begin from another --init_from")


def tied(trial):
    model, declared = trial.task.model, trial.task.model.config.get_text_config().tie_word_embeddings
    if not isinstance(trial.task.head, LMHead):
        return None
    said, found = ("tied" if one else "apart" for one in (declared, is_tied(model)))
    found = f"embeddings and output layer are {found}, in config.json {said}"
    return required(declared == is_tied(model), found, "mend tie_word_embeddings there")


def behaves(trial):
    problem = disagreement(trial.task)
    trial.task.eval()
    return required(not problem, problem or "packing, causality and logits are as assumed", OUR_FAULT)


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


# -------------------------------------------------------------------------------------------------- the equalities


def learns(trial):
    """Updates at the configured learning rate on the same rows, from the weights that the run will begin with."""
    optimizer = optimizer_of(trial)
    first = trial.gradients()[1]
    for _ in range(UPDATES):
        update(trial, optimizer)
    last = trial.gradients()[1]
    found = f"{first:.4f} -> {last:.4f} in {UPDATES} updates"
    mend = f"lower --learning_rate ({trial.config.training.learning_rate:g}), or what is trained does not act"
    return required(last < first, found, mend)


def optimizer_of(trial):
    return make_optimizer(checkpoint.trainable(trial.task), trial.config, trial.device)


def update(trial, optimizer):
    """One step of training, at the configured learning rate."""
    trial.gradients()
    for group in optimizer.param_groups:
        group["lr"] = trial.config.training.learning_rate * group["lr_ratio"]
    optimizer.step()


def acts(trial):
    """Other factors, another answer. From here on the factors B are no longer near zero."""
    layers = [layer for layer in lora_layers(trial.task.model).values() if isinstance(layer, LoRALinear)]
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
        return ".lora_" in name or name.startswith("head.") or ends_with_one(name.rpartition(".")[0], lora.modules_to_save)

    tensors = {name: p for name, p in trial.task.named_parameters() if p.is_floating_point()}
    wanted = {name for name in tensors if meant(name)}
    strange = sorted(name for name, gradient in gradients.items() if name not in wanted)
    missing = sorted(name for name in wanted if gradients.get(name) is None)
    zero = sorted(name for name in wanted - {*missing} if not gradients[name].any())
    if strange:
        return FAIL, f"gradients for what is to stay as it is: {', '.join(strange[:5])}; {OUR_FAULT}"
    if missing or any(".lora_" in name for name in zero):
        return FAIL, f"of {len(wanted)} get no gradient: {', '.join([*missing, *zero][:5])}; {OUR_FAULT}"
    if zero:
        return WARN, f"the gradient is 0 of {', '.join(zero[:5])}: these rows do not need them (experts nobody is sent to?)"
    return PASS, f"all {len(wanted)} that are meant to be trained get one, the other {len(tensors) - len(wanted)} none"


def loss_of_targets(trial):
    """The loss of a step is the sum over its targets divided by their number, recomputed from what the head says."""
    batch = trial.batch.to(trial.device)
    each = losses(trial.task.head, trial.outputs()[1], batch.targets) * batch.weights
    expected, found = each.double().mean().item(), trial.gradients()[1]
    difference = abs(found - expected) / max(abs(expected), 1e-12)
    return judged(difference, trial.tolerance, f"{found:.6f} over {batch.num_targets} targets, relative difference")


def accumulated(trial):
    """Every row in a micro-batch of its own, against all in one."""
    found = apart(trial.gradients(trial.relaid(1))[0], trial.gradients()[0])
    return judged(found, trial.tolerance, "relative difference of the gradients")


def ranks(trial):
    """The gradients of two processes' parts, added in the other order, against those of one process."""
    parts = [trial.gradients(trial.relaid(rank=rank, world=2))[0] for rank in (1, 0)]
    summed = {n: None if g is None else g if parts[1][n] is None else g + parts[1][n] for n, g in parts[0].items()}
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
    trial.evaluate(trial.task, trial.data, trial.device, torch.float32)
    trial.task.eval()
    limit = 0.0 if trial.device.type == "cpu" else trial.tolerance  # on a GPU sums have no fixed order
    return judged(apart(trial.gradients()[0], before), limit, "relative difference of the gradients")


def resumed(trial):
    """Saved, loaded and gone on with, the next step is the next step, bit for bit (on a GPU to rounding)."""
    optimizer = optimizer_of(trial)
    update(trial, optimizer)
    with tempfile.TemporaryDirectory(prefix="plainlora_") as folder:
        checkpoint.save(folder, 1, trial.task, optimizer, {"val": None})
        update(trial, optimizer)
        after = {name: p.detach().clone() for name, p in checkpoint.trainable(trial.task).items()}
        optimizer = optimizer_of(trial)
        checkpoint.load(Path(folder) / "checkpoint_step_1", trial.task, optimizer)
    update(trial, optimizer)
    found = distance([*checkpoint.trainable(trial.task).values()], [*after.values()])
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
    changed = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    if changed:
        return FAIL, f"other than before: {', '.join(changed[:5])}; {OUR_FAULT}"
    return judged(distance(trial.outputs(), said), 0.0, f"{len(before)} tensors, largest difference")


def base_unchanged(trial):
    now = frozen_sums(trial.task.model)
    changed = sorted(name for name, total in trial.started.items() if now.get(name) != total)
    found = f"changed by training: {', '.join(changed[:5])}" if changed else f"{len(now)} frozen tensors are what they were"
    return required(not changed, found, OUR_FAULT) if now else None


def merged(trial):
    """Ends the trial: the adapter is folded into the model."""
    if not lora_layers(trial.task.model):
        return None
    before = trial.outputs()
    merge(trial.task.model)
    trial.task.float()
    return judged(distance(trial.outputs(), before), trial.tolerance, "largest difference")


DATA = {
    "targets": amount,
    "rows without a target": partial(share_of, "without_target", "have no target and are left out", "raise --max_length"),
    "rows cut off": partial(share_of, "cut", "are cut off at max_length", "raise --max_length, or split them"),
    "duplicates": partial(share_of, "repeated", "are there before, word for word", "take them out, or give them a weight"),
    "train and eval apart": overlap,
    "doubled BOS": beginnings,
    "trained end token": ends,
    "special tokens in texts": special_tokens,
    "target mask": mask,
    "labels": labels,
}
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


def run(opening, task, source, rows, facts, config, device, backward, evaluate):
    """Print `opening` and all lines. Raises Stopped where one says FAIL. rows, facts: the training rows, of `tokenised`."""
    print(opening)
    note = cut(task)
    trial = Trial(task, source, rows, facts, config, device, backward, evaluate)
    failed = list(failing(trial, DATA))
    print()
    for example, rendered in trial.sample[:3]:
        print(f"--- {example.where}")
        print("\n".join(shown(row, task.tokenizer, sys.stdout.isatty()).rstrip("\n") for row in rendered.rows[:3]))
    used = f"{len(trial.few)} training rows of {len(trial.few.tokens)} tokens"
    print(f"\n{note + '; ' if note else ''}equalities on {used}, in fp32:")
    failed += failing(trial, MODEL)
    if failed:
        raise Stopped(f"--check: {len(failed)} failed: {', '.join(failed)}.")
    print("nothing failed")


def failing(trial, checks):
    """Print the lines of some checks; yields the names of those that failed, or ended in an error."""
    for name, check in checks.items():
        try:
            result = check(trial)
        except Exception as error:
            result = FAIL, f"ends in {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if result:
            print(f"{result[0]}  {name}: {result[1]}", flush=True)
        if result and result[0] == FAIL:
            yield name
