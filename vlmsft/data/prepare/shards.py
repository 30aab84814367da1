"""WebDataset shards of a prepared record file.

What a shard holds: shards/train-00000.tar, train-00001.tar, ... and val-00000.tar, ... are plain ustar files. A record
is a run of members that share a key, NNNNNNNNN.<part>, where NNNNNNNNN is the record's number (from 0, nine digits) in
training.jsonl or validation.jsonl. It isn't the record's own id: LLaVA's ids are the image's, and readers merge records
that follow each other under one key. Parts, in this order:

    0.jpg, 1.png, ...  the images in the order of their markers: <position>.<suffix of the name in lower case, img
                       where it has none>; the bytes of the original files, not encoded again; none for text alone
    json               the record's line in the JSONL file, as vlmsft.data.records.parse reads it: {"image": name or
                       [names] or absent, "conversations" (or "messages"): [...]}; the names stand for parts 0., 1., ...

The same input gives the same bytes: owner, time and mode are constant.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from vlmsft.data.prepare.files import sha256_of, written_aside
from vlmsft.data.prepare.threads import in_threads
from vlmsft.data.records import RecordFile, image_path

BLOCK = tarfile.BLOCKSIZE
MEBIBYTE = 1 << 20
CHUNK = 4 * MEBIBYTE
ZEROS = bytes(BLOCK)


@dataclass(frozen=True)
class Shard:
    """A shard to be written.

    image_folder: where the records' image names start
    indices: (records,) int64, numbers of the records in their file, in the order of the shard
    num_bytes: exact size of the tar
    """

    path: Path
    records: RecordFile
    image_folder: Path | None
    indices: np.ndarray
    num_bytes: int

    @property
    def is_finished(self) -> bool:
        """Shards appear whole under their name, so its size tells it from another plan's."""
        return self.path.is_file() and self.path.stat().st_size == self.num_bytes


@dataclass(frozen=True)
class WrittenShard:
    """name: of the file; sha256: of its bytes"""

    name: str
    num_records: int
    num_bytes: int
    sha256: str


def plan(
    folder: Path,
    prefix: str,
    records: RecordFile,
    image_folder: Path | None,
    *,
    max_mb: float,
    max_records: int,
    shuffle_seed: int | None,
) -> list[Shard]:
    """The shards of a record file, each of at most max_mb mebibytes (or one record) and max_records records.

    Costs one JSON parse for each record and one stat for each distinct image.
    shuffle_seed: records are permuted by it over all shards; None keeps the file's order
    """
    order = np.arange(len(records))
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(len(records))
    size_of = functools.cache(lambda name: image_path(name, image_folder).stat().st_size)
    cuts, size, sizes = [0], 0, []
    for position, index in enumerate(order):
        record_bytes = _record_bytes(records, int(index), size_of)
        is_full = position > cuts[-1] and (
            size + record_bytes > max_mb * MEBIBYTE or position - cuts[-1] == max_records
        )
        if is_full:
            cuts.append(position)
            sizes.append(size)
            size = 0
        size += record_bytes
    bounds = zip(cuts, [*cuts[1:], len(order)], [*sizes, size], strict=True)
    return [
        Shard(folder / f"{prefix}-{number:05d}.tar", records, image_folder, order[start:end], _tar_bytes(size))
        for number, (start, end, size) in enumerate(bounds)
    ]


def _record_bytes(records: RecordFile, index: int, size_of: Callable[[str], int]) -> int:
    """Bytes of a record's members: headers, contents and padding."""
    line = records.line(index)
    sizes = [len(line), *(size_of(name) for name in image_names(json.loads(line)))]
    return sum(BLOCK + size + -size % BLOCK for size in sizes)


def _tar_bytes(member_bytes: int) -> int:
    """With the end mark of two zero blocks, padded to whole tar records as tar writes it."""
    end = member_bytes + 2 * BLOCK
    return end + -end % tarfile.RECORDSIZE


def image_names(record: dict) -> list[str]:
    """The images of a prepared record, which names them under `image` only."""
    names = record.get("image", [])
    return [names] if isinstance(names, str) else names


