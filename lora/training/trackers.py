"""Where the metrics go beside the run's own file (`--report_to`): TensorBoard, Weights & Biases.

A tracker is a function of (step, {name: value}). Whatever goes wrong in one is said once, and the
run goes on without it.
"""

import hashlib


def tracker(name, run_dir, config, start, say):
    """The tracker called `name` for the run in `run_dir`, which begins at step `start`."""
    make, track = {"tensorboard": tensorboard, "wandb": wandb}[name], None

    def guarded(step, values):
        nonlocal make, track
        if make is None:
            return
        try:
            track = track or make(run_dir, config, start)
            track(step, values)
        except Exception as error:  # of a package of others, a network, a service
            make = None
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            say(f"report_to {name}: {text}; the run goes on without it")

    return guarded


def tensorboard(run_dir, config, start):
    """Writes to RUN/logs/tensorboard; what a resumed run writes again takes the place of what was
    there.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(
        run_dir / "logs" / "tensorboard", purge_step=start + 1 if start else None
    )

    def track(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def wandb(run_dir, config, start):
    """Sends to the project and entity of WANDB_PROJECT and WANDB_ENTITY; a resumed run goes on in
    the same one.
    """
    import wandb as package

    run = package.init(
        name=run_dir.name, id=hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16], resume="allow",
        dir=run_dir / "logs", config=config.as_dict(), settings=package.Settings(init_timeout=30),
    )  # fmt: skip
    return lambda step, values: run.log(values, step=step)
