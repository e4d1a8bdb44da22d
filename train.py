"""Full fine-tuning, and the loop that every way of training here shares.

    python train.py --base_model FOLDER --train_data FILE [--config FILE] [--learning_rate 2e-5 ...]

The loop trains what requires grad. LoRA (train_lora.py) makes other tensors require grad, and that
is all the difference. A task is a module whose `forward(batch)` returns `(loss_sum, num_targets)`;
`data.batch_at(step)` gives the micro-batches of a step, a pure function of (seed, step). So the
state of a run is weights, optimizer, step.
"""

import sys

from lora.common.allocator import keep_memory
from lora.common.errors import Stopped, UserError
from lora.common.exit_status import one_line_errors
from lora.common.paths import ROOT
from lora.config.command_line import read_command_line
from lora.config.schema import Config
from lora.data.raw_data import Source

if __name__ == "__main__":
    # Above `import torch`: torch reads the allocators' settings when it is imported, and a mistake
    # in the command line or the data is reported before the seconds that importing torch takes.
    keep_memory()
    with one_line_errors():
        command = read_command_line(
            sys.argv[1:], Config(), ROOT / "configs" / "tiny_full.toml", "Full fine-tuning."
        )
        source = Source(command.config)
        command.require_same(source.files)

from functools import partial
import math
import time

import torch

from lora.common import signals
from lora.common.serialization import without_nan
from lora.data.sampler import TrainingData
from lora.data.token_cache import tokenised
from lora.distributed import collectives, process_group, sharding
from lora.evaluation.predict import evaluate, predict
from lora.export import artifact
from lora.model.device import choose_device, choose_dtype
from lora.model.load import load_task
from lora.model.placement import lay_out, prepare_layers
from lora.training import base_integrity, best_checkpoints, checkpoint
from lora.training.cached_features import keep_features
from lora.training.gradients import backward, sum_gradients
from lora.training.optimizer import make_optimizer, state_bytes
from lora.training.schedule import learning_rate_at, total_steps
from lora.training.startup import begin, describe_run


