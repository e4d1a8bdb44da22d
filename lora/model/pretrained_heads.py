"""Score heads in the forms of other projects, as an MLPHead that predicts exactly the same.

score.0, score.2    Linear - ReLU - Linear to two classes; the score is the probability of the
                    second (Qwen2.5-Math-PRM, vLLM)
score               one linear layer to two classes (TRL's PRMTrainer)
v_head.summary      one linear layer under a sigmoid (Skywork-o1-Open-PRM)
two tokens          two tokens as the classes of a language model; the score is the probability of
                    the first (Math-Shepherd's + and -)
"""

from pathlib import Path

from safetensors import safe_open
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora.common.errors import UserError
from lora.model.heads import LMHead, MLPHead


def read_tensors(files: list[Path], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of safetensors files whose names begin with `prefix`, in fp32.

    Raises UserError where one holds a number that is not finite.
    """
    tensors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.startswith(prefix):
                    tensors[name] = file.get_tensor(name).float()
                    if not tensors[name].isfinite().all():
                        raise UserError(f"{path}: {name} holds numbers that are not finite.")
    return tensors


def two_class_state(head: MLPHead) -> dict[str, Tensor]:
    """Return the head with two classes: softmax([0, z])[1] = sigmoid(z)."""
    first, last = head.layers[0], head.layers[3]
    state = {f"score.0.{name}": tensor for name, tensor in first.named_parameters()}
    for name, tensor in last.named_parameters():
        state[f"score.2.{name}"] = torch.cat([torch.zeros_like(tensor), tensor])
    return state


def load_two_class_head(head: MLPHead, files: list[Path]) -> bool:
    """Load score.0 and score.2; return False where the files have none."""
    score = read_tensors(files, "score.")
    if len(score) != 4 or len(score.get("score.2.weight", ())) != 2:
        return False
    state = {}
    for name in ("weight", "bias"):
        rows = score[f"score.2.{name}"]  # the softmax depends only on their difference
        state[f"0.{name}"] = score[f"score.0.{name}"]
        state[f"3.{name}"] = rows[1:] - rows[:1]
    head.layers.load_state_dict(state)
    return True


@torch.no_grad()
def load_linear(head: MLPHead, direction: Tensor, bias: Tensor) -> None:
    """Load z = direction [width] . h + bias [1], as z = relu(z) - relu(-z)."""
    first, last = head.layers[0], head.layers[3]
    first.weight[:2] = torch.stack([direction, -direction])
    first.bias[:2] = 0.0
    last.weight.zero_()  # the other hidden units keep their first layer, and can be learned
    last.weight[0, :2] = torch.tensor([1.0, -1.0])
    last.bias.copy_(bias)


def load_token_head(
    head: MLPHead,
    files: list[Path],
    tokens: list[str],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> None:
    """Load the difference of the logits of two tokens, a good and a bad one.

    `model` is the backbone, and `files` are the base's. Raises UserError where they have no output
    layer, where it is not linear, or where `tokens` are not two of its tokens.
    """
    where = f"head_tokens {' '.join(tokens)}"
    shape = model.config.get_text_config()
    output = read_tensors(files, "lm_head.")
    for name, tensor in read_tensors(files, "embed_out.").items():  # GPT-NeoX's
        output[name.replace("embed_out", "lm_head")] = tensor
    if "lm_head.weight" not in output and getattr(shape, "tie_word_embeddings", False):
        output["lm_head.weight"] = model.get_input_embeddings().weight.detach().float()
    is_scorer = any(path.name == "mlp_head.safetensors" for path in files)
    has_head = is_scorer or read_tensors(files, "score.") or read_tensors(files, "v_head.summary.")
    if has_head or "lm_head.weight" not in output:
        found = "a score head of its own" if has_head else "no output layer"
        raise UserError(f"{where}: the base has {found}; leave them out.")
    weight = output["lm_head.weight"]
    ids = [tokenizer(token, add_special_tokens=False).input_ids for token in tokens]
    if [len(token_ids) for token_ids in ids] != [1, 1] or max(ids[0] + ids[1]) >= len(weight):
        raise UserError(f"{where}: expected two, each of them one token of the base's.")
    language_head = LMHead(model.get_output_embeddings, shape)
    if language_head.softcap:
        raise UserError(f"{where}: the base caps its logits, which no linear head does.")
    bias = output.get("lm_head.bias", torch.zeros(len(weight)))
    (good,), (bad,) = ids
    scale = language_head.scale
    load_linear(head, scale * (weight[good] - weight[bad]), scale * (bias[good] - bias[bad]))


def initialise_head(head: MLPHead, files: list[Path]) -> bool:
    """Initialise a score head from the base's weight files; return whether they hold one."""
    value, score = read_tensors(files, "v_head.summary."), read_tensors(files, "score.")
    if len(value) == 2:
        load_linear(head, value["v_head.summary.weight"][0], value["v_head.summary.bias"])
    elif len(score.get("score.weight", ())) == 2:
        weight, bias = score["score.weight"], score.get("score.bias", torch.zeros(2))
        load_linear(head, weight[1] - weight[0], bias[1:] - bias[:1])
    else:
        return load_two_class_head(head, files)
    return True
