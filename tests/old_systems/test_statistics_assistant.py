"""3. QLoRA of Llama-3.2-3B-Instruct: a flat JSON file, and a config from Python."""

import json

from lora.config.schema import get_lora_config
from tests.conftest import run
from tests.old_systems.conftest import losses

CONFIG = {
    "model_name": "meta-llama/Llama-3.2-3B-Instruct",
    "num_train_epochs": 3,
    "learning_rate": "2e-4",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "max_seq_length": 256,
    "bf16": True,
    "gradient_checkpointing": True,
    "optim": "paged_adamw_8bit",
    "save_steps": 100,
    "save_total_limit": 3,
    "output_dir": "outputs",
    "lora": {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    "quantization": {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


def test_their_flat_json_trains_and_its_adapter_is_merged(call, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    status, printed = call(
        *("train_lora.py", "--config", "config.json", "--base_model=embedded", "--max_steps=2"),
        *("--train_data", "chats.jsonl", "more_chats.jsonl", "--data_weights", "2.0", "1.0"),
        *("--eval_data=more_chats.jsonl", "--experiment_name=qlora"),
    )
    assert status == 0, printed
    assert "computing in bfloat16" in printed and "in 4 bits (nf4)" in printed
    assert "note: config.json: 1 key needs nothing here: save_total_limit (" in printed
    artifact = tmp_path / "outputs" / "qlora" / "final_artifact"
    status, printed = call("merge.py", "--adapter", artifact, "--output=merged", "--dtype=float32")
    assert status == 0, printed
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_their_config_from_python(call, tmp_path):
    config = get_lora_config()
    config.model_name = "embedded"
    config.train_data = config.eval_data = ["chats.jsonl"]
    config.num_train_epochs = 5
    config.learning_rate = 1e-4
    config.per_device_train_batch_size = 4
    config.max_steps = 1
    config.logging_steps = 1
    config.max_seq_length = 128
    config.experiment_name = "python"
    folder = run(config)
    assert len(losses(folder)) == 1
    metrics = json.loads((folder / "logs" / "final_results.json").read_text())
    assert metrics["best"]["loss"] > 0
