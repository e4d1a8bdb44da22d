"""Readers of published sets, each a file in the form that its authors gave it."""

from lora.data.readers.published import (
    eobqa,
    eqasc,
    first_error,
    glaive,
    math_shepherd,
    outcomes,
    prm800k,
    prmbench,
    reveal,
)

# Where a row has the keys of several forms, the first of these readers reads it.
PUBLISHED = (
    prm800k, math_shepherd, first_error, prmbench, eqasc, eobqa, reveal, outcomes,
    glaive,
)  # fmt: skip
