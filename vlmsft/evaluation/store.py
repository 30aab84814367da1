"""An evaluation's folder: questions, answers as they come, scores. What was killed goes on where it stopped.

    evaluations/<id>/manifest.json    what the numbers depend on (vlmsft.evaluation.manifest)
        samples/<task>.jsonl          a line for each question: Sample
        images/<task>/...             pictures that lay in no file of their own
        answers/<model>/<task>.jsonl  appended to: Answer. Of several lines with one id and repeat the last holds
        scores.jsonl                  a line for each model, task, id, repeat and metric: Score; written anew each time

Imports neither torch nor a web library.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from vlmsft.errors import Problem, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A question.

    id: unique in its task
    prompt: the text that was asked, <image> where a picture stands; a conversation's earlier turns are in `turns`
    images: picture files, in the order of the markers; relative to the evaluation's folder, or absolute
    references: right answers, most samples have one; empty where there is none
    options: of a multiple-choice question, {"A": "犬", "B": "猫"}; else empty
    turns: what is sent, [{"role": "user", "text": "... <image> ..."}, ...]; the last one is `prompt`
    fields: the record's other values, for templates of judges and for the gallery
    """

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    turns: tuple[dict[str, str], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a model said.

    repeat: from 0
    answer: None where there is none, and `error` then says why; an error is asked again at the next start
    finish_reason: "length" = cut at max_new_tokens
    seconds: from asking to the whole answer
    num_tokens: of the answer, as the server counted them
    """

    id: str
    repeat: int
    answer: str | None
    error: str | None = None
    seconds: float | None = None
    finish_reason: str | None = None
    num_tokens: int | None = None


@dataclass(frozen=True)
class Score:
    """A number for an answer.

    score: more is better. On the scale of the tutorial's table: percent (0 to 100) for accuracies, ROUGE and BLEU, a
        judge's own scale otherwise (1 to 5). None = missing: no answer, or no usable verdict; `reason` says which
    reason: for a number, what a reader should know of it (what was extracted, the judge's words); else why it's missing
    out_of, group: of metrics that are no mean of their scores (vlmsft.evaluation.statistics.Value)
    """

    model: str
    task: str
    id: str
    repeat: int
    metric: str
    score: float | None
    reason: str | None = None
    out_of: float | None = None
    group: str = ""


class Store:
    """The files of one evaluation. `add_answer` may be called from several threads."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._ready: set[Path] = set()

    def samples_path(self, task: str) -> Path:
        return self.folder / "samples" / f"{task}.jsonl"

    def answers_path(self, model: str, task: str) -> Path:
        return self.folder / "answers" / model / f"{task}.jsonl"

    def images_folder(self, task: str) -> Path:
        """For pictures that lie in no file of their own; it is made by whoever writes one."""
        return self.folder / "images" / task

    @property
    def scores_path(self) -> Path:
        return self.folder / "scores.jsonl"

    def write_samples(self, task: str, samples: Iterable[Sample]) -> None:
        _write_whole(self.samples_path(task), map(asdict, samples))

    def samples(self, task: str) -> list[Sample]:
        """Empty where none were written."""
        return [_read(Sample, line) for line in _lines(self.samples_path(task))]

    def add_answer(self, model: str, task: str, answer: Answer) -> None:
        """Appends a line; it is on the disk's way when this returns. A half-written last line goes first."""
        path = self.answers_path(model, task)
        with self._lock:
            if path not in self._ready:
                path.parent.mkdir(parents=True, exist_ok=True)
                _drop_torn_line(path)
                self._ready.add(path)
            with open(path, "ab") as file:
                file.write(_line(asdict(answer)))

    def answers(self, model: str, task: str) -> dict[tuple[str, int], Answer]:
        """{(id, repeat): the last answer given}, errors too."""
        answers = (_read(Answer, line) for line in _lines(self.answers_path(model, task)))
        return {(answer.id, answer.repeat): answer for answer in answers}

    def write_scores(self, scores: Iterable[Score]) -> None:
        """In place of all scores of before."""
        _write_whole(self.scores_path, map(asdict, scores))

    def scores(self) -> list[Score]:
        """Empty where none were written."""
        return [_read(Score, line) for line in _lines(self.scores_path)]


def _line(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def _write_whole(path: Path, values: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    with open(aside, "wb") as file:
        file.writelines(_line(value) for value in values)
    os.replace(aside, path)


def _drop_torn_line(path: Path) -> None:
    """Cuts off what a killed process left without a line's end."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines. Raises UserError for one that is no JSON; a last one without its end is left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                problem = Problem(f"{path}:{number}", "no JSON", "a line that evaluate wrote", "Move the file away")
                raise UserError(problem) from None


def _read(kind: type[T], line: dict[str, Any]) -> T:
    values = {each.name: line[each.name] for each in fields(kind) if each.name in line}  # pyright: ignore[reportArgumentType]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
