"""Talks with driver.py in llm-jp-eval-mm's environment: lines of JSON over pipes. What it prints is kept for errors."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vlmsft.errors import Problem, UserError
from vlmsft.runtime.environments import variables_for_another_python
from vlmsft.runtime.logging import console

if TYPE_CHECKING:
    from vlmsft.evaluation.eval_mm import Options

DRIVER = Path(__file__).with_name("driver.py")
SHOWN_LINES = 12

OfRequests = Callable[[list[list[dict[str, str]]]], list[str | None]]
Scorer = Callable[[dict[str, Any], OfRequests], list[Any]]


def samples(
    python: Path, options: Options, pictures: Path, limit: int | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A task's questions as driver.py writes them, and the versions of packages.

    pictures: folder that gets the pictures' files
    limit: first so many questions; None = all
    """
    arguments = ["samples", options.task, str(pictures)]
    arguments += [] if limit is None else ["--limit", str(limit)]
    arguments += ["--rotate-choices"] if options.rotate_choices else []
    with (
        console().status(f"llm-jp-eval-mm loads {options.task}"),
        _driver(python, arguments, options.tasks_file) as run,
    ):
        found = []
        for line in run.lines():
            if "done" in line:
                return found, line["done"]["versions"]
            found.append(line["sample"])
    raise AssertionError("the driver ends with a line, or an error")


@contextmanager
def scorer(python: Path, tasks_file: str | None) -> Iterator[Scorer]:
    """A function of (asked, judge) that returns what llm-jp-eval-mm's scorer gives for each answer, None where the
    judge gave None.

    asked: metric, judge_model, references, answers, fields, see driver.py
    judge: replies to its requests
    """
    with _driver(python, ["scores"], tasks_file) as run:

        def score(asked: dict[str, Any], judge: OfRequests) -> list[Any]:
            run.send(asked)
            for line in run.lines():
                if "scores" in line:
                    return line["scores"]
                run.send({"replies": judge(line["judge"])})
            raise AssertionError("the driver ends with a line, or an error")

        yield score


class _Run:
    def __init__(self, process: subprocess.Popen[str], log: IO[str], what: str):
        self._process, self._log, self._what = process, log, what

    def send(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Raises UserError with what the driver printed last where it ends without its last line."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)
        raise self._failed()

    def _failed(self) -> UserError:
        code = self._process.wait()
        self._log.seek(0)
        said = "\n".join(f"    {line.rstrip()}" for line in self._log.readlines()[-SHOWN_LINES:])
        found = f"an end with {code}. It said:\n{said}\n   "
        return UserError(Problem(f"llm-jp-eval-mm, {self._what}", found, "its result"))


@contextmanager
def _driver(python: Path, arguments: list[str], tasks_file: str | None) -> Iterator[_Run]:
    """The running driver; it is ended with the block."""
    own = [] if tasks_file is None else ["--tasks", tasks_file]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [str(python), "-P", str(DRIVER), *arguments, *own],  # -P: modules beside the driver are not for it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=variables_for_another_python(),
        )
        try:
            yield _Run(process, log, " ".join(arguments[:2]))
        finally:
            process.kill()
            process.communicate()
