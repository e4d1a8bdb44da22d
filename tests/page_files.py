"""The files of data that the pages name, as small as the commands allow."""

import json
import shutil

from lora.common.paths import ROOT
from tests.data.test_step_readers import prm800k_row, prm800k_step, rating

SAMPLES = ROOT / "assets" / "samples"


def eqasc_row(n):
    chain = [{"text": "f"}, {"text": "g"}, {"turk_label": {"label": "yes"}}]
    choices = [{"label": "A", "text": "wind", "df": None, "chains": [chain]}]
    question = {"stem": f"What is {n}?", "choices": choices}
    return {"id": str(n), "fact1": "f", "fact2": "g", "answerKey": "A", "question": question}


def chain(n):
    labels = [1, int(n % 3 == 0)]  # some chains have no error
    return {"prompt": f"{n}+{n}+1", "steps": [f"{n}+{n}={2 * n}", "then"], "labels": labels}


def write_files(folder):
    """Write the files of data that the pages name."""
    samples = {
        "chats.jsonl": "chat.jsonl",
        "other.jsonl": "chat.jsonl",
        "few.jsonl": "critical.jsonl",
        "questions.jsonl": "questions.jsonl",
        "corpus.jsonl": "corpus.jsonl",
        "text.txt": "text.txt",
    }
    for name, sample in samples.items():
        shutil.copyfile(SAMPLES / sample, folder / name)
    steps = [chain(n) for n in range(12)]
    right_step = prm800k_step([rating("right", 1)], chosen=0)
    rows_of_file = {
        "steps.jsonl": steps,
        "gsm8k.json": steps[:4],
        "math.json": steps[4:8],
        "prm800k.jsonl": [prm800k_row([right_step], f"problem {n}") for n in range(12)],
        "eqasc.json": [eqasc_row(n) for n in range(12)],
        "queries.jsonl": [{"query": "When is it open?", "relevant": ["opening-hours"]}],
    }
    for name, rows in rows_of_file.items():
        text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
        (folder / name).write_text(text)
    my_config = "[model]\nbase_model = 'M'\n[data]\ntrain_data = ['chats.jsonl']\n"
    (folder / "my.toml").write_text(my_config)
