"""Samples that can't be read and are left out (data.on_error=skip): what stands for them, the file that names them.

A skipped sample keeps its place: a stand-in without loss (SampleEncoder.stand_in) is computed instead, so that ranks
never wait for each other, counts of consumed samples stay exact and a resumed run goes on as the first one would have.
The stand-in carries the Skip, collate hands it to the main process in the batch, and vlmsft.runtime.skipped writes it
down. No rank asks another: the file is the count.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vlmsft.data.records import RecordFile
from vlmsft.errors import Problem, UserError

SKIPPED_KEY = "skipped"
"""Of a batch: the list of its Skips. Absent where there is none."""


class Skip(NamedTuple):  # a tuple: Lightning and pin_memory take batches apart, and leave these whole
    """One sample left out. `where` is file:line or shard:key; `dataset` the file or folder with `num_samples`."""

    where: str
    reason: str
    dataset: str
    num_samples: int


def skip_of(where: str, error: Exception, dataset: str, num_samples: int) -> Skip:
    """The Skip for what was raised while the sample at `where` was read."""
    if isinstance(error, UserError):
        reason = "; ".join(str(problem).removeprefix(where).lstrip(": ") for problem in error.problems)
    else:
        reason = f"{type(error).__name__}: {error}"
    return Skip(where, reason, dataset, num_samples)


class SkippedFile:
    """skipped_samples.jsonl: each skipped sample once, whichever ranks met it and however often.

    path: in the run folder. Processes append to it under a lock (fcntl, which NFS knows); nodes that don't share the
    folder count by themselves.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._known: tuple[int, Counter[str]] = (-1, Counter())  # size of the file, and what was in it

    def add(self, skips: Iterable[Skip]) -> list[Skip]:
        """Writes down those that the file doesn't hold yet, and gives them."""
        with open(self.path, "a+b") as file, _locked(file):
            file.seek(0)
            text = file.read()
            seen = {(row["dataset"], row["where"]) for row in _rows(text)}
            new = [skip for skip in dict.fromkeys(skips) if (skip.dataset, skip.where) not in seen]
            torn = b"\n" if text and not text.endswith(b"\n") else b""  # a process was killed while it wrote
            lines = [{"where": skip.where, "reason": skip.reason, "dataset": skip.dataset} for skip in new]
            file.write(torn + b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        return new

    def counts(self) -> Counter[str]:
        """Skipped samples of each dataset; the file is read again only when it has grown."""
        try:
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            return Counter()
        if size != self._known[0]:
            self._known = size, Counter(row["dataset"] for row in _rows(self.path.read_bytes()))
        return self._known[1]


def raise_above(share: float, skip: Skip, count: int, path: str | os.PathLike[str]) -> None:
    """Raises UserError where `count` skipped samples are more than `share` of the skip's dataset.

    path: the file that names them
    """
    if count > share * skip.num_samples:
        found = (
            f"{count} of {skip.num_samples} samples of {skip.dataset} unreadable, at last {skip.where}: {skip.reason}"
        )
        remedy = f"{path} names them all: mend or drop them, or raise the share"
        raise UserError(
            Problem("data.max_skipped_share", found, f"at most {share:g} of them", remedy), "the run stopped"
        )


def not_skippable(problems: list[Problem], path: str | os.PathLike[str], share: float) -> list[Problem]:
    """Of the problems found in a file of records before training, those that skipping doesn't solve: all where the
    records that they are in are more than `share` of the file's, else those that are in no record."""
    try:
        num_samples = len(RecordFile(path))
    except UserError:
        return problems
    elsewhere = [problem for problem in problems if not _in_a_record(problem, path)]
    records = {problem.where.partition(" turn ")[0] for problem in problems if _in_a_record(problem, path)}
    if len(records) <= share * num_samples:
        return elsewhere
    remedy = "Mend or drop them, or raise the share"
    found = f"{len(records)} of {num_samples} samples of {path} that would be skipped"
    return [Problem("data.max_skipped_share", found, f"at most {share:g} of them", remedy), *problems]


def _in_a_record(problem: Problem, path: str | os.PathLike[str]) -> bool:
    return problem.where.startswith((f"{path}:", f"{path}["))


def _rows(text: bytes) -> Iterator[dict]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # torn, see above
            yield json.loads(line)


@contextlib.contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """Where the file system has no locks, two ranks that meet the same sample at once may both write it down."""
    with contextlib.suppress(OSError):
        fcntl.lockf(file, fcntl.LOCK_EX)
    yield
    file.flush()  # closing, right after, gives the lock back
