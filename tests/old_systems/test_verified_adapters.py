"""2. QLoRA of OLMo-7B-Instruct with adapters that are verified; one YAML file."""

from peft import PeftModel
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora import verify_artifact
from lora.common.base_model_files import EMBEDDED_BASE

CONFIG = """
model:
  base_model_id: "allenai/OLMo-7B-Instruct"
  trust_remote_code: true
  use_flash_attention: true
adapter:
  method: "qlora"
  lora:
    r: 16
    alpha: 32
    dropout: 0.05
    target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
training:
  num_train_epochs: 2
  learning_rate: 0.0002
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 16
  max_grad_norm: 1.0
  optim: "paged_adamw_8bit"
monitoring:
  wandb:
    enabled: false
    project: "adapters"
    entity: "team"
"""


def test_their_yaml_names_the_conversion_of_its_base_and_trains_another(call, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    flags = ["--config", "config.yaml", "--train-data=chats.jsonl", "--output-dir=outputs"]
    status, printed = call("train_lora.py", *flags)
    assert status == 2
    assert printed.splitlines()[-1] == (
        "error: base_model allenai/OLMo-7B-Instruct: needs code of its own; "
        "take allenai/OLMo-7B-Instruct-hf."
    )
    status, printed = call(
        *("train_lora.py", *flags, "--eval-data=more_chats.jsonl"),
        *("--model=embedded", "--max-steps=1", "--experiment-name=run"),
    )
    assert status == 0, printed
    assert "note: config.yaml: 4 keys need nothing here: model.trust_remote_code (" in printed
    assert "in 4 bits (nf4)" in printed and "LoRA: rank 16, alpha 32, on 42 layers" in printed
    for line in ("trainable parameters: ", "only adapter parameters are trainable", "unchanged"):
        assert line in printed

    # The artifact, by command and from Python.
    artifact = tmp_path / "outputs" / "run" / "final_artifact"
    assert call("eval.py", "--verify-only", "--artifact-dir", artifact)[0] == 0
    assert verify_artifact(artifact)
    (adapter,) = artifact.rglob("adapter_config.json")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE)
    model = PeftModel.from_pretrained(base, adapter.parent)
    tokens = AutoTokenizer.from_pretrained(EMBEDDED_BASE)("2+2", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "max_new_tokens": 4}
    torch.manual_seed(0)
    assert model.generate(**tokens, **sampling).shape[1] > tokens["input_ids"].shape[1]
    assert isinstance(model.merge_and_unload(), type(base))
