"""What a sweep says of its jobs."""

import pytest

from vlmsft.errors import Problem, UserError, format_problems
from vlmsft.sweeping.show import first_of

PROBLEMS = [Problem("training loss", "5.5", "under 0.3"), Problem("answers", "0", "1.0")]


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (format_problems(UserError(PROBLEMS)), f"2 problems; nothing was started: {PROBLEMS[0]}"),
        ("ValueError: a bug\n  with a detail", "ValueError: a bug"),
        ("ValueError:", "ValueError:"),
    ],
)
def test_a_reason_in_a_line(reason, line):
    assert first_of(reason) == line
