"""The forms in which others keep a score head, written and gone on from: an MLPHead that says
exactly the same.

score.0, score.2    Linear - ReLU - Linear to two classes, whose softmax's second is the score
(Qwen2.5-Math-PRM, vLLM)
score               one linear layer to two classes (TRL's PRMTrainer)
v_head.summary      one linear layer under a sigmoid (Skywork-o1-Open-PRM)
two tokens          how much likelier a language model finds the first than the second
(Math-Shepherd's + and -)
"""

from safetensors import safe_open
import torch

from lora.common.errors import UserError


def tensors_of(files, prefix):
    """{name: tensor in fp32} of the tensors in safetensors files whose names begin with `prefix`."""
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {
                name: file.get_tensor(name).float()
                for name in file.keys()
                if name.startswith(prefix)
            }
    return found


def two_rows(head):
    """The MLPHead as two classes: softmax([0, z])[1] = sigmoid(z)."""
    first, last = head.layers[0], head.layers[3]
    rows = {name: torch.cat([torch.zeros_like(p), p]) for name, p in last.named_parameters()}
    return {f"score.0.{name}": p for name, p in first.named_parameters()} | {
        f"score.2.{n}": p for n, p in rows.items()
    }


def load_two_rows(head, files):
    """Take over score.0 and score.2, of which only the rows' difference counts. False where the
    files have none.
    """
    score = tensors_of(files, "score.")
    if len(score) != 4 or len(score.get("score.2.weight", ())) != 2:
        return False
    state = {f"0.{name}": score[f"score.0.{name}"] for name in ("weight", "bias")}
    last = {name: score[f"score.2.{name}"] for name in ("weight", "bias")}
    head.layers.load_state_dict(
        state | {f"3.{name}": rows[1:] - rows[:1] for name, rows in last.items()}
    )
    return True


@torch.no_grad()
def load_linear(head, direction, bias):
    """Take over z = direction [width] . h + bias [1], as z = relu(z) - relu(-z).

    The other hidden units keep their first layer and start without a say, so that they can learn
    one.
    """
    first, last = head.layers[0], head.layers[3]
    first.weight[:2], first.bias[:2] = torch.stack([direction, -direction]), 0.0
    last.weight.zero_()
    last.weight[0, :2] = torch.tensor([1.0, -1.0])
    last.bias.copy_(bias)


def initialise_head(task, files, tokens):
    """Begin with the score head among the base's weight files, if there is one; with `tokens`, two
    of its output layer.

    Raises UserError.
    """
    value, score = tensors_of(files, "v_head.summary."), tensors_of(files, "score.")
    if tokens:
        rows = tensors_of(files, "lm_head.weight") or {
            "": task.model.get_input_embeddings().weight.detach().float()
        }
        ids = [task.tokenizer(token, add_special_tokens=False).input_ids for token in tokens]
        if [len(one) for one in ids] != [1, 1]:
            raise UserError(
                f"head_tokens {' '.join(tokens)}: expected two, each of them one token of the base's."
            )
        good, bad = next(iter(rows.values()))[[ids[0][0], ids[1][0]]]
        load_linear(task.head, good - bad, torch.zeros(1))
    elif len(value) == 2:
        load_linear(task.head, value["v_head.summary.weight"][0], value["v_head.summary.bias"])
    elif len(score.get("score.weight", ())) == 2:
        weight, bias = score["score.weight"], score.get("score.bias", torch.zeros(2))
        load_linear(task.head, weight[1] - weight[0], bias[1:] - bias[:1])
    else:
        load_two_rows(task.head, files)
