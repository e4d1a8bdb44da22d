"""Training, evaluation and generation from Python, and checks of adapters.

`lora.train(config)` is what train.py or train_lora.py does, `lora.evaluate(folder)` is eval.py: the
scripts are imported from where the command `plainlora` finds them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
import gc
import importlib
from pathlib import Path
import sys
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from lora.adapter import load_adapter
from lora.common.errors import Stopped, UserError
from lora.common.exit_status import require_one_process
from lora.common.known_errors import as_known_error, error_line
from lora.common.paths import SCRIPTS
from lora.config.command_line import Command, read_command_line
from lora.config.schema import Config, EvaluationConfig, get_lora_config
from lora.config.set_keys import set_key
from lora.data.raw_data import RawData
from lora.evaluation.generate import generate_answers, prompt_tokens
from lora.evaluation.text_metrics import check_settings
from lora.export.merging import class_for, find_adapter
from lora.layer import lora_layers
from lora.model.device import choose_device, choose_dtype
from lora.model.first_layers import cut_above
from lora.model.weights import add_tokens, four_bits, load_shape, load_weights
from lora.training.base_integrity import only_adapters_train


def import_script(name: str) -> ModuleType:
    """Import train, train_lora or eval. Raises UserError where another module has its name."""
    names = ["train", name] if name == "train_lora" else [name]  # train_lora.py imports train.py
    sys.path.insert(0, str(SCRIPTS))  # the current folder may hold another train.py
    try:
        for script_name in names:
            script = importlib.import_module(script_name)
            file = getattr(script, "__file__", None)
            if file is None or Path(file).resolve().parent != SCRIPTS:
                found = f"a module {script_name} of your own is imported already ({file})"
                raise UserError(f"{found}, so plainlora's cannot be; give yours another name.")
    finally:
        sys.path.remove(str(SCRIPTS))
    return script


@contextmanager
def callers_random_numbers_kept() -> Iterator[None]:
    """Seed torch's generators for a run alone: the caller's next draws are as without it."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    try:
        with torch.random.fork_rng(range(num_gpus), device_type="cuda"):
            yield
    finally:
        if num_gpus == 0:  # a GPU that was not used yet begins with the caller's seed
            torch.cuda.manual_seed_all(torch.initial_seed())


@callers_random_numbers_kept()
def train(config: Config, resume_from: str | Path = "") -> dict | None:
    """Train all weights, or with a [lora] table the adapter, and write the run's folder.

    Args:
        config: checked as the configuration in a file is, and not changed.
        resume_from: a checkpoint, or "auto", as for the scripts.

    Returns:
        What logs/final_results.json holds; under torchrun None on every rank but the first.

    Raises:
        UserError: for what a script would report in one line. status.json is written as there.
    """
    script = import_script("train_lora" if config.lora else "train")
    command = command_for(config, str(resume_from))
    raw_data = RawData(command.config)
    command.require_same(raw_data.files)
    num_threads = torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        results = script.main(command, raw_data)
    except BaseException as error:
        known = as_known_error(error)
        line = error_line(known, None) if known else f"{type(error).__name__}: {error}"
        command.status.write(known.status if known else 1, line, **getattr(known, "facts", {}))
        if isinstance(error, Exception) and known and known is not error:
            raise known from error
        raise
    finally:  # the next run of this process must not depend on this one
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warned_only)
        torch.set_num_threads(num_threads)
        gc.collect()  # layers that are wrapped hold themselves, and so the weights
    if results is not None:
        command.status.write(0)
    return results


def command_for(config: Config, resume_from: str) -> Command:
    """Return what a script would do with a file that holds this configuration."""
    if config.training.max_grad_norm is None:
        raise UserError("max_grad_norm is None: expected a number >= 0; 0 is no clipping.")
    defaults = get_lora_config() if config.lora else Config()
    with TemporaryDirectory() as folder:
        # A run without experiment_name is called after its file, and here after its base.
        file = Path(folder) / f"{Path(config.model.base_model).name or 'config'}.json"
        config.save(file)
        argv = ["--config", str(file), "--resume_from", resume_from]
        try:
            return read_command_line(argv, defaults, "", "")
        except UserError as error:
            raise UserError(str(error).replace(f"{file}: ", "")) from None


