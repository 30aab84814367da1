"""WebDataset shards of a record file.

What a shard holds: shards/train-00000.tar, train-00001.tar, ... and val-00000.tar, ..., plain ustar files. A record is a
run of members that share a key, NNNNNNNNN.<part>, where NNNNNNNNN is the record's number (from 0, nine digits) in
training.jsonl or validation.jsonl, never the record's own id: LLaVA's ids are those of the image, and records of the
same key that follow each other are merged by readers. Parts, in this order:
    0.jpg, 1.png, ...   the images in the order of their markers, the bytes of the original files, not encoded again;
                        <position>.<suffix of the file's name in lower case, "img" where it has none>; absent in a text-only record
    json                the record's line of the JSONL file: {"image": name or [names] or absent, "conversations": [...]}
                        (or "messages"), what vlmsft.data.records.parse reads; images named there are the parts 0., 1., ...
The same input gives the same bytes: owner, time and mode are constant.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from vlmsft.data.prepare.files import sha256_of, written_aside
from vlmsft.data.records import RecordFile, image_path, parse

BLOCK = tarfile.BLOCKSIZE
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A shard to be written.

    records_path, image_folder: where the records and their images lie
    indices: (records,) int64, numbers of the records in their file, in the order of the shard
    num_bytes: exact size of the tar
    """

    path: Path
    records_path: Path
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
        Shard(folder / f"{prefix}-{number:05d}.tar", records.path, image_folder, order[start:end], _tar_bytes(size))
        for number, (start, end, size) in enumerate(bounds)
    ]


def _record_bytes(records: RecordFile, index: int, size_of) -> int:
    """Bytes of a record's members: headers, contents and padding."""
    record = records[index]
    sizes = [len(json_part(record)), *(size_of(name) for name in parse(record).images)]
    return sum(BLOCK + size + -size % BLOCK for size in sizes)


def _tar_bytes(member_bytes: int) -> int:
    """With the end mark of two zero blocks, padded to whole tar records as tar writes it."""
    end = member_bytes + 2 * BLOCK
    return end + -end % tarfile.RECORDSIZE


def json_part(record: dict) -> bytes:
    """The record as its line in the JSONL file, without the line's end."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")


def part_name(position: int, image_name: str) -> str:
    return f"{position}.{Path(image_name).suffix[1:].lower() or 'img'}"


def write(shard: Shard) -> WrittenShard:
    """Writes a shard that isn't finished; a finished one is only hashed."""
    if shard.is_finished:
        return WrittenShard(shard.path.name, len(shard.indices), shard.num_bytes, sha256_of(shard.path))
    records = _open_records(shard.records_path)
    with written_aside(shard.path) as file:
        tar = TarWriter(file)
        for index in shard.indices:
            record = records[int(index)]
            for position, name in enumerate(parse(record).images):
                image = image_path(name, shard.image_folder).read_bytes()
                tar.add(f"{index:09d}.{part_name(position, name)}", image)
            tar.add(f"{index:09d}.json", json_part(record))
        tar.close()
    return WrittenShard(shard.path.name, len(shard.indices), tar.num_bytes, tar.sha256)


@functools.lru_cache(maxsize=2)
def _open_records(path: Path) -> RecordFile:
    return RecordFile(path)


class TarWriter:
    """Appends members to a ustar file and hashes its bytes on the way."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.num_bytes = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))

    def close(self) -> None:
        """The end mark; the file itself stays open."""
        self._write(bytes(_tar_bytes(self.num_bytes) - self.num_bytes))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


def unfinished(shards: Sequence[Shard]) -> list[Shard]:
    return [shard for shard in shards if not shard.is_finished]


def file_names(folder: Path) -> list[str]:
    """The shards of a folder, in order."""
    return sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
