"""What a user did wrong, said so that it can be put right: all problems at once, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

USER_ERROR_EXIT_CODE = 2


@dataclass(frozen=True)
class Problem:
    """One thing to put right.

    where: the config key ("optim.max_lr"), the file and line ("train.jsonl:12") or the path that is wrong
    found: what stands there
    expected: what should
    remedy: what to do, if `expected` doesn't say it already
    """

    where: str
    found: str
    expected: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: found {self.found}, expected {self.expected}"
        return f"{text}. {self.remedy}" if self.remedy else text


class UserError(Exception):
    """Raised with every problem found; commands print it and exit with 2.

    state: what became of the command, for the message's first line
    """

    def __init__(self, problems: Problem | Iterable[Problem], state: str = "nothing was started"):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        self.state = state
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self):
        return (UserError, (self.problems, self.state))  # so that it survives a DataLoader worker


def format_problems(error: UserError) -> str:
    """The message that a command ends with."""
    count = f"{len(error.problems)} problem{'s' if len(error.problems) > 1 else ''}"
    return "\n".join([f"{count}; {error.state}:", *(f"  {problem}" for problem in error.problems)])


def nearest(name: str, choices: Iterable[str]) -> str:
    """'did you mean x?' for the choice closest to `name`, or ''."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"Did you mean {match[0]!r}?" if match else ""
