"""The losses of the validation examples, kept at every evaluation, so that two runs can be compared
example by example.

RUN/logs/examples/step_<N>.npz   id [n] (a hash of the row's tokens and targets), loss [n] (a sum), targets [n] (how many)
"""

import hashlib
from pathlib import Path

import numpy as np

from lora.common.atomic_files import file_for
from lora.data.batches import is_target
from lora.model.heads import LMHead

SUBFOLDER = Path("logs") / "examples"


def losses(head, said, targets):
    """[n]: the loss at each target, from what `predict` gave."""
    return said[:, 0] if isinstance(head, LMHead) else head.losses(said, targets)


def keep(run_dir, step, head, said, targets, rows, batches):
    """Write the file of a step, from what `predict` gave of `batches` of the Rows: the targets of
    each row lie together.
    """
    order = [row for batch in batches for row in batch.rows]
    ids, counts = np.zeros(len(order), np.uint64), np.zeros(len(order), np.int32)
    for place, i in enumerate(order):
        row = slice(rows.offsets[i], rows.offsets[i + 1])
        text = rows.tokens[row].tobytes() + rows.targets[row].tobytes()
        ids[place] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
        counts[place] = is_target(rows.targets[row]).sum()
    sums = np.add.reduceat(
        losses(head, said, targets).double().numpy(), np.cumsum([0, *counts[:-1]])
    )
    folder = Path(run_dir) / SUBFOLDER
    folder.mkdir(exist_ok=True)
    with file_for(folder / f"step_{step}.npz") as temporary:
        np.savez_compressed(temporary, id=ids, loss=sums.astype(np.float32), targets=counts)


def read(run_dir, step):
    """{id: (sum of losses, number of targets)} of the examples at an evaluation; empty where none
    were kept.
    """
    path = Path(run_dir) / SUBFOLDER / f"step_{step}.npz"
    if not path.is_file():
        return {}
    with np.load(path) as found:
        return dict(
            zip(found["id"].tolist(), zip(found["loss"].tolist(), found["targets"].tolist()))
        )
