"""What llama.cpp answers from GGUF files of a merged model, beside transformers.

    python merge.py --adapter outputs/RUN/final_artifact --output merged
    python benchmarks/llama_cpp.py --merged merged --data instructions.json

The merged folder is written as a GGUF file of each type. Twenty questions are answered greedily: by
transformers from the merged folder in fp32, and by llama.cpp's server as a chat, so that the chat
template and the tokens are those of the file. Where the texts differ, llama.cpp is given the
answer of transformers, and at every position names the most likely token. It needs xllamacpp,
which is llama.cpp's server as a Python module.
"""

import argparse
from dataclasses import dataclass
import json
from pathlib import Path
import tempfile

import common  # noqa: F401  (makes lora importable)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import xllamacpp

from lora.evaluation.generate import before_stop, pad_left, prompt_tokens
from lora.export.gguf import write_gguf

NUM_QUESTIONS = 20
MAX_NEW_TOKENS = 96


@dataclass
class Answer:
    question: str
    prompt: list[int]
    tokens: list[int]  # with the token that ended it, if one did
    text: str
    has_stopped: bool
    margins: list[float]  # of each token's log-probability over the second most likely token's


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merged", type=Path, required=True)
    parser.add_argument("--data", required=True, help="JSON with instruction and input")
    parser.add_argument("--types", nargs="+", default=["f32", "f16", "q8_0"])
    arguments = parser.parse_args()
    rows = json.loads(Path(arguments.data).read_text())[-NUM_QUESTIONS:]
    questions = [f"{row['instruction']}\n\n{row.get('input', '')}".strip() for row in rows]
    answers = by_transformers(arguments.merged, questions)
    stopped = sum(answer.has_stopped for answer in answers)
    print(f"transformers: {stopped} of {len(answers)} stop by themselves\n")
    print("| type | equal texts | stop by themselves | same most likely token |")
    print("|---|---|---|---|")
    notes = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in arguments.types:
            file = Path(temporary) / f"{kind}.gguf"
            write_gguf(arguments.merged, file, kind)
            notes += compare(kind, start_server(file), answers)
    print("\n" + "\n".join(notes))


@torch.no_grad()
def by_transformers(folder: Path, questions: list[str]) -> list[Answer]:
    """Answer greedily in fp32, in one batch, with the stop tokens that the folder names."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [prompt_tokens("question", chat, None, tokenizer) for chat in chats]
    inputs, mask = pad_left(prompts, model.device)
    greedy = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    generated = model.generate(input_ids=inputs, attention_mask=mask, **greedy)
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    answers = []
    for question, prompt, row in zip(questions, prompts, generated[:, inputs.shape[1] :].tolist()):
        tokens = before_stop(row, stops)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        has_stopped = len(tokens) < len(row)
        tokens = row[: len(tokens) + has_stopped]
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        best, second = logits.topk(2).values.T
        assert logits.argmax(-1).tolist() == tokens
        answers.append(
            Answer(question, prompt, tokens, text, has_stopped, (best - second).tolist())
        )
    return answers


def start_server(file: Path) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = 1024
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    return xllamacpp.Server(params)


def compare(kind: str, server: xllamacpp.Server, answers: list[Answer]) -> list[str]:
    """Print a row of the table; return a line for each answer or token that differs."""
    notes = []
    num_equal = num_stopped = num_same = num_tokens = 0
    for number, answer in enumerate(answers, 1):
        chat = [{"role": "user", "content": answer.question}]
        request = {"messages": chat, "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
        choice = server.handle_chat_completions(request)["choices"][0]
        num_equal += choice["message"]["content"] == answer.text
        num_stopped += choice["finish_reason"] == "stop"
        num_tokens += len(answer.tokens)
        if choice["message"]["content"] == answer.text:
            num_same += len(answer.tokens)
        else:
            notes.append(f"{kind}, answer {number}: {choice['message']['content']!r}")
            notes.append(f"    transformers: {answer.text!r}")
            found = next_tokens(server, answer)
            for i, (token, its_token) in enumerate(zip(answer.tokens, found)):
                num_same += token == its_token
                if token != its_token:
                    margin = f"{answer.margins[i]:.3g}"
                    notes.append(f"    token {i + 1} is another; margin of its logit: {margin}")
    num = len(answers)
    share = f"{num_same} of {num_tokens}"
    print(f"| {kind} | {num_equal} of {num} | {num_stopped} of {num} | {share} |", flush=True)
    return notes


def next_tokens(server: xllamacpp.Server, answer: Answer) -> list[int]:
    """Return the most likely token at each position of an answer, given what precedes it."""
    found = []
    for i in range(len(answer.tokens)):
        request = {"prompt": answer.prompt + answer.tokens[:i], "temperature": 0}
        request |= {"max_tokens": 1, "logprobs": 1}
        choice = server.handle_completions(request)["choices"][0]
        found.append(choice["logprobs"]["content"][0]["id"])
    return found


if __name__ == "__main__":
    main()
