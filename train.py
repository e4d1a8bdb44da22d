"""Full fine-tuning, and the training loop that full fine-tuning, LoRA and QLoRA share.

    python train.py --base_model FOLDER --train_data FILE [--config FILE] [--learning_rate 2e-5 ...]

The loop trains whatever requires grad; train_lora.py makes other tensors require grad, and that is
the whole difference. A task is a module whose `forward(batch)` returns `(loss_sum, num_targets)`.
`data.batch_at(step)` gives the micro-batches of a step, a pure function of (seed, step). So the
state of a run is weights, optimizer and step, with a few counters and the loss scaler.
"""

import sys

from lora.common.allocator import keep_freed_memory
from lora.common.exit_status import one_line_errors
from lora.common.signals import StopSignal, begin_loading_torch, catch_signals
from lora.config.command_line import read_command_line
from lora.config.schema import Config
from lora.data.raw_data import RawData

if __name__ == "__main__":
    # Above `import torch`: torch reads the allocators' settings when it is imported, and a mistake
    # in the command line or the data is reported before the seconds that importing torch takes.
    keep_freed_memory()
    with one_line_errors():
        command = read_command_line(sys.argv[1:], Config(), "tiny_full.toml", "Full fine-tuning.")
        raw_data = RawData(command.config)
        command.require_same(raw_data.files)
    begin_loading_torch()

from concurrent.futures import Future
import math
import time

import torch

from lora.common.errors import Stopped, UserError
from lora.common.toml_json import without_nan
from lora.config.command_line import Command
from lora.data.sampler import TrainingData
from lora.data.token_cache import load_or_tokenise
from lora.distributed import process_group
from lora.distributed.sharding import full_tensor
from lora.evaluation.example_losses import save_example_losses
from lora.evaluation.predict import evaluate
from lora.export.final_artifact import finished_results, write_final_artifact
from lora.model.device import choose_device, choose_dtype
from lora.model.load import load_task
from lora.model.placement import place_on_device, prepare_layers
from lora.model.run import Run
from lora.model.task import Task
from lora.training import best_checkpoints, checkpoint, startup
from lora.training.base_integrity import compare_base, measure_base
from lora.training.description import describe_run
from lora.training.gradients import GradientAccumulation
from lora.training.log import Log
from lora.training.optimizer import make_optimizer, optimizer_bytes
from lora.training.schedule import learning_rate_at, stops_early, total_steps


