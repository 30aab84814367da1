"""Conversation records in JSON and JSONL files: reading them, and every problem that can be known before training.

A record is LLaVA's: {"image": "a.jpg" or ["a.jpg", "b.jpg"] or absent,
"conversations": [{"from": "human", "value": "<image>\\nquestion"}, {"from": "gpt", "value": "answer"}, ...]}.
{"messages": [{"role": "user", "content": ...}, ...]} is read too; content is a string or a list of {"type": "text"} and
{"type": "image"} parts. `<image>` in a human turn marks where an image stands; elsewhere it is text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlmsft.errors import Problem, UserError, nearest

if TYPE_CHECKING:
    from vlmsft.data.encode import SampleEncoder

BLOCK = 1 << 24  # bytes of a file that are looked through at once
IMAGE_MARKER = "<image>"
IMAGE = None  # in Turn.parts: an image stands here

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class RecordProblem(Problem):
    """A problem of one record.

    kind: what it is counted as: "broken JSON", "no turns", "image names", "role", "content", "empty text", "no answer",
        "markers"
    """

    kind: str = ""


class Turn(NamedTuple):  # a tuple and not a dataclass for the sake of files with a million turns
    """One turn: `role` is user, assistant or system, `parts` are strings and IMAGE in the order of reading."""

    role: str
    parts: tuple[str | None, ...]

    @classmethod
    def from_text(cls, role: str, text: str) -> Turn:
        """A turn from LLaVA's text. Outer white space goes, as do newlines beside a marker; markers at the end of the
        text move to its front ("question\\n<image>" is "<image>\\nquestion": inference puts the image first)."""
        if role != "user" or IMAGE_MARKER not in text:
            return cls(role, (text.strip(),))
        texts = [piece.strip("\n") for piece in text.strip().split(IMAGE_MARKER)]
        texts[0], texts[-1] = texts[0].lstrip(), texts[-1].rstrip()
        if not any(piece.strip() for piece in texts[1:]):
            texts = [*texts[1:], texts[0].rstrip()]
        parts: list[str | None] = []
        for piece in texts:
            parts += [piece, IMAGE] if piece else [IMAGE]
        return cls(role, tuple(parts[:-1]))

    @property
    def text(self) -> str:
        parts = self.parts
        return parts[0] or "" if len(parts) == 1 else "".join(part for part in parts if part is not None)

    @property
    def num_images(self) -> int:
        return self.parts.count(IMAGE)


@dataclass(frozen=True)
class Conversation:
    """A record understood: its turns, and the image names in the order of the markers."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...]


class RecordFile:
    """The records of a JSON list or of a JSONL file (told apart by the first character), by index.

    A JSONL file is mapped into memory with one int64 offset for each record (156k records: 0.14 s, 2 MiB), so that
    ranks and workers share its pages; a JSON list is loaded. Pickles as its path. Raises UserError for a file that is
    missing, empty, or (JSON list) broken; a broken JSONL line is found when it is read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(_missing_file(self.path))
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.path.stat().st_size else b""
        first = self._map[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        self._list: list | None = self._load_list() if first == b"[" else None
        self._offsets = _record_offsets(self._map) if self._list is None else np.zeros(0, np.int64)
        if len(self) == 0:
            raise UserError(Problem(str(self.path), "no record", "a JSON list or one JSON object for each line"))

    def __reduce__(self):
        return (RecordFile, (self.path,))

    @property
    def is_list(self) -> bool:
        """A JSON list, which this process holds in memory."""
        return self._list is not None

    def __len__(self) -> int:
        return len(self._list) if self._list is not None else len(self._offsets)

    def __getitem__(self, index: int) -> Any:
        """The record, parsed. Raises UserError naming file and line when the line isn't JSON."""
        if self._list is not None:
            return self._list[index]
        try:
            return json.loads(self.line(index))
        except ValueError as error:
            raise UserError(_broken_json(self.where(index), error, "one whole JSON object on each line")) from None

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """(N,) bytes of each record as JSON: in a JSONL file up to the next record, without reading it; in a JSON list
        as UTF-8. Where a JSONL file escapes what isn't ASCII, a Japanese character has 6 bytes and not 3."""
        if self._list is not None:
            texts = (json.dumps(self._list[index], ensure_ascii=False) for index in indices.tolist())
            return np.array([len(text.encode(errors="surrogatepass")) for text in texts], np.int64)
        last = len(self) - 1
        ends = np.where(indices < last, self._offsets[np.minimum(indices + 1, last)], len(self._map))
        return ends - self._offsets[indices]

    def line(self, index: int) -> bytes:
        """The text of a JSONL file's record, without the line's end."""
        start = int(self._offsets[index])
        end = self._map.find(b"\n", start)
        return self._map[start : end if end >= 0 else len(self._map)]

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file's bytes (a second for a few gigabytes)."""
        return hashlib.sha256(self._map).hexdigest()

    def where(self, index: int) -> str:
        """`train.jsonl:12` (line, from 1); for a JSON list `train.json[11]` (record, from 0) and the record's id."""
        if self._list is None:
            return f"{self.path}:{self._line(index)}"
        record = self._list[index]
        identity = f" (id {record['id']})" if isinstance(record, dict) and "id" in record else ""
        return f"{self.path}[{index}]{identity}"

    def _line(self, index: int) -> int:
        """Counted for errors only, of which there may be many: at once where no line is blank."""
        if self._num_lines == len(self):
            return index + 1
        return _count_newlines(self._map, int(self._offsets[index])) + 1

    @functools.cached_property
    def _num_lines(self) -> int:
        return _count_newlines(self._map, len(self._map)) + (self._map[-1:] != b"\n")

    def _load_list(self) -> list:
        try:
            return json.loads(self._map[:])
        except ValueError as error:
            line = getattr(error, "lineno", 1)
            raise UserError(_broken_json(f"{self.path}:{line}", error, "one whole JSON list")) from None


