"""The result of a check, and the ways in which checks come to one."""

from dataclasses import dataclass

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
BUG = "a bug in plainlora or in this model's code: do not train with it, and report it"


@dataclass(frozen=True)
class Result:
    status: str  # PASS, WARN or FAIL
    text: str  # what was measured and, unless it passed, how to mend it


def require(condition: bool, measured: str, advice: str, otherwise: str = FAIL) -> Result:
    if condition:
        return Result(PASS, measured)
    return Result(otherwise, f"{measured}; {advice}")


def require_at_most(value: float, limit: float, what: str) -> Result:
    """Return PASS where a value is at most `limit`, which a NaN is not."""
    advice = f"expected at most {limit:g}; {BUG}"
    return require(value <= limit, f"{what} {value:.2g}", advice)


def require_no_faults(count: int, total: int, measured: str, advice: str) -> Result:
    """Return WARN from the first fault among `total` on, and FAIL from half of them on."""
    return require(count == 0, measured, advice, FAIL if 2 * count >= total else WARN)