def train(run: Run, log: Log, facts: dict, resume_from: str, stop_signal: StopSignal) -> None:
    """Train what requires grad, from the beginning or from a checkpoint.

    Args:
        run: the task, its data and its configuration.
        log: where metrics and messages go.
        facts: saved in every checkpoint, and compared when a run resumes one.
        resume_from: a checkpoint folder, or "".
        stop_signal: asks the run to end after a step.
    """
    task, config, data = run.task, run.config, run.data
    settings = config.training
    named_parameters = checkpoint.trainable_parameters(task)
    parameters = list(named_parameters.values())
    assert all(p.dtype == torch.float32 for p in parameters), "trained weights are fp32 masters"
    optimizer = make_optimizer(named_parameters, config, run.device)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    gradients = GradientAccumulation(run, scaler, stop_signal, log)
    max_steps = total_steps(settings, data.steps_per_epoch)
    folder = log.run_dir / "checkpoints"

    step, was_evaluated = 0, False
    finished_step = None  # its evaluation and checkpoint exist: a resumed run does not repeat them
    evaluations_without_best, skipped_steps = 0, 0
    if resume_from:
        state = checkpoint.load(resume_from, task, optimizer)
        step = state["step"]
        was_evaluated = state["val"] is not None
        # If the run ends at a checkpoint that was not evaluated, it is evaluated there first.
        finished_step = step if was_evaluated or step < max_steps else None
        evaluations_without_best, skipped_steps = state["without_best"], state["skipped"]
        if state["scaler"]:  # empty: it was not computed in float16
            scaler.load_state_dict(state["scaler"])
    best_losses = best_checkpoints.finite_losses(folder)
    if not best_losses:  # a run that is resumed into a new folder has no best checkpoint yet
        evaluations_without_best = 0
    # The run may have been killed after it stopped early and before its artifact was written.
    has_stopped = was_evaluated and stops_early(settings, evaluations_without_best)
    if has_stopped:
        log.say(f"this run stopped early at step {step}; raise --early_stopping_patience to go on")

    task.train()
    # The largest step is tried first: a run that does not fit in memory shows it before step 1. A
    # fresh run keeps room for what the optimizer takes at its first update.
    gradients.try_largest_step(
        reserved_bytes=0 if resume_from else optimizer_bytes(parameters, settings.optimizer)
    )
    stop = False
    while True:
        # 1. Evaluate and save first: step 0 shows the untrained model, and the last step is never
        # lost. A resumed run has done both at its first step.
        last = step >= max_steps or has_stopped
        metrics, is_among_best = None, False
        if step != finished_step and (last or step % settings.eval_steps == 0):
            metrics, batches, predictions = evaluate(run)
            save_example_losses(log.run_dir, step, run, batches, predictions)
            is_new_best = step > 0 and metrics["loss"] < min(best_losses, default=math.inf)
            log.evaluation(step, metrics, is_new_best)
            if step > 0:
                is_among_best = best_checkpoints.is_among_best(best_losses, metrics["loss"])
                evaluations_without_best = 0 if is_new_best else evaluations_without_best + 1
            if is_among_best:
                best_losses.append(metrics["loss"])
            if stops_early(settings, evaluations_without_best):
                without = f"{evaluations_without_best} evaluations without a new best"
                log.say(f"Stopping at step {step}: {without}.")
                last = True
        save_is_due = last or stop or step % config.output.save_steps == 0
        if (is_among_best or save_is_due) and step not in (0, finished_step):
            data.rows.check.require_undamaged()
            state = {
                "without_best": evaluations_without_best,
                "skipped": skipped_steps,
                "scaler": scaler.state_dict(),
                **data.layout,
                "config": config.as_dict(),
                "facts": facts,
                "totals": log.totals(run.device),
                "save_optimizer": config.save_optimizer,
                "val": metrics and without_nan(metrics),
            }
            with_optimizer = save_is_due or best_checkpoints.best_has_optimizer(folder, config)
            saved = optimizer if with_optimizer else None
            log.say(checkpoint.save(folder, step, task, saved, state))
        if stop:
            raise stop_signal.interrupted(step)
        if last:
            break

        # 2. Count the targets of this step's micro-batches over all processes. 3. Run backward on
        # (sum of losses) / (number of targets) for each micro-batch.
        started = log.begin_step()
        loss, stop = gradients.of_step(step)

        # 4. Clip the gradients, set the learning rate, and update the weights. If anything is not
        # finite, every process stops (or skips the step) before the update.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
        grad_norm = full_tensor(norm).item()
        learning_rate = learning_rate_at(step, max_steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]
        # In float16 the scaler itself skips an update whose gradients are not finite.
        may_update = math.isfinite(loss) and (scaler.is_enabled() or math.isfinite(grad_norm))
        if may_update:
            scaler.step(optimizer)
            if not math.isfinite(grad_norm):
                found = f"step {step}: gradient norm {grad_norm}"
                log.say(f"{found}; float16 skips the update and lowers its loss scale")
        else:
            skipped_steps += 1
            found = f"step {step}: loss {loss}, gradient norm {grad_norm}"
            if skipped_steps > settings.skip_nonfinite:
                raise Stopped(
                    f"{found}; stopped before the update. Lower --learning_rate, look at its rows "
                    "(in status.json), or allow N such steps: --skip_nonfinite N.",
                    step=step,
                    rows=data.rows_at(step).tolist(),
                )
            allowed = f"{skipped_steps} of at most {settings.skip_nonfinite}"
            log.say(f"{found}; the update is skipped ({allowed})")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # 5. Log.
        log.count(step, data.size_at(step - 1), time.perf_counter() - started, loss)
        if step % config.output.logging_steps == 0:
            log.training(step, loss, learning_rate, grad_norm)


