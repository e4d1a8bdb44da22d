"""The message about the rows of a file that cannot be read."""

from io import BufferedIOBase
import re

from lora.common.errors import UserError

LISTED = 10  # different problems of a file
ROW = re.compile(r"(.*?(?::\d+|: row \d+)+): (.*)", re.DOTALL)  # where, and the problem


def summary(path: str, bad_rows: list[UserError]) -> str:
    """Return the first problems, each once with its first three places."""
    places: dict[str, list[str]] = {}
    for error in bad_rows:
        message = str(error).removeprefix(path)
        match = ROW.fullmatch(message)
        where, problem = match.groups() if match else ("", message)
        places.setdefault(problem.strip(" :."), []).append(where.strip(" :/"))
    problems = []
    for problem, rows in list(places.items())[:LISTED]:
        more = f" and {len(rows) - 3:,} more" if len(rows) > 3 else ""
        problems.append(f"{', '.join(rows[:3])}{more}: {problem}")
    return "; ".join(problems) + ("; ..." if len(places) > LISTED else ".")


def first_undecodable(file: BufferedIOBase, error: UnicodeDecodeError) -> tuple[int | str, int]:
    """Return the first line that is not UTF-8, and its first byte that is not."""
    with file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error_in_line:
                return number, line[error_in_line.start]
    return "", error.object[error.start]
