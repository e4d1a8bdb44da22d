"""5. A scorer of steps, LoRA or full: a config from Python that is saved as JSON, and flags."""

import json

from lora import Config, get_lora_config
from tests.old_systems.conftest import losses

FLAGS = [
    *("--max_steps=1", "--learning_rate=1e-3", "--batch_size=2", "--logging_steps=1"),
    *("--eval_steps=1", "--save_steps=1", "--max_eval_batches=0"),
]


def set_up(config):
    """Their settings, by their names."""
    config.model.base_model = "embedded"
    config.model.task = "score"
    config.experiment_name = "phase1"
    config.training.learning_rate = 1e-4
    config.training.max_steps = 10_000
    config.training.warmup_steps = 0
    config.training.lr_scheduler_type = "cosine"
    config.training.max_grad_norm = 1.0
    config.training.per_device_train_batch_size = 4
    config.training.gradient_accumulation_steps = 1
    config.training.bf16 = False
    config.data.use_prm800k = config.data.use_reveal = config.data.use_eqasc = False
    config.data.prm800k_weight = 1.0
    config.data.reveal_weight = 0.5
    config.data.eqasc_weight = 0.5
    config.data.max_length = 256
    config.data.max_steps_per_example = 5
    config.data.train_data = ["arithmetic:train:20"]
    config.data.eval_data = ["arithmetic:validation:4"]
    return config


def test_two_phases_with_lora(call, tmp_path):
    config = set_up(get_lora_config())
    config.lora.lora_r = 8
    config.save("x.json")
    status, printed = call(
        "train_lora.py", "--config", "x.json", "--lora_r=4", "--lora_alpha=8", *FLAGS
    )
    assert status == 0, printed
    assert "New best validation loss: " in printed and "LoRA: rank 4, alpha 8" in printed
    run = tmp_path / "outputs" / "phase1"
    assert len(losses(run)) == 1
    lines = (run / "logs" / "train_metrics.jsonl").read_text().splitlines()
    keys = set().union(*[json.loads(line) for line in lines])
    assert {"step", "timestamp", "train/loss", "train/learning_rate"} <= keys
    assert {"val/mse", "val/mae", "val/r2"} <= keys
    checkpoint = run / "checkpoints" / "checkpoint_step_1"
    assert (checkpoint / "lora_adapter").is_dir()

    status, printed = call(
        *("train_lora.py", "--config", "x.json", "--lora_r=4", "--lora_alpha=8", *FLAGS),
        *("--init_from", checkpoint, "--experiment_name=phase2"),
    )
    assert status == 0, printed
    assert len(losses(tmp_path / "outputs" / "phase2")) == 1


def test_all_weights(call, tmp_path):
    set_up(Config()).save("x.json")
    status, printed = call("train.py", "--config", "x.json", *FLAGS)
    assert status == 0, printed
    run = tmp_path / "outputs" / "phase1"
    assert len(losses(run)) == 1
    assert (run / "checkpoints" / "checkpoint_step_1" / "backbone").is_dir()
