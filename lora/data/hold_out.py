"""Choose the held-out examples by hashes of their prompts, and count repeats and overlap."""

from array import array
from collections.abc import Sequence

import numpy as np

LONG_TEXT = 2**18  # characters; most books are longer


def choose_held_out(
    subjects: array,
    is_held_out: Sequence[int],
    dataset_ids: array,
    text_sizes: array,
    fraction: float,
) -> tuple[np.ndarray, set[int]]:
    """Return which examples are held out whole, and the texts of which only the end is held out.

    Holding out one of a few books would hold out too much. So where long texts, or the texts of
    a set, are too few to hold out one, the end of each is held out.

    Args:
        subjects: hashes of the prompts or texts [examples].
        is_held_out: whether an example is of a file that is held out as a whole [examples].
        text_sizes: characters of a text, 0 for any other example [examples].

    Returns:
        Flags [examples], and indices.
    """
    sets, sizes, hashes = np.array(dataset_ids), np.array(text_sizes), np.array(subjects)
    chosen = np.array(is_held_out, bool)
    is_candidate = ~chosen
    set_sizes = np.bincount(sets[is_candidate], minlength=sets.max() + 1)
    is_of_few = (sizes > 0) & (set_sizes[sets] * fraction < 1)
    is_document = is_candidate & (is_of_few | (sizes >= LONG_TEXT))
    documents = set()
    if is_document.sum() * fraction < 1:
        documents = set(np.flatnonzero(is_document).tolist())
        is_candidate &= ~is_document
    chosen[is_candidate] = chosen_by_hash(hashes[is_candidate], fraction)
    return chosen, documents


def count_subjects(subjects: array, contents: array, is_held_out: Sequence[int]) -> dict[str, int]:
    """Count by hashes [examples] of the prompts or texts, and of all that is in an example."""
    held_out_flags = np.array(is_held_out, bool)
    training = np.array(subjects)[~held_out_flags]
    held_out = np.unique(np.array(subjects)[held_out_flags])
    num_distinct = len(np.unique(np.array(contents)[~held_out_flags]))
    return {
        "repeated": len(training) - num_distinct,  # the same as an earlier training example
        "overlap": len(np.intersect1d(training, held_out)),  # prompts or texts in both parts
        "held_out_subjects": len(held_out),
    }


def chosen_by_hash(subjects: np.ndarray, fraction: float) -> np.ndarray:
    """Return which examples are held out [examples], those with the same subject together.

    `subjects` are their hashes, whose order decides. None is held out where it would be all.
    """
    distinct = np.unique(subjects)
    if len(distinct) < 2:
        return np.zeros(len(subjects), bool)
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    return subjects <= distinct[count - 1]