def _record_offsets(text: bytes | mmap.mmap) -> np.ndarray:
    """Start of every line that isn't blank, (records,) int64."""
    begin, end = 3 if text[:3] == b"\xef\xbb\xbf" else 0, len(text)
    if begin >= end:
        return np.zeros(0, np.int64)
    characters = np.frombuffer(text, np.uint8)
    newlines = [  # block by block: a comparison takes a byte for each character
        np.flatnonzero(characters[start : start + BLOCK] == ord("\n")) + start for start in range(0, end, BLOCK)
    ]
    starts = np.concatenate([[begin], *(found + 1 for found in newlines)]).astype(np.int64)
    starts = starts[starts < end]
    is_record = characters[starts] == ord("{")
    for line in np.flatnonzero(~is_record).tolist():  # blank, indented or broken ones
        stop = starts[line + 1] if line + 1 < len(starts) else end
        is_record[line] = bool(text[starts[line] : stop].strip())
    return starts[is_record]


def _count_newlines(text: bytes | mmap.mmap, end: int) -> int:
    return sum(text[start : min(start + BLOCK, end)].count(b"\n") for start in range(0, end, BLOCK))


def _missing_file(path: Path) -> Problem:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    expected = "a JSON or JSONL file of records"
    if not beside:
        return Problem(str(path), "no such folder" if not path.parent.is_dir() else "no such file", expected)
    return Problem(str(path), "no such file", expected, nearest(path.name, beside))


def _broken_json(where: str, error: ValueError, expected: str) -> Problem:
    if isinstance(error, UnicodeDecodeError):
        found = f"text that is not UTF-8 ({error.reason})"
        return RecordProblem(where, found, f"{expected} in UTF-8", "Save the file as UTF-8", kind="broken JSON")
    column = getattr(error, "colno", None)
    found = getattr(error, "msg", str(error))
    broken = f"broken JSON ({found}{f', column {column}' if column else ''})"
    return RecordProblem(where, broken, expected, kind="broken JSON")


def parse(record: Any) -> Conversation:
    """The record as a Conversation. Raises UserError with all that is wrong in it (`named` adds file and line)."""
    problems, conversation = _parse(record)
    if problems or conversation is None:
        raise UserError(problems)
    return conversation


def _parse(record: Any) -> tuple[list[Problem], Conversation | None]:
    if not isinstance(record, dict):
        expected = "a JSON object with `conversations`"
        return [RecordProblem("", f"a {type(record).__name__}", expected, kind="no turns")], None
    turns_in = record.get("conversations", record.get("messages"))
    if not isinstance(turns_in, list) or not turns_in:
        keys = ", ".join(record) or "no key"
        expected = "a list of turns under `conversations` (or `messages`)"
        return [RecordProblem("", keys, expected, kind="no turns")], None
    problems: list[Problem] = []
    names = _image_names(record, problems)
    turns = [_turn(turn, number, names, problems) for number, turn in enumerate(turns_in, 1)]
    if problems:
        return problems, None
    problems = [*_text_problems(turns), *_order_problems(turns), *_marker_problems(turns, names)]
    return problems, Conversation(tuple(turns), tuple(names))