def part_name(position: int, image_name: str) -> str:
    """A tar's names are of ASCII and short: what follows a name's last dot may be neither."""
    suffix = Path(image_name).suffix[1:].lower()
    return f"{position}.{suffix if re.fullmatch(r'[a-z0-9]{1,8}', suffix) else 'img'}"


def write(shard: Shard) -> WrittenShard:
    """Writes a shard that isn't finished; a finished one is only hashed."""
    if shard.is_finished:
        return WrittenShard(shard.path.name, len(shard.indices), shard.num_bytes, sha256_of(shard.path))
    folder = os.fspath(shard.image_folder or "")
    with written_aside(shard.path) as file, ThreadPoolExecutor(1) as hashing:
        tar = TarWriter(file, hashing)
        for index in shard.indices:
            line = shard.records.line(int(index))
            for position, name in enumerate(image_names(json.loads(line))):
                tar.add(f"{index:09d}.{part_name(position, name)}", _read(folder, name))
            tar.add(f"{index:09d}.json", line)
        tar.close()
    return WrittenShard(shard.path.name, len(shard.indices), tar.num_bytes, tar.sha256)


def _read(folder: str, name: str) -> bytes:
    """pathlib would cost as much as the reading."""
    with open(os.path.join(folder, name), "rb", buffering=0) as file:
        return file.read()


class TarWriter:
    """Appends members to a ustar file and hashes its bytes on the way, a few MiB at a time: each call that
    releases the GIL costs a wait for it.

    hashing: a pool of one thread, where a chunk is hashed while the next one is read
    """

    def __init__(self, file: IO[bytes], hashing: ThreadPoolExecutor):
        self.file = file
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._hashing = hashing
        self._last_hashed: Future | None = None
        self._waiting: list[bytes] = []
        self._num_waiting = 0

    @property
    def sha256(self) -> str:
        """Of all that was written; after close()."""
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes) -> None:
        """name: at most 100 ASCII characters; data: under 8 GiB"""
        self._append(header(name.encode("ascii"), len(data)))
        self._append(data)
        self._append(ZEROS[: -len(data) % BLOCK])
        if self._num_waiting >= CHUNK:
            self._flush()

    def close(self) -> None:
        """The end mark; the file itself stays open."""
        end = self.num_bytes + self._num_waiting
        self._append(bytes(_tar_bytes(end) - end))
        self._flush()
        if self._last_hashed is not None:
            self._last_hashed.result()

    def _append(self, data: bytes) -> None:
        self._waiting.append(data)
        self._num_waiting += len(data)

    def _flush(self) -> None:
        chunk = b"".join(self._waiting)
        self.file.write(chunk)
        if self._last_hashed is not None:
            self._last_hashed.result()  # at most two chunks in memory
        self._last_hashed = self._hashing.submit(self._digest.update, chunk)
        self.num_bytes += len(chunk)
        self._waiting, self._num_waiting = [], 0


def header(name: bytes, size: int) -> bytes:
    """The block that tarfile.TarInfo(name).tobuf(USTAR_FORMAT) makes for a file of `size` bytes, ten times faster."""
    block = bytearray(_EMPTY_HEADER)
    digits = b"%011o" % size
    block[: len(name)] = name
    block[124:135] = digits
    block[148:154] = b"%06o" % (_EMPTY_SUM + sum(name) + sum(digits))
    return bytes(block)


def _empty_header() -> tuple[bytes, int]:
    """The header of a nameless file, its size blank, and the sum of its bytes with a checksum of spaces."""
    block = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
    block[124:135] = bytes(11)
    return bytes(block), sum(block[:148]) + 8 * ord(" ") + sum(block[156:])


_EMPTY_HEADER, _EMPTY_SUM = _empty_header()


def unfinished(shards: Sequence[Shard]) -> list[Shard]:
    return [shard for shard in shards if not shard.is_finished]


def file_names(folder: Path) -> list[str]:
    """The shards of a folder, in order."""
    return sorted(name for name in os.listdir(folder) if name.endswith(".tar"))


def write_all(shards: Sequence[Shard], num_threads: int) -> Iterator[WrittenShard]:
    """Writes the shards that aren't finished, several at once; yields them in the order given."""
    yield from in_threads(write, shards, num_threads)
