"""Hugging Face Trainer + PEFT = ours: the same adapter, head, data and order give the same losses,
step by step.
"""

import json

import torch


def test_twenty_steps_beside_trainer_and_peft_agree(configure, tiny_encoder, tmp_path):
    from benchmarks.stsb_peft import ours, theirs  # imports Trainer, which takes seconds

    letters, rows = "abcdefghijklmnopqrstuvwxyz", []
    generator = torch.Generator().manual_seed(0)
    for _ in range(70):
        lengths, score = (
            torch.randint(1, 9, (2,), generator=generator).tolist(),
            torch.rand(1, generator=generator).item(),
        )
        first, second = (
            " ".join(letters[i] for i in torch.randint(26, (n,), generator=generator))
            for n in lengths
        )
        rows.append({"sentence1": first, "sentence2": second, "score": score})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = configure(
        True,
        base_model=str(tiny_encoder),
        train_data=[str(tmp_path / "pairs.jsonl")],
        eval_data=[],
        batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=20,
        warmup_steps=4,
        eval_steps=1000,
        output_dir=str(tmp_path / "ours"),
    )
    losses, dev, _, start = ours(config, dropout=0.0)
    peers, peers_dev, _ = theirs(config, start, 0.0, len(losses), tmp_path / "peft")
    assert max(losses) - min(losses) > 0.01
    # Padded against packed: fp32 sums in another order, carried through 20 updates.
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(peers), rtol=0, atol=1e-5)
    # Of few, near-equal scores, which magnify such differences
    assert abs(dev["pearson"] - peers_dev["pearson"]) < 1e-3