def run_training(
    task: Task, command: Command, raw_data: RawData, hashing: Future[dict[str, str]] | None = None
) -> dict | None:
    """Tokenise, train, and write the artifact with the weights of the best validation loss.

    Args:
        hashing: the hashes of the base's weight files that `start_loading` has begun to compute.

    Returns:
        The results that final_results.json holds; None for --check and --dry_run, and on every
        rank but the first.
    """
    config, resume_from = command.config, command.resume_from
    # Not the task's own device: a dry run loads the base to the CPU.
    device = choose_device(config.training.device)
    dtype = choose_dtype(config, device)
    is_later_stage = config.model.init_from not in ("", "scratch") and not resume_from
    if is_later_stage and task.model.device.type != "meta":  # on "meta" they come later
        task.start_from(config.model.init_from)
    rows, held_out, data_facts = load_or_tokenise(raw_data, task)
    state = best_checkpoints.trainer_state(resume_from) if resume_from else None
    rank, world_size = process_group.rank(), process_group.world_size()
    # A resumed run keeps the layout of its batches, which stands in the checkpoint's state.
    data = TrainingData(rows, held_out, config, task.packed, rank, world_size, layout=state)
    run = Run(task, config, data, device, dtype)
    max_steps = total_steps(config.training, data.steps_per_epoch)
    if state and not command.dry_run:
        results = results_if_complete(command, state, max_steps)
        if results:
            print(f"{command.run_dir}: complete since step {state['step']}; nothing to do")
            process_group.leave()
            return results if rank == 0 else None
    checkpointing = startup.choose_checkpointing(run, state)
    prepare_layers(task.model, config.training, checkpointing)
    description = describe_run(run, data_facts, checkpointing)
    if command.check:
        from lora.preflight.check import check

        print(description)
        check(run, raw_data, data_facts)
        return None
    if command.dry_run:
        from lora.preflight.dry_run import dry_run

        print(description)
        dry_run(run)
        return None
    inputs = startup.input_facts(run, raw_data, data_facts)
    place_on_device(task, config, device, dtype)
    begun = startup.begin(run, command, inputs, state, hashing)
    with begun as (log, base, facts), rows.check:
        facts["gradient_checkpointing"] = checkpointing
        log.say(f"{description}\noutput: {log.run_dir}")
        if task.frozen:
            from lora.training.cached_features import cache_features

            cache_features(run, max_steps, log)
        with catch_signals() as stop_signal:
            train(run, log, facts, resume_from, stop_signal)
        process_group.leave()
        if rank > 0:
            return None
        log.say(compare_base(base, measure_base(task, config)))
        return write_final_artifact(run, log, base.files, raw_data.files)


def results_if_complete(command: Command, state: dict, max_steps: int) -> dict | None:
    """Return the results of a run that `--resume_from auto` finds complete, else None.

    Raises UserError where --resume_from names a checkpoint of a complete run.
    """
    training = command.config.training
    is_at_end = state["step"] >= max_steps
    if not (command.auto or is_at_end):
        return None
    results = finished_results(command.run_dir, command.config, state, max_steps)
    if results and command.auto:
        return results
    # A run that was stopped at its last step has yet to write its artifact.
    if is_at_end and (results or not command.continues):
        complete = f"that run of {max_steps} steps is complete"
        is_bound = training.max_steps == max_steps or not training.num_train_epochs
        flag = "--max_steps" if is_bound else "--num_train_epochs"
        raise UserError(f"--resume_from {command.resume_from}: {complete}; raise {flag}.")
    return None


def main(command: Command, raw_data: RawData) -> dict | None:
    device, dtype, hashing = startup.start_loading(command)
    if process_group.world_size() > 1:
        from lora.model.load_sharded import load_for_sharding

        task = load_for_sharding(command.config, dtype)
    else:
        task = load_task(command.config, torch.float32, device=device)
    return run_training(task, command, raw_data, hashing)


if __name__ == "__main__":
    with one_line_errors(command.status):
        main(command, raw_data)
