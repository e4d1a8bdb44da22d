"""The embedded data: worked arithmetic of several chained steps, made from a seed, each step right
or wrong.

    arithmetic:SPLIT:COUNT        SPLIT is train, validation or test; COUNT is a number of problems

A problem is a start and three to six operations, "From left to right: 13*6-8+6+9". For its second
step, 78-8=70, a wrong one is one of four slips:

    digit      78-8=74   one digit of the result is another one
    carry      78-8=80   ten too much or too little
    operator   78+8=86   another operation than the problem asks for
    carried    73-8=65   another value than the one the step before ended with

and the chain goes on from whatever the step wrote, so that a step is judged by the problem and by
the step before it. For the scoring task an example is (problem, steps, labels). For language
modelling it is a text in which every slip is noticed and mended ("No, 78-8=70"): a base that has
only read correct derivations has nothing to tell a scorer.
"""

import random
import re
import zlib

from lora.common.errors import UserError
from lora.data.examples import Example

SPLITS = ("train", "validation", "test")
OPERATIONS = "+-*"
# Every value stays in 0..LIMIT and operands have one digit, so that a small model can learn to
# check
LIMIT = 99
SHARE_WRONG = 0.4


def calculate(value, operation, operand):
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operation]


def make_problem(rng):
    """(start, [(operation, operand), ...]): a chain whose every value stays within 0..LIMIT."""
    start = value = rng.randrange(2, LIMIT + 1)
    operations = []
    for _ in range(rng.randrange(3, 7)):
        largest = {"+": LIMIT - value, "-": value, "*": LIMIT // value if value else 0}
        # Products fit into the range more rarely than sums; counted twice they are still the
        # rarest.
        operation = rng.choice([o for o in OPERATIONS + "*" if largest[o] >= 2])
        operand = rng.randrange(2, min(9, largest[operation]) + 1)
        operations.append((operation, operand))
        value = calculate(value, operation, operand)
    return start, operations


def problem_text(start, operations):
    return f"From left to right: {start}" + "".join(
        f"{operation}{operand}" for operation, operand in operations
    )


def split_of(problem):
    """The split a problem belongs to, by its text alone: no problem is in two of them."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(problem.encode()) % 10, "train")


def change_digit(number):
    """Every number that differs from `number` in one digit."""
    digits = str(number)
    return [
        int(digits[:i] + d + digits[i + 1 :])
        for i in range(len(digits))
        for d in "0123456789"
        if d != digits[i]
    ]


def possible_slips(value, operation, operand, rest):
    """The wrong versions (first, operation, result) of a step from which `rest` stays in range: a
    list for each kind.
    """
    result = calculate(value, operation, operand)
    kinds = (
        [(value, operation, wrong) for wrong in change_digit(result)],  # digit
        [(value, operation, result - 10), (value, operation, result + 10)],  # carry
        [
            (value, used, calculate(value, used, operand))
            for used in OPERATIONS
            if used != operation
        ],  # operator
        # Carried
        [(first, operation, calculate(first, operation, operand)) for first in change_digit(value)],
    )
    possible = [[slip for slip in kind if in_range(slip[2], rest)] for kind in kinds]
    return [kind for kind in possible if kind]


def in_range(value, operations):
    """Whether a chain that goes on from `value` stays within 0..LIMIT."""
    for operation, operand in [*operations, ("+", 0)]:
        if not 0 <= value <= LIMIT:
            return False
        value = calculate(value, operation, operand)
    return True


def make_chain(rng, start, operations, mend_slips):
    """(steps, labels). With `mend_slips` each wrong step is followed by "No, " and the right one."""
    steps, labels, value = [], [], start
    for i, (operation, operand) in enumerate(operations):
        result = calculate(value, operation, operand)
        right = f"{value}{operation}{operand}={result}"
        rest = [] if mend_slips else operations[i + 1 :]  # what goes on from the wrong value
        wrong_steps = (
            possible_slips(value, operation, operand, rest) if rng.random() < SHARE_WRONG else []
        )
        if wrong_steps:
            first, used, wrong = rng.choice(rng.choice(wrong_steps))
            steps.append(f"{first}{used}{operand}={wrong}")
            labels.append(0.0)
            if mend_slips:
                steps.append(f"No, {right}")
                labels.append(1.0)
            else:
                result = wrong
        else:
            steps.append(right)
            labels.append(1.0)
        value = result
    return steps, labels


def read(path, task):
    """Yield the COUNT examples that `path` ("arithmetic:SPLIT:COUNT") names; the same ones every
    time.
    """
    match = re.fullmatch(r"arithmetic:(\w+):(\d+)", path)
    if not match or match[1] not in SPLITS or int(match[2]) < 1:
        raise UserError(
            f"{path}: expected arithmetic:SPLIT:COUNT with SPLIT one of {', '.join(SPLITS)}."
        )
    split, count = match[1], int(match[2])
    rng = random.Random(f"arithmetic {split}")
    seen = set()
    while len(seen) < count:
        start, operations = make_problem(rng)
        prompt = problem_text(start, operations)
        if split_of(prompt) != split or prompt in seen:
            continue
        seen.add(prompt)
        steps, labels = make_chain(rng, start, operations, mend_slips=task == "lm")
        where = f"{path}#{len(seen)}"
        if task == "lm":
            yield Example(where, text="\n".join([prompt, *steps]) + "\n")
        else:
            yield Example(where, prompt=prompt, steps=steps, labels=labels)
