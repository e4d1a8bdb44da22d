"""The learning rates that the tensors of an adapter get."""

from safetensors.torch import load_file
import torch

from tests.conftest import run


def test_with_loraplus_b_learns_as_many_times_faster_as_it_says(configure, tiny_base):
    """Adam's first update is the learning rate, in the direction of the sign."""
    first = {}
    for ratio in (1.0, 16.0):
        settings = dict(max_steps=1, warmup_steps=0, learning_rate=1e-3, loraplus_lr_ratio=ratio, name=f"ratio_{ratio}")
        folder = run(configure(True, **settings)) / "checkpoints" / "checkpoint_step_1"
        adapter = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
        first[ratio] = torch.cat([tensor.flatten() for name, tensor in adapter.items() if "lora_B" in name]).abs().max()
        head = load_file(folder / "mlp_head.safetensors")
        first[ratio, "head"] = head["layers.3.bias"]
    torch.testing.assert_close(first[1.0], torch.tensor(1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(first[16.0], torch.tensor(16e-3), rtol=1e-3, atol=0)
    assert torch.equal(first[1.0, "head"], first[16.0, "head"])