def _image_names(record: dict, problems: list[Problem]) -> list[str]:
    names = record.get("image", record.get("images"))
    if names is None:
        return []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        expected = "a file name, a list of file names or no `image` at all"
        problems.append(RecordProblem("", f"image = {_short(names)}", expected, kind="image names"))
        return []
    return list(names)


def _turn(turn: Any, number: int, names: list[str], problems: list[Problem]) -> Turn:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    value = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        expected = "human, gpt or system (user, assistant)"
        problems.append(RecordProblem(f" turn {number}", f"role {_short(role)}", expected, hint, kind="role"))
        return Turn("user", ("",))
    if isinstance(value, str):
        return Turn.from_text(ROLES[role], value)
    if isinstance(value, list) and (parts := _parts(value, names)) is not None:
        return Turn(ROLES[role], parts)
    expected = 'text, or a list of {"type": "text"} and {"type": "image"} parts'
    problems.append(RecordProblem(f" turn {number}", f"content {_short(value)}", expected, kind="content"))
    return Turn(ROLES[role], ("",))


def _parts(content: list, names: list[str]) -> tuple[str | None, ...] | None:
    """Parts of a content list, None if one isn't understood. An image part may name its file (`image` or `path`)."""
    parts: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image":
            name = part.get("image", part.get("path"))
            names += [name] if isinstance(name, str) else []
            parts.append(IMAGE)
        else:
            return None
    return tuple(parts)


def _text_problems(turns: list[Turn]) -> Iterator[RecordProblem]:
    for number, turn in enumerate(turns, 1):
        try:
            turn.text.encode()
        except UnicodeEncodeError:  # JSON may hold half of a surrogate pair; tokenizers don't take it
            expected = "text that UTF-8 can hold"
            yield RecordProblem(f" turn {number}", "half of a surrogate pair", expected, kind="content")


def _order_problems(turns: list[Turn]) -> Iterator[Problem]:
    number = 2 if turns[0].role == "system" else 1
    spoken = turns[number - 1 :]
    if all(turn.role != "assistant" for turn in turns):
        yield RecordProblem("", "no gpt turn", "at least one answer to learn", kind="no answer")
        return
    for offset, turn in enumerate(spoken):
        expected = "user" if offset % 2 == 0 else "assistant"
        if turn.role != expected:
            remedy = "Turns alternate, human first; one system turn may stand before them"
            where = f" turn {number + offset}"
            yield RecordProblem(where, f"role {turn.role}", f"role {expected}", remedy, kind="role")
            return
        if not turn.text.strip() and not turn.num_images:
            wanted = "an answer" if expected == "assistant" else "a question"
            yield RecordProblem(f" turn {number + offset}", "empty text", wanted, kind="empty text")
    if spoken[-1].role != "assistant":
        found = "a last question without an answer"
        yield RecordProblem(f" turn {len(turns)}", found, "a gpt turn at the end", kind="no answer")


