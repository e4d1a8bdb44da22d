"""1. A corpus is read on, then answers cite or refuse; three YAML files."""

from tests.old_systems.conftest import losses

PRETRAINING = """
model:
  model_name_or_path: embedded
  torch_dtype: float32
data:
  train_file: corpus.txt
  validation_split: 0.2
  block_size: 128
training:
  output_dir: outputs
  num_train_epochs: 1
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  learning_rate: 2e-5
  lr_scheduler_type: cosine
  warmup_ratio: 0.03
  weight_decay: 0.01
  logging_steps: 1
  save_steps: 500
  save_total_limit: 3
  seed: 42
  gradient_checkpointing: true
  dataloader_num_workers: 4
  report_to: tensorboard
  logging_dir: ./runs
"""
INSTRUCTION_TUNING = """
base_model: embedded
train_path: chats.jsonl
eval_path: more_chats.jsonl
max_seq_length: 128
learning_rate: "1e-4"
epochs: 1
batch_size: 2
grad_accum: 1
logging_steps: 1
optim: adamw_torch
lora:
  r: 8
  lora_alpha: 16
  lora_dropout: 0.05
  target_modules: q_proj,v_proj
  bias: none
  task_type: CAUSAL_LM
bnb:
  load_in_4bit: false
  bnb_4bit_quant_type: nf4
  bnb_4bit_compute_dtype: bf16
"""


def test_a_corpus_is_read_on_with_their_yaml(call, tmp_path, monkeypatch):
    (tmp_path / "pretrain.yaml").write_text(PRETRAINING)
    monkeypatch.setenv("DEVICE_PREFERENCE", "cpu")
    status, printed = call(
        "train.py", "--config", "pretrain.yaml", "--max_steps=1", "--experiment-name=corpus"
    )
    assert status == 0, printed
    run = tmp_path / "outputs" / "corpus"
    assert len(losses(run)) == 1 and list(run.rglob("events.out.tfevents*"))
    assert "note: pretrain.yaml: 3 keys need nothing here: training.save_total_limit" in printed


def test_answers_are_learned_with_their_yaml_and_measured(call, tmp_path, monkeypatch):
    (tmp_path / "sft.yml").write_text(INSTRUCTION_TUNING)
    monkeypatch.setenv("USE_BNB_QUANT", "true")  # weaker than the file
    status, printed = call(
        "train_lora.py", "--config", "sft.yml", "--max_steps=1", "--experiment_name=cite"
    )
    assert status == 0, printed
    assert "LoRA: rank 8, alpha 16, on 12 layers" in printed and "4 bits" not in printed
    artifact = tmp_path / "outputs" / "cite" / "final_artifact"
    status, printed = call(
        "eval.py", "--checkpoint", artifact, "--test_set=chats.jsonl", "--max_new_tokens=3"
    )
    assert status == 0 and "exact_answer" in printed
