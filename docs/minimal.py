"""LoRA fine-tuning of a causal language model on chats: the whole method in one file.

    python docs/minimal.py --base_model assets/tiny_base --train_data assets/samples/chat.jsonl

The model is frozen. Beside each linear layer W [out, in] two small matrices A [r, in], B [out, r]
are trained, and the layer computes W x + (alpha / r) B A x (Hu et al. 2021, equation 3). The losses
are those of the package, which adds packing, evaluation, checkpoints, mixed precision and 4 bits.
"""

import argparse
import json
import math
from pathlib import Path

from safetensors.torch import save_file
import torch
from torch import nn
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable update of rank r. The names are those of PEFT."""

    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False)
        self.scaling = alpha / r
        # With B at zero, training starts from exactly what the base model computes. A is random,
        # because with both at zero neither would ever have a gradient.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scaling


def add_lora(model, r, alpha):
    """Freeze the model and wrap every linear layer except the output layer, in place."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, LoRALinear(module, r, alpha))


def save_adapter(model, folder, r, alpha):
    """Write A and B of every layer as an adapter that PEFT can load."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha}
    config["base_model_name_or_path"] = model.config.name_or_path
    config["target_modules"] = "all-linear"  # PEFT's word for the layers that add_lora wraps
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"base_model.model.{name}"] = parameter.detach()
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, Path(folder, "adapter_model.safetensors"))


def tokenize_chat(messages, tokenizer):
    """Return (input_ids, labels) of a chat; labels are -100 (no target) outside assistant turns."""
    render = tokenizer.apply_chat_template
    text = render(messages, tokenize=False)
    spans = []  # the characters of each assistant turn
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:i], tokenize=False, add_generation_prompt=True)
            turn = render(messages[: i + 1], tokenize=False)
            # The targets are what the turn adds to its prompt. A template that rewrites earlier
            # turns, for example to drop their reasoning, fails here; the package can handle it.
            assert turn.startswith(prompt) and text.startswith(turn), "the template rewrites turns"
            # The token that ends the turn is a target, so that the model learns to stop. The line
            # break that many templates write after it is not: generation has stopped by then.
            spans.append((len(prompt), len(turn.rstrip())))
    assert spans, "the chat has no assistant turn"

    # The text is tokenized as a whole, because the tokens of its parts can differ at the seams.
    # The template has written the special tokens, so the tokenizer must not add them again.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [-100] * len(encoding.input_ids)
    for i, (start, end) in enumerate(encoding.offset_mapping):
        if any(start < span_end and end > span_start for span_start, span_end in spans):
            labels[i] = encoding.input_ids[i]
    return torch.tensor(encoding.input_ids), torch.tensor(labels)


def learning_rate_at(step, max_steps, peak):
    """Linear warm-up from 0 over 5 % of the steps (at most 500), then a cosine down to 0."""
    warmup_steps = min(500, max_steps // 20)
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * progress)))


def train(model, examples, batches, learning_rate):
    """Take an optimizer step for each batch, a list of indices of examples; return the losses."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step, indices in enumerate(batches):
        batch = [examples[i] for i in indices]
        # The targets of all examples are counted first, and every sum of losses is divided by their
        # number. A mean of the examples' means would give the tokens of short answers more weight.
        num_targets = sum((labels[1:] != -100).sum().item() for _, labels in batch)
        step_loss = 0.0
        for input_ids, labels in batch:
            logits = model(input_ids[None].to(model.device), use_cache=False).logits[0]
            targets = labels[1:].to(model.device)  # the logits at i predict the token at i + 1
            loss = F.cross_entropy(logits[:-1], targets, reduction="sum") / num_targets
            loss.backward()  # adds to the gradients of the examples before it
            step_loss += loss.item()

        nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, len(batches), learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss)
        print(f"step {step + 1}: loss {step_loss:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base_model", required=True, help="folder or Hub name")
    parser.add_argument("--train_data", required=True, help='JSONL: {"messages": [...]} per line')
    parser.add_argument("--output_dir", default="outputs/minimal")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--lora_alpha", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4, help="chats per step")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    model = AutoModelForCausalLM.from_pretrained(args.base_model, dtype=torch.float32)
    add_lora(model, args.lora_r, args.lora_alpha)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with open(args.train_data, encoding="utf-8") as file:
        examples = [tokenize_chat(json.loads(line)["messages"], tokenizer) for line in file]
    batches = []  # one epoch after the other, each in an order of its own
    while len(batches) < args.max_steps:
        batches += torch.randperm(len(examples)).split(args.batch_size)
    train(model, examples, batches[: args.max_steps], args.learning_rate)
    save_adapter(model, args.output_dir, args.lora_r, args.lora_alpha)