def _marker_problems(turns: list[Turn], names: list[str]) -> Iterator[Problem]:
    if any(turn.num_images for turn in turns if turn.role != "user"):
        yield RecordProblem("", "an image part outside a user turn", "images in user turns only", kind="markers")
    num_markers = sum(turn.num_images for turn in turns)
    if num_markers != len(names):
        remedy = f"Write {IMAGE_MARKER} into the human turn once for each image: '{IMAGE_MARKER}\\nquestion'"
        found = f"{num_markers} {IMAGE_MARKER} for {len(names)} image(s)"
        yield RecordProblem("", found, "as many markers as images", remedy, kind="markers")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def find_problems(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None,
    *,
    verify_images: int = 1000,
    encoder: SampleEncoder | None = None,
    progress: Callable[[int, int], None] | None = None,
    not_decoded: Callable[[int], None] | None = None,
    num_threads: int = 16,
) -> list[Problem]:
    """Every problem in a whole file of records; empty when all is well.

    Costs one JSON parse for each record and one stat for each distinct image (150k records: seconds on a local disk).
    image_folder: relative image names start here; None when all names are absolute or no record has an image
    verify_images: decode the images as well if the records name at most so many (1 to 5 ms each, on all cores); in a
        larger set an unreadable image is found when training reads it
    encoder: also look for samples that the encoder's decoder_seq_length would leave without image or answer (encodes
        only records long enough to be cut)
    progress: called now and then with (done, total) units of work
    not_decoded: called with the number of images where they are more than verify_images
    """
    try:
        records = RecordFile(path)
    except UserError as error:
        return error.problems
    problems: list[Problem] = []
    no_folder = image_folder is not None and not Path(image_folder).is_dir()
    if no_folder:  # said once, not again for each image in it
        expected = "the folder that image names in records start from"
        problems.append(Problem(str(image_folder), "no such folder", expected))
    if encoder is not None:
        try:
            _ = encoder.image_token_id  # loads the processor: once, not for each record if it fails
        except UserError as error:
            problems += error.problems
            encoder = None
    first_use: dict[str, int] = {}
    total = 2 * len(records)
    for index in range(len(records)):
        problems += _record_problems(records, index, encoder, first_use)
        if progress and index % 1000 == 0:
            progress(index, total)
    if not no_folder:
        verify = len(first_use) <= verify_images
        if not verify and not_decoded:
            not_decoded(len(first_use))
        problems += _image_problems(records, first_use, image_folder, verify, progress, num_threads)
    if progress:
        progress(total, total)
    return problems


def _record_problems(
    records: RecordFile, index: int, encoder: SampleEncoder | None, first_use: dict[str, int]
) -> Iterable[Problem]:
    try:
        record = records[index]
    except UserError as error:
        return error.problems
    problems, conversation = _parse(record)
    if problems:  # the line number costs a scan of the file up to here: only for what is reported
        return named(problems, records.where(index))
    assert conversation is not None
    for name in conversation.images:
        first_use.setdefault(name, index)
    if encoder is not None and _most_tokens(conversation) > encoder.decoder_seq_length:
        try:
            encoder.encode_text(conversation.turns)
        except UserError as error:
            return named(error.problems, records.where(index))
    return []


def _most_tokens(conversation: Conversation) -> int:
    """No tokenizer makes more tokens: one for each byte and image, and the template's own around the turns."""
    text = sum(len(turn.text.encode(errors="surrogatepass")) + turn.num_images for turn in conversation.turns)
    return text + 16 * len(conversation.turns) + 128


def _image_problems(
    records: RecordFile,
    first_use: dict[str, int],
    image_folder: str | os.PathLike | None,
    verify: bool,
    progress: Callable[[int, int], None] | None,
    num_threads: int,
) -> list[Problem]:
    def check_chunk(chunk: list[tuple[str, int]]) -> list[Problem]:
        return [problem for name, index in chunk for problem in check(name, index)]

    def check(name: str, index: int) -> list[Problem]:
        path = image_path(name, image_folder)
        if not path.is_file():
            expected = f"image {name} at {path}"
            return [
                Problem(records.where(index), "no such image file", expected, "Check data.image_folder and the name")
            ]
        if verify:
            from vlmsft.data.encode import load_image

            try:
                load_image(path)
            except UserError as error:
                return named(error.problems, records.where(index))
        return []

    problems: list[Problem] = []
    with ThreadPoolExecutor(num_threads) as pool:  # stat calls of a network file system wait, they don't compute
        items = list(first_use.items())
        chunks = [items[start : start + 256] for start in range(0, len(items), 256)]
        for done, found in enumerate(pool.map(check_chunk, chunks)):
            problems += found
            if progress:
                progress(len(records) + done * len(records) // len(chunks), 2 * len(records))
    return problems


def image_path(name: str, image_folder: str | os.PathLike | None) -> Path:
    """Where the image lies; absolute names stay as they are."""
    return Path(name) if image_folder is None else Path(image_folder) / name


def named(problems: Iterable[Problem], where: str) -> list[Problem]:
    """The problems of one record ("" or " turn 2" as `where`), with the record's own name in front."""
    return [replace(problem, where=f"{where}{problem.where}") for problem in problems]


def capped(problems: list[Problem], limit: int = 20) -> list[Problem]:
    """The first `limit` problems and, if there are more, one that counts the rest."""
    if len(problems) <= limit:
        return problems
    rest = len(problems) - limit
    return [*problems[:limit], Problem("...", f"{rest} more like these", "none")]
