"""Talks with driver.py in llm-jp-eval-mm's environment: lines of JSON over pipes. What it prints is kept for errors.

One driver serves a whole evaluation, for its imports take some ten seconds.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmsft.errors import Problem, UserError
from vlmsft.runtime.environments import variables_for_another_python
from vlmsft.runtime.logging import console

if TYPE_CHECKING:
    from vlmsft.evaluation.eval_mm import Options

DRIVER = Path(__file__).with_name("driver.py")
SHOWN_LINES = 12

OfRequests = Callable[[list[list[dict[str, str]]]], list[str | None]]
"""Replies to a judge's requests; None where it failed."""


def samples(
    python: Path, options: Options, pictures: Path, limit: int | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A task's questions as driver.py writes them, and the versions of packages.

    pictures: folder that gets the pictures' files
    limit: first so many questions; None = all
    """
    request = {
        "samples": options.task,
        "tasks_file": options.tasks_file,
        "limit": limit,
        "rotate_choices": options.rotate_choices,
        "pictures": str(pictures),
    }
    found: list[dict[str, Any]] = []
    with console().status(f"llm-jp-eval-mm loads {options.task}"):
        done = _converse(python, request, lambda line: found.append(line["sample"]))
    return found, done["versions"]


def scores(python: Path, request: dict[str, Any], judge: OfRequests) -> list[Any]:
    """What llm-jp-eval-mm's scorer gives for each answer; None where the judge gave None.

    request: scores (the metric), tasks_file, judge_model, references, answers, fields, see driver.py
    """
    return _converse(python, request, lambda line: {"replies": judge(line["judge"])})


def _converse(python: Path, request: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Any:
    """What is done in the end. A driver whose conversation was broken off is not used again.

    answer: what is to be said to a line, None for nothing
    """
    driver = _driver(python)
    where = f"llm-jp-eval-mm, {request.get('samples') or request.get('scores')}"
    try:
        last = _talk(driver, request, answer)
    except BaseException:
        driver.end()
        raise
    if last is None:
        problem = Problem(where, _end(driver), "its result")
        driver.end()
        raise UserError(problem)
    if "error" in last:
        raise UserError(Problem(where, last["error"], "its result"))
    return last["done"]


def _talk(
    driver: _Driver, request: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """The driver's last line; None where it ended before."""
    driver.send(request)
    for line in driver.lines():
        if "done" in line or "error" in line:
            return line
        reply = answer(line)
        if reply is not None:
            driver.send(reply)
    return None


def _end(driver: _Driver) -> str:
    """How it ended, and the last lines of what it said."""
    block = "\n".join(f"    {line}" for line in driver.said().rstrip().splitlines()[-SHOWN_LINES:])
    return f"an end with {driver.code()}:\n{block}\n   "


# --- the process ------------------------------------------------------------------------------------------------------

_running: dict[tuple[Path, str], _Driver] = {}


class _Driver:
    def __init__(self, python: Path):
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), "-P", str(DRIVER)],  # -P: modules beside the driver are not for it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env=variables_for_another_python(),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        atexit.register(self.end)

    @property
    def is_usable(self) -> bool:
        return self._process.poll() is None

    def send(self, line: dict[str, Any]) -> None:
        try:
            self._stdin.write(json.dumps(line) + "\n")
            self._stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: `lines` ends too

    def lines(self) -> Iterator[dict[str, Any]]:
        for line in self._stdout:
            yield json.loads(line)

    def code(self) -> int:
        return self._process.wait()

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stdout.close()
        self._log.close()
        atexit.unregister(self.end)


def _driver(python: Path) -> _Driver:
    """The one that works in this folder: jic-vqa's data lie there."""
    key = (python, os.getcwd())
    if key not in _running or not _running[key].is_usable:
        _running[key] = _Driver(python)
    return _running[key]
