"""What a worker process reads: a slice of records, a few images or a shard, each giving a Part that adds up."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmsft.data.check.findings import Finding
from vlmsft.data.check.pictures import Picture, look, thumbnail
from vlmsft.data.check.sources import SAMPLES_OF_SHARD, samples_of
from vlmsft.data.check.statistics import SIZE_STEP, Statistics
from vlmsft.data.encode import IGNORE, SampleEncoder
from vlmsft.data.energon_shards import RECORD_PART, image_parts, record_of
from vlmsft.data.records import Conversation, RecordFile, RecordProblem, image_path, parse
from vlmsft.errors import UserError

NUM_EXTREMES = 6
NUM_THUMBNAILS = 6
"""Thumbnails that a shard's findings of one kind carry: their pictures can't be looked up later."""
ENDLESS = 1 << 30


class Settings(NamedTuple):
    """images: "full" decodes each image, "headers" reads its size, "none" only looks whether the file is there"""

    processor: str
    decoder_seq_length: int
    images: str


class Extreme(NamedTuple):
    """A sample of unusual size: tokens of the text, or pixels of the image."""

    size: int
    where: str
    text: str
    image: str | bytes | None


@dataclass
class Part:
    """What was found in some samples; small, whatever their number.

    records, ids, images: [(8-byte hash of it, its place)], a place being a record's number in its file
    """

    num_units: int = 0  # records, images or shards, as the task counts
    statistics: Statistics = field(default_factory=Statistics)
    findings: list[Finding] = field(default_factory=list)
    records: list[tuple[int, int]] = field(default_factory=list)
    ids: list[tuple[int, int]] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    longest: list[Extreme] = field(default_factory=list)
    largest: list[Extreme] = field(default_factory=list)
    smallest: list[Extreme] = field(default_factory=list)

    def packed(self) -> Part:
        """Hashes as (n, 2) uint64 arrays: they go to the main process, and stay there."""
        for name in ("records", "ids", "images"):
            setattr(self, name, np.array(getattr(self, name), np.uint64).reshape(-1, 2))
        return self


def hash_of(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class RecordTask(NamedTuple):
    """Records `start` to `stop` of a file. `items` holds them where the file is a JSON list, which only the main
    process loads."""

    path: str
    image_folder: str | None
    start: int
    stop: int
    items: list[Any] | None = None


class ImageTask(NamedTuple):
    """Images by path; for each the record that names it first, and how many do."""

    paths: list[str]
    wheres: list[str]
    uses: list[int]


class ShardTask(NamedTuple):
    """number: of the shard in its split; count: records that the metadata says it has"""

    path: str
    number: int
    count: int


Task = RecordTask | ImageTask | ShardTask


class Reader:
    """Reads tasks; one in each worker process."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.encoder = SampleEncoder(settings.processor, ENDLESS)
        self.limited = self.encoder.with_limit(settings.decoder_seq_length)

    def read(self, task: Task) -> Part:
        if isinstance(task, RecordTask):
            return self.read_records(task).packed()
        return (self.read_images(task) if isinstance(task, ImageTask) else self.read_shard(task)).packed()

    # --- records ------------------------------------------------------------------------------------------------------

    def read_records(self, task: RecordTask) -> Part:
        part = Part(num_units=task.stop - task.start)
        records = _open(task.path) if task.items is None else _ListSlice(task.path, task.start, task.items)
        for index in range(task.start, task.stop):
            part.statistics.num_records += 1
            try:
                record = records[index]
                conversation = parse(record)
            except UserError as error:
                _add_problems(part, error, records.where(index), None)
                continue
            paths = [str(image_path(name, task.image_folder)) for name in conversation.images]
            _add_hashes(part, record, conversation, index)
            part.images += [(hash_of(path), index) for path in paths]
            self._add_text(part, conversation, lambda index=index: records.where(index), paths[0] if paths else None)
        return part

    def _add_text(self, part: Part, conversation: Conversation, where: Any, image: str | bytes | None) -> None:
        """where: gives the sample's name; called for what is reported"""
        limit, statistics = self.settings.decoder_seq_length, part.statistics
        text = self.encoder.encode_text(conversation.turns)
        length = len(text.tokens)
        statistics.token_lengths.add(length)
        statistics.answer_lengths.add(int((text.labels != IGNORE).sum()))
        statistics.turns.add(len(conversation.turns))
        statistics.images_per_sample.add(len(conversation.images))
        if len(part.longest) < NUM_EXTREMES or length > part.longest[0].size:
            _keep(part.longest, Extreme(length, where(), f"{length} tokens", image))
        if length <= limit:
            return
        try:
            self.limited.encode_text(conversation.turns)
        except UserError as error:
            part.findings += [Finding("too long", where(), _said(problem), image) for problem in error.problems]
            return
        statistics.num_truncated_tokens += length - limit
        lost = int((text.labels[limit:] != IGNORE).sum())
        found = f"{length} tokens: {length - limit} are cut, {lost} of them of answers"
        part.findings.append(Finding("truncated", where(), found, image))

    # --- images -------------------------------------------------------------------------------------------------------

    def read_images(self, task: ImageTask) -> Part:
        part = Part(num_units=len(task.paths))
        for path, where, uses in zip(task.paths, task.wheres, task.uses, strict=True):
            if not Path(path).is_file():
                part.findings.append(Finding("missing image", where, f"{path}{_used(uses)}"))
            elif self.settings.images != "none":
                self._add_image(part, path, path, where, _used(uses))
        return part

    def _add_image(self, part: Part, source: str | bytes, name: str, where: str, used: str) -> None:
        try:
            picture = look(source, decode=self.settings.images == "full")
        except UserError as error:
            found = "; ".join(problem.found for problem in error.problems)
            part.findings.append(Finding("unreadable image", where, f"{_without_buffer(found, name)}{used}", source))
            return
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
            found = f"{name} ({type(error).__name__}: {error}){used}"
            part.findings.append(Finding("unreadable image", where, found, source))
            return
        self._add_picture(part, picture, source, f"{where}: {name}")

    def _add_picture(self, part: Part, picture: Picture, source: str | bytes, where: str) -> None:
        statistics = part.statistics
        rows, columns = self.encoder.canvas(picture.width, picture.height)
        statistics.tiles.add(rows * columns)
        statistics.canvases[rows, columns] += 1
        statistics.sizes[picture.width // SIZE_STEP, picture.height // SIZE_STEP] += 1
        statistics.image_formats[picture.format] += 1
        area = picture.width * picture.height
        for extremes, size in ((part.largest, area), (part.smallest, -area)):
            if len(extremes) < NUM_EXTREMES or size > extremes[0].size:
                _keep(extremes, Extreme(size, where, f"{picture.width} x {picture.height} pixels", source))

    # --- shards -------------------------------------------------------------------------------------------------------

    def read_shard(self, task: ShardTask) -> Part:
        part, number, broken = Part(num_units=1), 0, ""
        pictures = _Thumbnails()
        try:
            for number, (key, members) in enumerate(samples_of(task.path), 1):
                place = task.number * SAMPLES_OF_SHARD + number - 1
                before = len(part.findings)
                self._read_sample(part, f"{task.path}:{key}", place, members)
                part.findings[before:] = [pictures.shrunk(finding) for finding in part.findings[before:]]
        except Exception as error:  # tarfile raises ReadError, EOFError, OSError, ...
            broken = f" ({type(error).__name__}: {error})"
        if broken or number != task.count:
            found = f"{number} samples read{broken}, {task.count} in the metadata"
            part.findings.append(Finding("shard", task.path, found))
        for extremes in (part.longest, part.largest, part.smallest):
            extremes[:] = [extreme._replace(image=_small(extreme.image)) for extreme in extremes]
        return part

    def _read_sample(self, part: Part, where: str, place: int, members: list[tuple[str, bytes]]) -> None:
        part.statistics.num_records += 1
        parts = dict(members)
        names = image_parts(parts)
        images = list(names.values())
        first = images[0] if images else None
        if len(parts) < len(members):
            part.findings.append(Finding("merged", where, f"parts {', '.join(name for name, _ in members)}", first))
        if RECORD_PART not in parts:
            part.findings.append(Finding("missing part", where, f"parts {', '.join(parts)}", first))
            return
        try:
            record = record_of(parts, list(names))
            conversation = parse(record)
        except UserError as error:
            _add_problems(part, error, where, first)
            return
        _add_hashes(part, record, conversation, place)
        if len(images) != len(conversation.images):
            found = f"{len(conversation.images)} image(s) in the record, {len(images)} in the shard"
            part.findings.append(Finding("missing image", where, found, first))
        for data, name in zip(images, conversation.images, strict=False):
            if self.settings.images != "none":
                self._add_image(part, data, name, where, "")
        self._add_text(part, conversation, lambda: where, first)


class _Thumbnails:
    """Small pictures for the whole ones of a shard, which only its reader has; for the first findings of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def shrunk(self, finding: Finding) -> Finding:
        self.counts[finding.kind] += 1
        enough = self.counts[finding.kind] > NUM_THUMBNAILS
        return finding._replace(image=None if enough else _small(finding.image))


def _small(image: str | bytes | None) -> bytes | None:
    return None if image is None else thumbnail(image)


def _add_problems(part: Part, error: UserError, where: str, image: bytes | None) -> None:
    for problem in error.problems:
        kind = problem.kind if isinstance(problem, RecordProblem) else "broken JSON"  # of a shard
        turn = problem.where.removeprefix(where)
        part.findings.append(Finding(kind, f"{where}{turn}", _said(problem), image))


def _said(problem: Any) -> str:
    return f"{problem.found}, expected {problem.expected}"


def _used(uses: int) -> str:
    return "" if uses == 1 else f", in {uses} places"


def _without_buffer(found: str, name: str) -> str:
    """Pillow's name for an image that was read from memory, replaced by the image's own."""
    return re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", name, found).removeprefix("unreadable image ")


def _add_hashes(part: Part, record: Any, conversation: Conversation, place: int) -> None:
    part.records.append((hash_of(repr(conversation)), place))
    if "id" in record:
        part.ids.append((hash_of(repr(record["id"])), place))


def _keep(extremes: list[Extreme], extreme: Extreme) -> None:
    """Keeps the largest NUM_EXTREMES in a heap."""
    if len(extremes) < NUM_EXTREMES:
        heapq.heappush(extremes, extreme)
    else:
        heapq.heappushpop(extremes, extreme)


class _ListSlice:
    """A piece of a JSON list, which names records as RecordFile does."""

    def __init__(self, path: str, start: int, items: list[Any]):
        self.path, self.start, self.items = path, start, items

    def __getitem__(self, index: int) -> Any:
        return self.items[index - self.start]

    def where(self, index: int) -> str:
        record = self[index]
        identity = f" (id {record['id']})" if isinstance(record, dict) and "id" in record else ""
        return f"{self.path}[{index}]{identity}"


@lru_cache(maxsize=4)
def _open(path: str) -> RecordFile:
    return RecordFile(path)
