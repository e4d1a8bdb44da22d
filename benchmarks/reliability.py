"""What docs/promises.md says of kills and faults: runs are killed, their files damaged, and
the ends compared.

    python benchmarks/reliability.py [--kills 50] [--only kills crash_points ...] [--seed 0]

Every run is a child forked from this process, which has loaded torch already, so that it takes a
second; several of them are the processes of one run. The model is a random Llama of 2 layers x 32.
What must hold after a resume: weights, optimizer and metrics of the undisturbed run, bit for bit.
"""

import argparse
from contextlib import contextmanager
from functools import partial
from itertools import count
import json
import math
import multiprocessing
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DEVICE_PREFERENCE": "cpu",
}

from common import ROOT, metrics, save_base
import torch

from lora.common.checksums import find_damage
from lora.common.errors import UserError
from lora.common.exit_status import one_line_errors
from lora.config.command_line import read_command_line
from lora.config.schema import Config, get_lora_config
from lora.data.raw_data import RawData
from lora.data.sampler import TrainingData
from lora.model.task import Task
from lora.training import best_checkpoints, checkpoint, startup
import train
import train_lora

torch.set_num_threads(1)
LAST = 12  # steps of a run; the data begin anew in the tenth
EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Bench:
    """A folder with a tiny base, in which runs are made and killed."""

    def __init__(self, folder, seed=0):
        self.folder, self.draw, self.numbers = Path(folder), random.Random(seed), count(1)
        os.environ["PLAINLORA_CACHE"] = str(self.folder / "cache")
        shape = dict(
            vocab_size=2048,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        save_base(self.folder / "base", seed=1, max_position_embeddings=512, **shape)
        self.undisturbed = {}
        self.reference("lora")  # in a child, which tokenises
        with quiet():  # and in this process, so that every child finds loaded what a run loads
            self.main("lora", "warm")

    def name(self):
        return f"run_{next(self.numbers)}"

    def flags(self, kind, name):
        """A run of 12 steps of 8 examples, saved at 4, 8, .. and evaluated at 3, 6, .."""
        shared = (
            f"--base_model {self.folder}/base --train_data arithmetic:train:64 --eval_data "
            f"arithmetic:validation:8 "
        )
        shared += (
            f"--max_length 100 --batch_size 1 --gradient_accumulation_steps 8 --max_steps "
            f"{LAST} --eval_steps 3 "
        )
        shared += "--save_steps 4 --logging_steps 1 --learning_rate 1e-2 --resume_from auto "
        return [
            *shared.split(),
            f"--output_dir={self.folder}",
            f"--experiment_name={name}",
            *KINDS[kind],
        ]

    def main(self, kind, name, more=()):
        """What `python train_lora.py` or `train.py` does."""
        lora = "full" not in kind
        with one_line_errors():
            config = get_lora_config() if lora else Config()
            command = read_command_line([*self.flags(kind, name), *more], config, "unused.toml", "")
            source = RawData(command.config)
            command.require_same(source.files)
        with one_line_errors(command.status):
            (train_lora if lora else train).main(command, source)

    def start(self, kind, name, prepare=lambda rank: None, world=1, more=()):
        """The processes of a run. `prepare` is called in each of them first."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def child(rank):
            if world > 1:
                values = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": world,
                    "LOCAL_WORLD_SIZE": world,
                }
                os.environ |= {k: str(v) for k, v in values.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            prepare(rank)
            self.main(kind, name, more)

        return [
            forked(self.folder / f"{name}_{rank}.txt", partial(child, rank))
            for rank in range(world)
        ]

    def run(self, *arguments, **named):
        """`start`, and the exit status of each process."""
        return ended(self.start(*arguments, **named))

    def reference(self, kind, world=1):
        """What an undisturbed run of this kind ends with."""
        if (kind, world) not in self.undisturbed:
            name = self.name()
            statuses = self.run(kind, name, world=world)
            assert statuses == [0] * world, (self.folder / f"{name}_0.txt").read_text()
            self.undisturbed[kind, world] = self.result(name)
        return self.undisturbed[kind, world]

    def result(self, name):
        """Weights, optimizer, metrics and artifact of a run, without what a clock decides."""
        run = self.folder / name
        last = run / "checkpoints" / f"checkpoint_step_{LAST}"
        tensors = [
            p for place in (last, run / "final_artifact") for p in place.rglob("*.safetensors")
        ]
        timing = ("timestamp", "train/tokens_per_second")
        lines = [
            {key: value for key, value in line.items() if key not in timing}
            for line in metrics(run)
        ]
        state = best_checkpoints.trainer_state(last)
        state["totals"] = state["totals"]["tokens"]  # the others are seconds and peak memory
        results = json.loads((run / "logs" / "final_results.json").read_text())
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        files = {str(path.relative_to(run)): path.read_bytes() for path in tensors}
        return (
            files,
            lines,
            {k: v for k, v in state.items() if k != "config"},
            results["best"],
            kept,
        )

    def finish(self, kind, name, world=1):
        """Resume until the run ends by itself; whether it ended as the undisturbed one did. The
        folder goes.
        """
        statuses = self.run(kind, name, world=world)
        same = statuses == [0] * world and self.result(name) == self.reference(kind, world)
        if same:  # else it is kept, to be looked at
            shutil.rmtree(self.folder / name)
        else:
            print(
                f"    {self.folder / name} did not end as it should: {statuses} {self.said(name)}",
                flush=True,
            )
        return same

    def said(self, name):
        """The end of what the first process of a run printed."""
        return (self.folder / f"{name}_0.txt").read_text()[-1500:]

    def whole(self, name):
        """The steps of the checkpoints of a run, each of which is as it was written, or None."""
        found = list((self.folder / name / "checkpoints").glob("checkpoint_step_*"))
        if any(find_damage(path, "trainer_state.json") for path in found):
            return None
        return sorted(int(path.name.rpartition("_")[2]) for path in found)


SCORE, BFLOAT16 = ["--task", "score"], ["--dtype", "bfloat16"]
KINDS = {
    "lora": ["--task", "lm", "--lora_dropout", "0.1"],
    "lora bfloat16": ["--task", "lm", "--lora_dropout", "0.1", *BFLOAT16],
    "scorer": [*SCORE, "--head_dropout", "0.1"],
    "scorer bfloat16": [*SCORE, "--head_dropout", "0.1", *BFLOAT16],
    "qlora": ["--task", "lm", "--load_in_4bit", "--bnb_4bit_compute_dtype", "float32"],
    "qlora bfloat16": ["--task", "lm", "--load_in_4bit", *BFLOAT16],
    "full": ["--task", "lm"],
    "full bfloat16": ["--task", "lm", *BFLOAT16],
}


def forked(path, call):
    """A process that does `call()` and ends; what it prints goes to the end of a file."""

    def child():
        silence(path)
        # Makes torch's pool of threads anew, for which the threads that load weights would race
        # ("Invalid thread pool!").
        torch.set_num_threads(1)
        call()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def ended(processes):
    """Their exit statuses, once all have ended; negative where a signal ended one."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def silence(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


@contextmanager
def quiet():
    kept = os.dup(1), os.dup(2)
    silence(os.devnull)
    try:
        yield
    finally:
        for stream, descriptor in zip((1, 2), kept):
            os.dup2(descriptor, stream)
            os.close(descriptor)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------ what is tried


def kills(bench, count):
    """SIGKILL at random moments of runs that are resumed until they end."""
    began = time.monotonic()
    assert bench.run("lora", "timed") == [0]
    duration = time.monotonic() - began
    done, lost, unreadable, too_many, different, runs = 0, 0, 0, 0, 0, 0
    while done < count:
        name, before, runs = bench.name(), [], runs + 1
        for _ in range(min(5, count - done)):
            (child,) = bench.start(
                "lora", name, partial(report_kept, bench.folder / f"{name}_kept")
            )
            time.sleep(bench.draw.uniform(0, duration / 2))
            child.kill()
            child.join()
            done += 1
            now = bench.whole(name)
            unreadable += now is None
            lost += bool(before) and (not now or max(now) < max(before))
            before = now or before
        reports = bench.folder / f"{name}_kept"
        too_many += sum(
            int(line) > 4 for line in (reports.read_text().split() if reports.exists() else [])
        )
        different += not bench.finish("lora", name)
    failed = lost + unreadable + too_many + different
    text = (
        f"{runs} runs resumed to the end, {different} ended otherwise than undisturbed; "
        f"{lost} checkpoints lost, "
    )
    return (
        done,
        done - failed,
        text + f"{unreadable} unreadable under a final name, {too_many} restarts with more than 4",
    )


def report_kept(path, rank):
    """Write how many checkpoints there are once a restart has cleared what the run before left."""
    undisturbed = startup.recover

    def recover(run_dir, step):
        said = undisturbed(run_dir, step)
        with open(path, "a") as file:
            file.write(f"{len(list((run_dir / 'checkpoints').glob('*')))}\n")
        return said

    startup.recover = recover


def crash_points(bench, stride):
    """SIGKILL before every mkdir, open for writing, fsync, rename, unlink and rmdir in the folder
    of a run, and with every file that is being made durable cut to half its length: up to the
    second checkpoint, and after the last step.
    """
    counted = bench.folder / "points"
    bench.run("lora", "counted", partial(crash_at, bench.folder / "counted", None, counted))
    points = range(1, int(counted.read_text()) + 1, stride)
    passed = 0
    for point in points:
        name = bench.name()
        killed = bench.run("lora", name, partial(crash_at, bench.folder / name, point, counted))
        passed += (
            killed == [-signal.SIGKILL]
            and bench.whole(name) is not None
            and bench.finish("lora", name)
        )
    return len(points), passed, "every checkpoint whole, every run resumed to the undisturbed end"


def crash_at(folder, point, report, rank):
    """End this process at its `point`-th call that changes something in `folder`; write down how
    many there are.
    """
    reached, step, inside, batch_at = 0, None, False, TrainingData.batch_at

    def batch_of(self, asked):
        nonlocal step
        step = asked
        return batch_at(self, asked)

    def here(before_death=lambda: None):
        nonlocal reached
        if step is not None and 4 <= step < LAST - 1:
            return
        reached += 1
        if point is None:
            report.write_text(str(reached))
        elif reached == point:
            before_death()
            die()

    def hook(event, arguments):
        nonlocal inside
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (
            inside
            or not (writes or event in EVENTS)
            or not str(arguments[0]).startswith(str(folder))
        ):
            return
        inside = True
        here()
        inside = False

    TrainingData.batch_at = batch_of
    sync = os.fsync

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(str(folder)):
            here()
            if os.path.isfile(path):
                here(lambda: os.truncate(path, os.path.getsize(path) // 2))
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def damaged_checkpoints(bench, stride):
    """A flipped bit, or a file cut short, in the newest checkpoint: `auto` takes the one before, by
    name it is refused.
    """
    bench.reference("lora")
    name = bench.name()
    bench.run("lora", name)
    folder = bench.folder / name / "checkpoints"
    states = best_checkpoints.saved_states(folder)
    newest, before = states[-1]["path"], states[-2]["path"]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    flags = bench.flags("lora", name)
    by_name = [str(newest) if flag == "auto" else flag for flag in flags]
    passed = 0
    flips, truncations = math.ceil(200 / stride), math.ceil(50 / stride)
    for i in range(flips + truncations):
        path = bench.draw.choice(files)
        content = path.read_bytes()
        place, bit = bench.draw.randrange(len(content)), bench.draw.randrange(8)
        flipped = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
        path.write_bytes(flipped if i < flips else content[:place])
        fallback = read_command_line(flags, get_lora_config(), "", "").resume_from == str(before)
        try:
            read_command_line(by_name, get_lora_config(), "", "")
        except UserError as error:
            passed += fallback and "damaged" in str(error)
        path.write_bytes(content)
    return flips + truncations, passed, f"{flips} flipped bits, {truncations} truncations"


def full_disk(bench, stride):
    """No file may grow beyond a size any more (RLIMIT_FSIZE) once the first checkpoint is there:
    exit 4, which verifies.
    """
    passed, sizes = 0, math.ceil(20 / stride)
    largest = max(len(content) for content in bench.reference("lora")[0].values())
    for i in range(sizes):
        name = bench.name()
        limit = 8192 + (largest - 8193) * i // max(1, sizes - 1)  # what a run prints has room
        statuses = bench.run("lora", name, partial(limit_files, limit))
        passed += statuses == [4] and bool(bench.whole(name)) and bench.finish("lora", name)
    return (
        sizes,
        passed,
        "exit 4, the checkpoints before verify, the resumed run ends as the undisturbed one",
    )


def limit_files(limit, rank):
    undisturbed = best_checkpoints.prune

    def prune(folder):
        undisturbed(folder)
        if best_checkpoints.saved_states(folder):
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )

    best_checkpoints.prune = prune


def resumes(bench, stride):
    """SIGKILL at chosen places of every kind of run."""
    places = {
        "mid-epoch": (TrainingData, "batch_at", 6),
        "mid-accumulation": (Task, "forward", 5 * 8 + 4),
        "at an epoch's end": (TrainingData, "batch_at", 11),
        "at an evaluation": (Task, "predict", 20),
    }
    worlds = {kind: (1, 2) if kind in ("lora", "full") else (1,) for kind in KINDS}
    cases = [(kind, world, where) for kind in KINDS for world in worlds[kind] for where in places][
        ::stride
    ]
    passed = 0
    for kind, world, where in cases:
        name = bench.name()
        killed = bench.run(
            kind, name, partial(at_call, *places[where], world - 1, die), world=world
        )
        good = killed[-1] == -signal.SIGKILL and bench.finish(kind, name, world)
        passed += good
        if not good:
            print(
                f"    {kind}, {where}, {world} processes: {killed} {bench.said(name)}", flush=True
            )
    return (
        len(cases),
        passed,
        f"{', '.join(KINDS)}; {', '.join(places)}; LoRA and full also on two processes",
    )


def at_call(owner, method, number, victim, what, rank):
    """If this process is the `victim`, have `what` done with the result of the `number`-th call of
    a method.
    """
    undisturbed, calls = getattr(owner, method), count(1)

    def counted(*arguments, **named):
        result = undisturbed(*arguments, **named)
        return what(result) if next(calls) == number and rank == victim else result

    setattr(owner, method, counted)


def signals(bench, stride):
    """SIGTERM or Ctrl-C at random moments of the training, to one process or to one of two."""
    total, passed, slowest = 0, 0, 0.0
    for world in (1, 2):
        for i in range(math.ceil(20 / stride)):
            name, number = bench.name(), (signal.SIGTERM, signal.SIGINT)[i % 2]
            children = bench.start("lora", name, world=world)
            path = bench.folder / name / "logs" / "train_metrics.jsonl"
            step = bench.draw.randrange(1, LAST - 3)
            while not (path.exists() and len(path.read_text().splitlines()) > step):
                time.sleep(0.002)
            time.sleep(bench.draw.uniform(0, 0.02))
            began = time.monotonic()
            os.kill(bench.draw.choice(children).pid, number)
            statuses = ended(children)
            slowest = max(slowest, time.monotonic() - began)
            total += 1
            saved, status = (
                bench.whole(name),
                json.loads((bench.folder / name / "status.json").read_text()),
            )
            expected = {128 + number, 143}  # of two, one was told by the other
            passed += (
                {*statuses, status["exit"]} <= expected
                and bool(saved)
                and bench.finish("lora", name, world)
            )
    return total, passed, f"on one process and on two; saved and gone in {slowest:.1f} s at most"


def not_finite(bench):
    """A loss that is NaN on one process of two: both stop before the update, and with
    --skip_nonfinite 1 both go on.
    """
    poison = partial(
        at_call, Task, "forward", 50, 1, lambda result: (result[0] * math.nan, result[1])
    )
    name, tolerant = bench.name(), bench.name()
    statuses = bench.run("lora", name, poison, world=2)
    status = json.loads((bench.folder / name / "status.json").read_text())
    stopped = (
        statuses == [3, 3]
        and status["exit"] == 3
        and len(status["rows"]) == 16
        and status["step"] > 4
    )
    stopped = stopped and bench.whole(name) and max(bench.whole(name)) <= status["step"]
    went_on = bench.run("lora", tolerant, poison, world=2, more=["--skip_nonfinite", "1"]) == [0, 0]
    skipped = (
        best_checkpoints.saved_states(bench.folder / tolerant / "checkpoints")[-1]["skipped"] == 1
    )
    return (
        2,
        bool(stopped) + (went_on and skipped),
        "exit 3 on both, step and rows in status.json; or one step left out",
    )


def lost_process(bench, stride):
    """SIGKILL of one of two processes: the other one ends with status 4, and the run goes on to the
    undisturbed end.
    """
    repeats = math.ceil(5 / stride)
    passed, slowest = 0, 0.0
    for _ in range(repeats):
        name = bench.name()
        children = bench.start("lora", name, world=2)
        while not bench.whole(name):
            time.sleep(0.005)
        time.sleep(bench.draw.uniform(0, 0.2))
        began = time.monotonic()
        children[1].kill()
        statuses = ended(children)
        slowest = max(slowest, time.monotonic() - began)
        passed += statuses == [4, -signal.SIGKILL] and bench.finish("lora", name, 2)
    return repeats, passed, f"the other one exits with status 4, {slowest:.1f} s later at most"


NOWHERE = (
    "eval.py --checkpoint nowhere",
    "merge.py --adapter nowhere --output merged",
    "train_lora.py --resume_from nowhere",
    "-m lora compare nowhere",
    "-m lora report nowhere",
    "-m lora render nowhere --base_model embedded",
    "-m lora nothing",
)


def inputs(bench):
    """The bad inputs of tests/scripts/test_inputs.py that need no model, as users meet them, and
    folders that are not there: the time to the answer.
    """
    from tests.scripts.test_inputs import DATA, FLAGS

    calls, seconds, plain = [], [], bench.folder / "plain"
    plain.write_text("")
    for number, name, content, task, _ in DATA:
        data = bench.folder / f"{number}_{name}"
        data.write_bytes(content.encode() if isinstance(content, str) else content)
        named = ["--base_model", "embedded", "--train_data", str(data), "--task", task]
        calls.append(["train_lora.py", *named])
    for i, (_, flags, toml, _) in enumerate(FLAGS):
        path = bench.folder / f"{i}.toml"
        path.write_text(toml)
        named = [
            *("train_lora.py", "--base_model", "embedded"),
            *("--train_data", "arithmetic:train:9", "--config", str(path)),
        ]
        calls.append([*named, *(flag.format(file=plain) for flag in flags)])
    nowhere = [command.split() for command in NOWHERE]
    calls += nowhere
    # As a user's second call: what was compiled by the first one is kept.
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(bench.folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    run = partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    for call in [calls[0], *nowhere]:
        run([sys.executable, *call])
    for call in calls:
        began = time.monotonic()
        done = run([sys.executable, *call])
        seconds.append(time.monotonic() - began if done.returncode == 2 else math.inf)
        if seconds[-1] >= 0.3:
            print(f"    {seconds[-1]:.2f} s: {done.stderr.strip()[-150:]}")
    text = (
        f"answered in {statistics.median(seconds):.2f} s, {max(seconds):.2f} s at most; to "
        f"pass is 0.3 s"
    )
    return len(calls), sum(one < 0.3 for one in seconds), text


def overhead(bench):
    """What checkpoints cost the default LoRA run: one in 500 steps."""
    report = bench.folder / "overhead.json"
    flags = [
        "--config",
        str(ROOT / "configs" / "tiny_lora.toml"),
        "--output_dir",
        str(bench.folder),
        "--save_steps",
        "20",
    ]
    flags += ["--max_steps", "100", "--eval_steps", "100", "--logging_steps", "1"]
    command = read_command_line(
        [*flags, "--experiment_name", "overhead"], get_lora_config(), "", ""
    )

    def timed_run():
        took, save = [], checkpoint.save

        def timed(*arguments):
            began = time.monotonic()
            line = save(*arguments)
            took.append(time.monotonic() - began)
            report.write_text(json.dumps(took))
            return line

        checkpoint.save = timed
        train_lora.main(command, RawData(command.config))

    ended([forked(bench.folder / "overhead_0.txt", timed_run)])
    times = [line["timestamp"] for line in metrics(bench.folder / "overhead", "train/loss")]
    step = statistics.median(after - before for before, after in zip(times, times[1:]))
    save = statistics.median(json.loads(report.read_text()))
    share = save / (500 * step)
    text = (
        f"{1000 * save:.0f} ms a checkpoint, {1000 * step:.0f} ms a step: {share:.2%} at "
        f"save_steps 500"
    )
    return 1, int(share < 0.02), text


PARTS = {
    "kills": "SIGKILL at random moments",
    "crash_points": "SIGKILL at every call that changes the run's folder",
    "resumes": "resumed after a SIGKILL at a chosen place",
    "damaged_checkpoints": "damaged newest checkpoints found, the one before taken",
    "full_disk": "disk full, at as many sizes",
    "signals": "SIGTERM and Ctrl-C at random moments",
    "not_finite": "NaN on one process of two",
    "lost_process": "one process of two killed",
    "inputs": "bad flags and data, the time to the answer",
    "overhead": "time that checkpoints take",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--stride",
        type=int,
        default=1,
        help="an N-th of the crash points, resumes, signals, lost processes and faults of a disk",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--output", metavar="FILE", help="write the table to this file")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    folder = tempfile.mkdtemp(prefix="plainlora_reliability_")
    bench = Bench(folder, arguments.seed)
    counts = {
        "kills": [arguments.kills],
        "crash_points": [arguments.stride],
        "resumes": [arguments.stride],
        "signals": [arguments.stride],
        "lost_process": [arguments.stride],
        "damaged_checkpoints": [arguments.stride],
        "full_disk": [arguments.stride],
    }
    rows, failed = ["| what was tried | passed | | seconds |", "|---|---|---|---|"], 0
    for part in arguments.only:
        began = time.monotonic()
        total, passed, text = globals()[part](bench, *counts.get(part, []))
        failed += total - passed
        rows.append(
            f"| {PARTS[part]} | {passed} of {total} | {text} | {time.monotonic() - began:.0f} |"
        )
        print(rows[-1], flush=True)
    if arguments.output:
        command = (
            f"`python benchmarks/reliability.py --kills {arguments.kills} --only "
            f"{' '.join(arguments.only)}`"
        )
        said = f"By {command}, seed {arguments.seed}."
        Path(arguments.output).write_text("\n".join(["# Reliability", "", said, "", *rows]) + "\n")
    if not failed:
        shutil.rmtree(folder)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
