"""The file that answers go to: a line for each as it comes, so that a run that was cut off asks nothing twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmsft.errors import Problem, UserError


class AnswersFile:
    """Answers of one input file under one set of settings.

    The settings lie beside it (answers.jsonl.settings.json): answers of another model, input or temperature never get
    into the same file.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]):
        """Reads what is there; writes nothing. Raises UserError where the file isn't this run's."""
        self.path = Path(path)
        self.settings_path = self.path.with_name(f"{self.path.name}.settings.json")
        self._settings = json.loads(json.dumps(settings))  # as it will be read again
        self.answered: dict[int, dict[str, Any]] = {}
        self._end = 0  # bytes that hold whole lines
        problems = self._folder_problems() or self._settings_problems()
        if problems:
            raise UserError(problems)
        if self.path.exists():
            self._read()

    def begin(self) -> None:
        """Makes the file ready for `add`: a line that a killed run left half-written goes."""
        self.settings_path.write_text(json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with open(self.path, "ab") as file:
            file.truncate(self._end)

    def add(self, answer: dict[str, Any]) -> None:
        """Appends a line; answer["index"] says which question it belongs to."""
        self.answered[answer["index"]] = answer
        with open(self.path, "ab") as file:
            file.write(_line(answer))

    def finish(self) -> None:
        """Puts the lines into the input's order, if they aren't."""
        ordered = [self.answered[index] for index in sorted(self.answered)]
        if ordered == list(self.answered.values()):
            return
        aside = self.path.with_name(f"{self.path.name}.sorted")
        aside.write_bytes(b"".join(_line(answer) for answer in ordered))
        os.replace(aside, self.path)

    def _folder_problems(self) -> list[Problem]:
        folder = self.path.parent
        if folder.is_dir() and not self.path.is_dir():
            return []
        return [Problem("output", str(self.path), "a file in a folder that exists")]

    def _settings_problems(self) -> list[Problem]:
        remedy = "Name another output"
        if not self.settings_path.is_file():
            if not self.path.exists() or self.path.stat().st_size == 0:
                return []
            found = f"{self.path}, a file without {self.settings_path.name}"
            return [Problem("output", found, "a new file, or one that this command began", remedy)]
        theirs = json.loads(self.settings_path.read_text(encoding="utf-8"))
        return [
            Problem(
                key, repr(self._settings.get(key)), f"{theirs.get(key)!r} as for the answers in {self.path}", remedy
            )
            for key in sorted({*theirs, *self._settings})
            if theirs.get(key) != self._settings.get(key)
        ]

    def _read(self) -> None:
        content = self.path.read_bytes()
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            try:
                answer = json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    found = f"{self.path}:{number}, which is no JSON"
                    raise UserError(Problem("output", found, "lines that this command wrote")) from None
                return
            if not line.endswith(b"\n"):
                return
            self.answered[answer["index"]] = answer
            self._end += len(line)


def _line(answer: dict[str, Any]) -> bytes:
    return (json.dumps(answer, ensure_ascii=False) + "\n").encode("utf-8", errors="surrogatepass")