@callers_random_numbers_kept()
def evaluate(
    folder: str | Path,
    eval_data: Sequence[str | Path] = (),
    test_set: str | Path = "",
    settings: EvaluationConfig | None = None,
    base_model: str = "",
) -> dict:
    """Evaluate a checkpoint, an artifact or a merged scorer as eval.py does; return the numbers.

    Args:
        eval_data: held-out files; without them and a test set, what the run held out.
        test_set: chats whose last answers are generated and measured, or steps to score.
        settings: the [evaluation] table; default: the run's.
        base_model: the base, where it does not lie where it was at training.
    """
    require_one_process()
    script = import_script("eval")
    argv = ["--checkpoint", str(folder)]
    if isinstance(eval_data, (str, Path)):
        eval_data = [eval_data]
    if eval_data:
        argv += ["--eval_data", *map(str, eval_data)]
    if test_set:
        argv += ["--test_set", str(test_set)]
    if base_model:
        argv += ["--base_model", str(base_model)]
    arguments, config = script.read_arguments(argv)
    if settings is not None:
        for name, value in vars(settings).items():
            set_key(config, name, value, f"settings.{name}")
        check_settings(config.evaluation)
    return script.main(arguments, config, script.read_request(arguments, config))


@callers_random_numbers_kept()
def generate(
    folder: str | Path,
    questions: Sequence[str],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[str]:
    """Return a language model's answers to questions, each of which begins a chat.

    The model is a checkpoint or an artifact, and is loaded once. Answers are greedy at temperature
    0; above it, the same questions get the same answers as long as the seed of the run is the same.
    """
    if isinstance(questions, str):
        raise UserError(f"questions is {questions[:40]!r}; expected a list of texts.")
    script = import_script("eval")
    sampling = [f"--temperature={temperature}", f"--top_p={top_p}"]
    argv = ["--checkpoint", str(folder), f"--max_new_tokens={max_new_tokens}", *sampling]
    arguments, config = script.read_arguments(argv)
    if config.model.task == "score":
        raise UserError(f"{folder}: a step scorer gives no answers; expected a language model.")
    device = choose_device(config.training.device)
    task = script.load(arguments.checkpoint, config, device)
    prompts = []
    for number, question in enumerate(questions, 1):
        messages = [{"role": "user", "content": question}]
        where = f"question {number}"
        prompts.append((where, prompt_tokens(where, messages, None, task.tokenizer)))
    return generate_answers(task, prompts, config, choose_dtype(config, device))


def verify_only_adapter_trainable(model: nn.Module, modules_to_save: Sequence[str] = ()) -> str:
    """Return a line that counts what is trained; raise Stopped where it is more than the adapter.

    The adapter is that of `inject` or `load_adapter`, and the modules to save belong to it.
    """
    if not lora_layers(model):
        raise Stopped("the model has no LoRA layers; inject() or load_adapter() puts them in.")
    return only_adapters_train(model, modules_to_save)


def load_and_verify_adapter(base_model: str | Path, folder: str | Path) -> PreTrainedModel:
    """Return a base with an adapter on it: ours or PEFT's, alone, in a checkpoint or an artifact.

    Every file that plainlora wrote must be as it was written, and the base must hold the
    weights that the adapter was trained on. Every tensor must have its place in the model. Nothing
    but the adapter requires gradients. The base is in the dtype of its files, or in 4 bits where
    the adapter was trained so. For a step scorer, the result is the model without its score head.

    Raises:
        UserError: what differs, in one line.
    """
    base_model = str(base_model)
    source = find_adapter(str(folder), base_model)
    if source.adapter_path is None:
        raise UserError(f"{folder}: only a score head, without an adapter; expected an adapter.")
    config = source.config or get_lora_config()
    warning = source.verify()
    if warning:
        raise UserError(f"{warning.removeprefix('warning: ')}; name that base.")
    shape, dtype, tokenizer = load_shape(base_model)
    model_class = AutoModel if source.is_scorer else class_for(shape)
    quantization = four_bits(config.lora, choose_device("auto"))
    model = load_weights(model_class, base_model, dtype, None, quantization)
    add_tokens(model, tokenizer, config.model.add_special_tokens)
    if config.model.score_layer:
        cut_above(model, config.model.score_layer)
    load_adapter(model, source.adapter_path)
    return model
