"""Where the metrics go beside the run's own file (`--report_to`): TensorBoard, Weights & Biases."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
import secrets

from lora.common.atomic_files import write_text_atomically
from lora.common.errors import Interrupted
from lora.common.plain_file import plain_file
from lora.config.schema import Config


@dataclass
class Tracker:
    """Sends the metrics to one service. An error there ends this tracker, and not the run."""

    name: str  # tensorboard or wandb
    run_dir: Path
    config: Config
    start: int  # the step at which the run begins
    say: Callable[[str], None]  # writes a line to the log
    send: Callable | None = None  # made at the first metrics, as `end` is
    end: Callable | None = None
    failed: bool = False

    def metrics(self, step: int, values: dict[str, float]) -> None:
        if self.failed:
            return
        connect = tensorboard if self.name == "tensorboard" else wandb
        try:
            if self.send is None:
                self.send, self.end = connect(self.run_dir, self.config, self.start)
            self.send(step, values)
        except Exception as error:  # anything may fail: another's package, the network, a service
            self.give_up(error)

    def finish(self, exit_code: int) -> None:
        """End the run at the service, as one that has failed unless `exit_code` is 0."""
        if self.end is None or self.failed:
            return
        try:
            self.end(exit_code)
        except Interrupted:
            raise
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.failed = True
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self.say(f"report_to {self.name}: {text}; the run goes on without it")


def tensorboard(run_dir: Path, config: Config, start: int) -> tuple[Callable, Callable]:
    """Return functions that write metrics to RUN/tensorboard, and that end it."""
    from torch.utils.tensorboard import SummaryWriter

    # What a resumed run writes again takes the place of what was there.
    purge_step = start + 1 if start else 0
    writer = SummaryWriter(run_dir / "tensorboard", purge_step=purge_step)

    def send(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, lambda exit_code: writer.close()


def wandb(run_dir: Path, config: Config, start: int) -> tuple[Callable, Callable]:
    """Return functions that send metrics to the project of WANDB_PROJECT and WANDB_ENTITY, and that
    end the run there.
    """
    import wandb as package

    id_file = run_dir / "logs" / "wandb_id"
    if start == 0 or not id_file.is_file():
        write_text_atomically(id_file, secrets.token_hex(8))
    run = package.init(
        name=run_dir.name,
        id=plain_file(id_file).read_text(encoding="utf-8"),
        resume="allow",  # a resumed run continues the same one
        reinit="create_new",  # beside one that the caller of lora.train may have
        dir=run_dir / "logs",
        config=config.as_dict(),
        settings=package.Settings(init_timeout=30),
    )
    return lambda step, values: run.log(values, step=step), run.finish