def train(task, data, config, log, device, dtype, total, facts, resume_from=""):
    """Train what requires grad in `task` on `data` for `total` steps, or from a checkpoint up to
    that step.

    `facts` (JSON) go into the checkpoints: what a run that goes on from one must have in common
    with this.
    """
    settings = config.training
    named = checkpoint.trainable(task)
    parameters = list(named.values())
    assert all(p.dtype == torch.float32 for p in parameters), "trained weights are fp32 masters"
    optimizer = make_optimizer(named, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    folder = log.run_dir / "checkpoints"

    step, resumed_at, without_best, skipped, stop = 0, None, 0, 0, False
    if resume_from:
        before = checkpoint.load(resume_from, task, optimizer)
        step = resumed_at = before["step"]
        without_best, skipped = before["without_best"], before["skipped"]
        scaler.load_state_dict(before["scaler"])
    # Of no checkpoints where a run branches off
    best_loss = collectives.of_first(best_checkpoints.best_loss, folder)

    def gradients(step):
        """Add the gradients of a step over all processes, in smaller micro-batches if memory runs
        out.

        Returns the loss, and whether a signal asks for the end.
        """
        while True:
            totals = backward(task, data, step, scaler, settings.seed, device, dtype)
            sum_gradients(parameters, totals)
            loss, out_of_memory, stop = totals.tolist()  # here the host waits for the device
            if not out_of_memory:
                return loss, stop > 0
            optimizer.zero_grad(set_to_none=True)
            log.say(data.halve(step))

    task.train()
    # The longest rows first, without an update, beside as much memory as the optimizer will take
    # from the first update on: what does not fit shows now and not after forty steps.
    optimizer_bytes = 0 if resume_from else state_bytes(parameters, settings.optimizer)
    reserved = torch.empty(optimizer_bytes, dtype=torch.int8, device=device)
    gradients(None)
    optimizer.zero_grad(set_to_none=True)
    del reserved
    log.start(step, total)
    while True:
        # 1. Evaluate and save first: step 0 shows the untrained model, and the last step is never
        # lost.
        last, metrics, save = step >= total, None, False
        if step != resumed_at and (last or step % settings.eval_steps == 0):
            metrics = evaluate(task, data, device, dtype, partial(log.examples, step))
            log.metrics(step, {f"val/{name}": value for name, value in metrics.items()})
        if metrics and step > 0:
            save = collectives.of_first(best_checkpoints.enters_best, folder, metrics["loss"])
            without_best += 1
            if metrics["loss"] < best_loss:
                best_loss, without_best = metrics["loss"], 0
                log.say(f"New best validation loss: {best_loss:.6f} at step {step}")
            if 0 < settings.early_stopping_patience <= without_best:
                log.say(f"Stopping at step {step}: {without_best} evaluations without a new best.")
                last = True
        if step not in (0, resumed_at) and (
            save or last or stop or step % config.output.save_steps == 0
        ):
            state = {
                "without_best": without_best,
                "skipped": skipped,
                "scaler": scaler.state_dict(),
            }
            state |= data.layout | {
                "config": config.as_dict(),
                "facts": facts,
                "val": metrics and without_nan(metrics),
            }
            checkpoint.save(folder, step, task, optimizer, state)
        if stop:
            raise signals.stopped(step)
        if last:
            break

        # 2. and 3. The gradients of this step's micro-batches, divided by the number of targets
        # over all of them.
        started = time.monotonic()
        loss, stop = gradients(step)

        # 4. Clip, stop (or skip the step) before the update if anything is not finite, set the
        # learning rate, step.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
        grad_norm = sharding.whole(norm).item()
        learning_rate = learning_rate_at(step, total, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]
        # Fp16: the scaler skips
        if math.isfinite(loss) and (scaler.is_enabled() or math.isfinite(grad_norm)):
            scaler.step(optimizer)
        else:
            found = f"step {step}: loss {loss}, gradient norm {grad_norm}"
            skipped += 1
            if skipped > settings.skip_nonfinite:
                mend = "Lower --learning_rate, look at its rows (in status.json), or allow N such steps: --skip_nonfinite N"
                rows = data.rows_at(step).tolist()
                raise Stopped(f"{found}; stopped before the update. {mend}.", step=step, rows=rows)
            log.say(
                f"{found}; the update is left out ({skipped} of {settings.skip_nonfinite} that may be)"
            )
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # 5. Log.
        log.count(step, data.size_at(step - 1), time.monotonic() - started, loss)
        if step % config.output.logging_steps == 0:
            values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
            log.metrics(step, {f"train/{name}": value for name, value in values.items()})


def run(task, command, source, device, dtype):
    """A whole run of a task that is ready to be trained: tokenise, train, keep the weights of the
    best validation loss.
    """
    config, started = command.config, time.monotonic()
    if config.model.init_from not in ("", "scratch") and not command.resume_from:
        task.start_from(config.model.init_from)
    rows, held_out, of_data = tokenised(source, task)
    before = best_checkpoints.read_state(command.resume_from) if command.resume_from else None
    data = TrainingData(
        rows, held_out, config, task.packed, process_group.rank(), process_group.world(), before
    )
    total = total_steps(config.training, data.steps_per_epoch)
    if before and before["step"] >= total and not command.auto:
        raise UserError(
            f"--resume_from {command.resume_from}: that run of {total} steps is complete; raise --max_steps."
        )
    prepare_layers(task.model, config.training)
    opening = describe_run(task, config, data, of_data, total, device, dtype)
    if command.check:
        from lora.preflight import check

        return check.run(opening, task, source, rows, of_data, config, device, backward, evaluate)
    if command.dry_run:
        from lora.preflight import dry_run

        return dry_run.dry_run(
            opening, task, data, config, total, device, dtype, backward, evaluate
        )
    lay_out(task, config, device, dtype)
    log, base, facts = begin(opening, task, command, source, before, device, dtype)
    keep_features(
        task,
        data,
        total,
        config,
        partial(predict, task, device=device, dtype=dtype, method="at_targets"),
    )
    with signals.watching():
        train(task, data, config, log, device, dtype, total, facts, command.resume_from)
    process_group.stop()
    if process_group.rank() > 0:
        return None
    log.say(base_integrity.compare(base, base_integrity.measure(task, config)))
    results = artifact.conclude(task, config, log, base["files"], source.files, device, started)
    log.close()
    return results


def main(command, source):
    device = choose_device(command.config.training.device)
    process_group.start(device)
    dtype = choose_dtype(command.config, device)
    task = load_task(command.config, torch.float32)
    return run(task, command, source, device, dtype)


if __name__ == "__main__":
    with one_line_errors():
        main(command, source)
