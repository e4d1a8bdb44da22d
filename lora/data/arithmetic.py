"""The embedded data: worked arithmetic made from a seed, in which some steps are wrong.

    arithmetic:SPLIT:COUNT        SPLIT is train, validation or test; COUNT is a number of problems

A problem is a start and three to six operations, "From left to right: 13*6-8+6+9". A wrong version
of its second step, 78-8=70, has one of four slips:

    digit      78-8=74   one digit of the result is another one
    carry      78-8=80   ten too much or too little
    operator   78+8=86   another operation than the problem asks for
    carried    73-8=65   another value than the result of the step before

The chain goes on from the result that the step wrote, so a step is judged by the problem and by the
step before it. For language modelling every slip is corrected ("No, 78-8=70"), because a base that
has only read correct derivations has nothing to tell a scorer.
"""

from collections.abc import Iterator
import random
import re
import zlib

from lora.common.errors import UserError
from lora.data.examples import Example

SPLITS = ("train", "validation", "test")
OPERATIONS = "+-*"
# Values stay in 0..LIMIT and operands have one digit, so that a small model can learn to check.
LIMIT = 99
SHARE_WRONG = 0.4
MAX_PROBLEMS = 1_000_000  # they take a minute

Operation = tuple[str, int]  # operator and operand
Slip = tuple[int, str, int]  # first value, operator and result of a wrong step


def calculate(value: int, operator: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def make_problem(rng: random.Random) -> tuple[int, list[Operation]]:
    """Return the start and the operations of a chain whose values all stay within 0..LIMIT."""
    start = value = rng.randrange(2, LIMIT + 1)
    operations = []
    for _ in range(rng.randrange(3, 7)):
        largest = {"+": LIMIT - value, "-": value, "*": LIMIT // value if value else 0}
        # Products fit into the range less often than sums; counted twice they are still rarest.
        possible = [operator for operator in OPERATIONS + "*" if largest[operator] >= 2]
        operator = rng.choice(possible)
        operand = rng.randrange(2, min(9, largest[operator]) + 1)
        operations.append((operator, operand))
        value = calculate(value, operator, operand)
    return start, operations


def split_of(problem: str) -> str:
    """Return the split of a problem, which depends on its text alone: none is in two splits."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(problem.encode()) % 10, "train")


def change_digit(number: int) -> list[int]:
    """Return every number that differs from `number` in one digit."""
    digits = str(number)
    changed = []
    for i, old in enumerate(digits):
        others = "0123456789".replace(old, "")
        changed.extend(int(digits[:i] + new + digits[i + 1 :]) for new in others)
    return changed


def possible_slips(
    value: int, operator: str, operand: int, rest: list[Operation]
) -> list[list[Slip]]:
    """Return a list for each kind of slip that keeps the `rest` of the chain within 0..LIMIT."""
    result = calculate(value, operator, operand)
    digit = [(value, operator, wrong) for wrong in change_digit(result)]
    carry = [(value, operator, result - 10), (value, operator, result + 10)]
    operators = OPERATIONS.replace(operator, "")
    other_operator = [(value, used, calculate(value, used, operand)) for used in operators]
    firsts = change_digit(value)
    carried = [(first, operator, calculate(first, operator, operand)) for first in firsts]
    kinds = []
    for slips in (digit, carry, other_operator, carried):
        possible = [slip for slip in slips if stays_in_range(slip[2], rest)]
        if possible:
            kinds.append(possible)
    return kinds


def stays_in_range(value: int, operations: list[Operation]) -> bool:
    """Return whether a chain that goes on from `value` stays within 0..LIMIT."""
    values = [value]
    for operator, operand in operations:
        values.append(calculate(values[-1], operator, operand))
    return min(values) >= 0 and max(values) <= LIMIT


def make_chain(
    rng: random.Random, start: int, operations: list[Operation], correct_slips: bool
) -> tuple[list[str], list[float]]:
    """Return steps and labels; with `correct_slips` the right step follows each wrong one."""
    steps = []
    labels = []
    value = start
    for i, (operator, operand) in enumerate(operations):
        result = calculate(value, operator, operand)
        right_step = f"{value}{operator}{operand}={result}"
        rest = [] if correct_slips else operations[i + 1 :]
        slips = []
        if rng.random() < SHARE_WRONG:
            slips = possible_slips(value, operator, operand, rest)
        if not slips:
            steps.append(right_step)
            labels.append(1.0)
            value = result
            continue
        first, used, wrong = rng.choice(rng.choice(slips))
        steps.append(f"{first}{used}{operand}={wrong}")
        labels.append(0.0)
        value = wrong
        if correct_slips:
            steps.append(f"No, {right_step}")
            labels.append(1.0)
            value = result
    return steps, labels


def read(path: str, task: str) -> Iterator[Example]:
    """Yield the examples that `path` ("arithmetic:SPLIT:COUNT") names, the same ones every time."""
    match = re.fullmatch(r"arithmetic:(\w+):(\d+)", path)
    if not match or match[1] not in SPLITS or not 1 <= float(match[2]) <= MAX_PROBLEMS:
        ranges = f"SPLIT one of {', '.join(SPLITS)}, COUNT 1..{MAX_PROBLEMS}"
        raise UserError(f"{path}: expected arithmetic:SPLIT:COUNT with {ranges}.")
    split, count = match[1], int(match[2])
    rng = random.Random(f"arithmetic {split}")
    seen = set()
    while len(seen) < count:
        start, operations = make_problem(rng)
        written = "".join(f"{operator}{operand}" for operator, operand in operations)
        prompt = f"From left to right: {start}{written}"
        if split_of(prompt) != split or prompt in seen:
            continue
        seen.add(prompt)
        where = f"{path}#{len(seen)}"
        steps, labels = make_chain(rng, start, operations, correct_slips=task == "lm")
        if task == "lm":
            yield Example(where, text="\n".join([prompt, *steps]) + "\n")
        else:
            yield Example(where, prompt=prompt, steps=steps, labels=labels)
