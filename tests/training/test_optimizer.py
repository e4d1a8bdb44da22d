"""The learning rates of an adapter's tensors, and what the optimizer remembers of them."""

import pytest
from safetensors.torch import load_file, save_file
import torch

from lora.common.checksums import write_checksums
from lora.common.errors import UserError
from tests.conftest import run


def test_with_loraplus_b_learns_as_many_times_faster_as_it_says(configure):
    """Adam's first update is the learning rate, in the direction of the sign."""
    first = {}
    for ratio in (1.0, 16.0):
        settings = dict(
            max_steps=1,
            warmup_steps=0,
            learning_rate=1e-3,
            loraplus_lr_ratio=ratio,
            name=f"ratio_{ratio}",
        )
        folder = run(configure(True, **settings)) / "checkpoints" / "checkpoint_step_1"
        adapter = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
        first[ratio] = (
            torch.cat([tensor.flatten() for name, tensor in adapter.items() if "lora_B" in name])
            .abs()
            .max()
        )
        head = load_file(folder / "mlp_head.safetensors")
        first[ratio, "head"] = head["layers.3.bias"]
    torch.testing.assert_close(first[1.0], torch.tensor(1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(first[16.0], torch.tensor(16e-3), rtol=1e-3, atol=0)
    assert torch.equal(first[1.0, "head"], first[16.0, "head"])


@pytest.mark.parametrize("optimizer, state", [("adamw", "exp_avg"), ("adamw_8bit", "state1")])
@pytest.mark.parametrize("damage", ["smaller", "absent", "extra"])
def test_a_state_of_another_make_is_one_line(configure, optimizer, state, damage):
    config = configure(True, optimizer=optimizer, max_steps=2)
    path = run(config) / "checkpoints" / "checkpoint_step_2" / "optimizer.safetensors"
    tensors = load_file(path)
    key = f"model.layers.0.mlp.up_proj.lora_A.weight/{state}"
    if damage == "smaller":  # torch's fused step took it without a word
        tensors[key] = tensors[key][:1].clone()
    else:
        tensors[f"{key}s"] = tensors.pop(key) if damage == "absent" else tensors[key] + 1
    save_file(tensors, path, {"format": "pt"})
    write_checksums(path.parent)
    config.training.max_steps = 3
    with pytest.raises(
        UserError, match=f"not the optimizer's state of this model: .* another shape: .*{key}"
    ):
        run(config, resume_from=path.parent)
