"""What is read: record files and folders of shards."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmsft.data.energon_shards import META, expanded, metadata_folder, read_yaml
from vlmsft.data.records import RecordFile, image_path
from vlmsft.errors import Problem, UserError

SPLITS = {"training": "train", "validation": "val"}
"""Ours, and Energon's names of them."""


@dataclass
class Records:
    """One file of records. Raises UserError where it can't be opened."""

    split: str  # training or validation
    path: str
    image_folder: str | None
    file: RecordFile = field(init=False)

    def __post_init__(self):
        self.file = RecordFile(self.path)

    def where(self, index: int) -> str:
        return self.file.where(index)

    def image(self, name: str) -> str:
        return str(image_path(name, self.image_folder))


@dataclass
class Shards:
    """The tars of one split of a folder that vlmsft.prepare (or `energon prepare`) wrote, `counts` records in each."""

    split: str
    folder: str
    counts: dict[str, int]

    @property
    def names(self) -> list[str]:
        return list(self.counts)

    def where(self, index: int) -> str:
        shard, number = divmod(index, SAMPLES_OF_SHARD)
        return f"{Path(self.folder, self.names[shard])}, sample {number + 1}"


SAMPLES_OF_SHARD = 1 << 32
"""A shard's sample has the number shard * SAMPLES_OF_SHARD + its place in the shard."""


def shards_of(path: str) -> list[Shards]:
    """Training and validation shards of a folder, whatever state they are in. Raises UserError where it has no
    metadata."""
    folder = metadata_folder(Path(path))
    if folder is None:
        remedy = "vlmsft prepare writes shards and metadata"
        raise UserError(Problem(path, f"no {META}", "a folder of shards with Energon's metadata", remedy))
    counts = read_yaml(folder / META / ".info.yaml", "shard_counts", dict)
    splits = read_yaml(folder / META / "split.yaml", "split_parts", dict)
    excluded = set(expanded(read_yaml(folder / META / "split.yaml", "exclude", list)))
    found = []
    for split, theirs in SPLITS.items():
        names = [name for name in expanded(splits.get(theirs) or []) if name not in excluded]
        found.append(Shards(split, str(folder), {name: counts.get(name, 0) for name in names}))
    return [shards for shards in found if shards.counts]


def samples_of(path: str) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """(key, [(part, content), ...]) of each sample of a tar, in its order.

    Raises tarfile.ReadError, after the samples that are whole, where the tar breaks off.
    """
    key, parts = "", []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            new_key, _, part = Path(member.name).name.partition(".")
            new_key = str(Path(member.name).with_name(new_key))
            if new_key != key and parts:
                yield key, parts
                parts = []
            content: Any = tar.extractfile(member)  # may raise: after the sample before it
            key = new_key
            parts.append((part, content.read()))
        if parts:
            yield key, parts
        if Path(path).stat().st_size < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end mark")
