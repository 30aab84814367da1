"""Questions from a file: training records, whose last answer becomes the reference, or {"id", "image", "prompt"}.

Reading them imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmsft.data.records import IMAGE_MARKER, RecordFile, Turn, image_path, named, parse
from vlmsft.errors import Problem, UserError

if TYPE_CHECKING:
    from vlmsft.generation.generate import Prompt

PLACEHOLDER = {"from": "gpt", "value": "-"}
"""Stands for the answer of a conversation that ends with its question."""


@dataclass(frozen=True)
class Question:
    """A question of a file.

    index: of its record, from 0; id: the record's own, None without one
    images: file names as in the record, in the order of their image parts in `turns`
    turns: up to the user turn that asks
    reference: the record's answer; None where it has none
    where: file and line, for messages
    """

    index: int
    id: Any
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    reference: str | None
    where: str

    @property
    def text(self) -> str:
        """The last turn, with <image> where its images stand."""
        return "".join(IMAGE_MARKER if part is None else part for part in self.turns[-1].parts)

    @property
    def num_characters(self) -> int:
        return sum(len(turn.text) for turn in self.turns)

    def prompt(self, image_folder: str | None) -> Prompt:
        """Raises UserError for an image that can't be read."""
        from vlmsft.data.encode import load_image
        from vlmsft.generation.generate import Prompt

        images = tuple(load_image(image_path(name, image_folder), self.where) for name in self.images)
        return Prompt(self.turns, images)


def read_questions(records: RecordFile) -> tuple[list[Question], list[Problem]]:
    """All that can be asked, in file order, and what is wrong with the rest."""
    questions: list[Question] = []
    problems: list[Problem] = []
    for index in range(len(records)):
        try:
            questions.append(_question(index, records))
        except UserError as error:
            problems += error.problems
    return questions, problems


def _question(index: int, records: RecordFile) -> Question:
    record = records[index]  # its UserError has file and line
    where = records.where(index)
    try:
        turns, images = _prompt_turns(record) if _is_prompt(record) else _conversation_turns(record)
    except UserError as error:
        raise UserError(named(error.problems, where)) from None
    reference = record.get("reference", record.get("answer")) if _is_prompt(record) else None
    if turns[-1].role == "assistant":
        turns, reference = turns[:-1], turns[-1].text
    return Question(index, record.get("id", record.get("question_id")), images, turns, reference, where)


def _is_prompt(record: Any) -> bool:
    return isinstance(record, dict) and "prompt" in record


def _prompt_turns(record: dict) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    names = record.get("image", record.get("images")) or []
    names = [names] if isinstance(names, str) else names
    text = record["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(Problem("", f"prompt = {text!r}", "a question"))
    if isinstance(names, list) and IMAGE_MARKER not in text:
        text = IMAGE_MARKER * len(names) + text
    conversation = parse({"image": names, "conversations": [{"from": "human", "value": text}, PLACEHOLDER]})
    return conversation.turns[:-1], conversation.images


def _conversation_turns(record: Any) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    for key in ("conversations", "messages"):
        turns = record.get(key) if isinstance(record, dict) else None
        if isinstance(turns, list) and turns and _asks(turns[-1]):
            conversation = parse({**record, key: [*turns, PLACEHOLDER]})
            return conversation.turns[:-1], conversation.images
    conversation = parse(record)
    return conversation.turns, conversation.images


def _asks(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("from", turn.get("role")) in ("human", "user")


def image_problems(
    questions: list[Question],
    image_folder: str | os.PathLike[str] | None,
    verify_images: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Images that are missing, or, if there are at most `verify_images`, can't be read; each at its first question."""
    from vlmsft.data.encode import load_image

    if image_folder is not None and not Path(image_folder).is_dir():
        return [
            Problem("image_folder", f"{image_folder}, which is no folder", "the folder that image names start from")
        ]
    first_use: dict[str, Question] = {}
    for question in questions:
        for name in question.images:
            first_use.setdefault(name, question)
    verify = len(first_use) <= verify_images

    def check(item: tuple[str, Question]) -> list[Problem]:
        name, question = item
        path = image_path(name, image_folder)
        if not path.is_file():
            return [Problem(question.where, "no such image file", f"image {name} at {path}", "Check image_folder")]
        try:
            if verify:
                load_image(path, question.where)
        except UserError as error:
            return error.problems
        return []

    with ThreadPoolExecutor(16) as pool:
        return list(_flatten(pool.map(check, first_use.items()), len(first_use), progress))


def _flatten(
    found: Iterator[list[Problem]], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[Problem]:
    for done, problems in enumerate(found, 1):
        if progress:
            progress(done, total)
        yield from problems
