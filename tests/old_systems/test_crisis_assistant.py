"""4. QLoRA of Mistral-7B: one YAML file, and --model-name for the name of the run."""

from lora.config import cross_checks
from tests.old_systems.conftest import losses

CONFIG = """
model:
  base_model: embedded
data:
  dataset: chats.jsonl
  max_samples: 500
training:
  num_epochs: 3
  learning_rate: 2e-4
  batch_size: 2
  gradient_accumulation: 2
  warmup_steps: 0
  save_steps: 50
  save_total_limit: 2
  report_to: ["wandb"]
"""
FLAGS = ["--config", "config.yaml", "--output-dir=outputs"]


def test_their_yaml_trains_under_the_name_of_the_run(call, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    flags = [*FLAGS, "--report-to=none", "--eval_data=more_chats.jsonl", "--logging-steps=1"]
    status, printed = call(
        "train_lora.py", *flags, "--max_steps=1", "--experiment_name=crisis_agent_v2"
    )
    assert status == 0, printed
    assert "1 steps of 4 examples" in printed and "/checkpoint_step_1: " in printed
    run = tmp_path / "outputs" / "crisis_agent_v2"
    assert len(losses(run)) == 1 and list((run / "logs").glob("train_*.log"))


def test_what_their_commands_mean_is_asked_in_one_line(call, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr(cross_checks, "find_spec", lambda name: None)
    their_checkpoint = "outputs/checkpoints/checkpoint-500"
    for flags, line in (
        ([], "report_to wandb: the package is not there: pip install 'plainlora[wandb]'."),
        (
            ["--model-name", "crisis_agent_v2"],
            "model_name crisis_agent_v2: no folder, no Hub name OWNER/NAME; "
            "is base_model or experiment_name meant?",
        ),
        (
            ["--resume-from", their_checkpoint],
            f"--resume_from {their_checkpoint}: another trainer's, which is not read; start from "
            "its adapter with --init_from, or name its model as --base_model.",
        ),
    ):
        status, printed = call("train_lora.py", *FLAGS, *flags)
        assert status == 2 and printed.splitlines()[-1] == f"error: {line}"
        assert not (tmp_path / "outputs").exists()
