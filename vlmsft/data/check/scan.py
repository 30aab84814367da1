"""Reads data sets from end to end in parallel and adds up what is in them.

Memory: 16 bytes for each record, id and image name (to find what stands there twice), a few kilobytes for the rest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from vlmsft.data.check.findings import KINDS, REMARK, Finding
from vlmsft.data.check.parts import (
    NUM_EXTREMES,
    Extreme,
    ImageTask,
    Part,
    RecordTask,
    Settings,
    ShardTask,
    Task,
    hash_of,
)
from vlmsft.data.check.processes import Readers
from vlmsft.data.check.sources import Records, Shards
from vlmsft.data.check.statistics import Statistics
from vlmsft.data.records import parse

RECORDS_OF_TASK, IMAGES_OF_TASK = 2000, 200
MAX_REMARKS = 1000
"""Remarks of a kind that are named one by one: with LLaVA's data most ids are not unique."""

Progress = Callable[[str, int, int], None]
"""Called with (what is counted, how many of them are read, how many there are)."""


class Stage(NamedTuple):
    name: str  # records, images or shards
    total: int
    tasks: Iterator[tuple[int, Task]]  # with the number of the data set


@dataclass
class Scan:
    """What is known about the data sets, all of it once `is_complete`.

    counts: findings of each kind; examples: the first few of each
    splits: records read of each split
    """

    sets: Sequence[Records | Shards]
    num_examples: int
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    splits: Counter[str] = field(default_factory=Counter)
    read: dict[str, tuple[int, int]] = field(default_factory=dict)  # stage: (done, total)
    longest: list[Extreme] = field(default_factory=list)
    largest: list[Extreme] = field(default_factory=list)
    smallest: list[Extreme] = field(default_factory=list)
    is_complete: bool = False

    def __post_init__(self):
        self._hashes: dict[str, list[tuple[int, np.ndarray]]] = {"records": [], "ids": [], "images": []}

    @property
    def is_clean(self) -> bool:
        """Whether training would take all of it as it is."""
        return all(KINDS[kind].outcome == REMARK for kind in self.counts)

    def run(self, settings: Settings, num_workers: int, findings_path: Path, progress: Progress) -> None:
        """Reads everything; Ctrl-C ends it early, and leaves what is known by then.

        findings_path: gets a line of JSON for each finding
        """
        with open(findings_path, "w", encoding="utf-8") as file:
            try:
                with Readers(settings, num_workers) as readers:
                    for stage in self._stages():
                        self._read(stage, readers, file, progress)
                self.is_complete = True
            except KeyboardInterrupt:
                pass
            for finding in self._repetitions():
                self._add_finding(finding, file)

    def _read(self, stage: Stage, readers: Readers, file: IO[str], progress: Progress) -> None:
        done, total = 0, stage.total
        self.read[stage.name] = (done, total)
        progress(stage.name, done, total)
        for number, part in readers.read(stage.tasks):
            done += part.num_units
            self.read[stage.name] = (done, total)
            self._add(number, part, file)
            progress(stage.name, done, total)

    def _stages(self) -> Iterator[Stage]:
        records = [(number, one) for number, one in enumerate(self.sets) if isinstance(one, Records)]
        shards = [(number, one) for number, one in enumerate(self.sets) if isinstance(one, Shards)]
        if records:
            yield Stage("records", sum(len(one.file) for _, one in records), _record_tasks(records))
            first_uses = self._first_uses()
            yield Stage("images", len(first_uses[0]), self._image_tasks(*first_uses))
        if shards:
            tasks = (
                (number, ShardTask(str(Path(one.folder, name)), place, one.counts[name]))
                for number, one in shards
                for place, name in enumerate(one.names)
            )
            yield Stage("shards", sum(len(one.names) for _, one in shards), tasks)

    def _add(self, number: int, part: Part, file: IO[str]) -> None:
        self.statistics.merge(part.statistics)
        self.splits[self.sets[number].split] += part.statistics.num_records
        for name, hashes in self._hashes.items():
            if len(getattr(part, name)):
                hashes.append((number, getattr(part, name)))
        for name in ("longest", "largest", "smallest"):
            setattr(self, name, sorted([*getattr(self, name), *getattr(part, name)], reverse=True)[:NUM_EXTREMES])
        for finding in part.findings:
            self._add_finding(finding, file)

    def _add_finding(self, finding: Finding, file: IO[str]) -> None:
        self.counts[finding.kind] += 1
        examples = self.examples.setdefault(finding.kind, [])
        if len(examples) < self.num_examples:
            examples.append(finding)
        if finding.outcome != REMARK or self.counts[finding.kind] <= MAX_REMARKS:
            row = {"kind": finding.kind, "outcome": finding.outcome, "where": finding.where, "found": finding.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    # --- what stands there more than once -----------------------------------------------------------------------------

    def _all(self, name: str, split: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hashes, places, numbers of the data sets), ordered by data set and place."""
        found = [(n, rows) for n, rows in self._hashes[name] if split in (None, self.sets[n].split)]
        if not found:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64)
        rows = np.concatenate([rows for _, rows in found])
        numbers = np.repeat([n for n, _ in found], [len(rows) for _, rows in found])
        order = np.lexsort((rows[:, 1], numbers))
        return rows[order, 0], rows[order, 1], numbers[order]

    def _first_uses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(hash, place, data set, number of uses) of each distinct image, in the order of the records."""
        hashes, places, numbers = self._all("images")
        self._hashes["images"].clear()
        _, first, uses = np.unique(hashes, return_index=True, return_counts=True)
        order = np.argsort(first)
        first = first[order]
        return hashes[first], places[first], numbers[first], uses[order]

    def _image_tasks(self, *first_uses: np.ndarray) -> Iterator[tuple[int, Task]]:
        for start in range(0, len(first_uses[0]), IMAGES_OF_TASK):
            task, number = ImageTask([], [], []), 0
            for key, place, number, uses in zip(
                *(column[start : start + IMAGES_OF_TASK].tolist() for column in first_uses), strict=True
            ):
                one = self.sets[number]
                assert isinstance(one, Records)
                paths = [one.image(name) for name in parse(one.file[place]).images]
                task.paths.append(next(path for path in paths if hash_of(path) == key))
                task.wheres.append(one.where(place))
                task.uses.append(uses)
            yield number, task

    def _repetitions(self) -> Iterator[Finding]:
        for kind, name in (("same id", "ids"), ("same record", "records")):
            for split in ("training", "validation"):
                hashes, places, numbers = self._all(name, split)
                _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
                for position in np.setdiff1d(np.arange(len(hashes)), first).tolist():
                    before = int(first[inverse[position]])
                    yield Finding(kind, self._where(numbers, places, position), self._as(numbers, places, before))
        yield from self._in_both()

    def _in_both(self) -> Iterator[Finding]:
        training, its_places, its_numbers = self._all("records", "training")
        validation, places, numbers = self._all("records", "validation")
        values, first = np.unique(training, return_index=True)
        for position in np.flatnonzero(np.isin(validation, values)).tolist():
            before = int(first[np.searchsorted(values, validation[position])])
            where = self._where(numbers, places, position)
            yield Finding("in both", where, self._as(its_numbers, its_places, before))

    def _as(self, numbers: np.ndarray, places: np.ndarray, position: int) -> str:
        return f"as {self._where(numbers, places, position)}"

    def _where(self, numbers: np.ndarray, places: np.ndarray, position: int) -> str:
        return self.sets[int(numbers[position])].where(int(places[position]))


def _record_tasks(records: Iterable[tuple[int, Records]]) -> Iterator[tuple[int, Task]]:
    for number, one in records:
        for start in range(0, len(one.file), RECORDS_OF_TASK):
            stop = min(start + RECORDS_OF_TASK, len(one.file))
            items = [one.file[index] for index in range(start, stop)] if one.file.is_list else None
            yield number, RecordTask(one.path, one.image_folder, start, stop, items)
