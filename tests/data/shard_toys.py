"""Shards as vlmsft.data.prepare writes them, made with tarfile, and Energon's metadata for them without Energon."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from vlmsft.data.records import RecordFile, image_path, parse

Parts = Mapping[str, bytes]


def record_parts(path: Path, image_folder: Path) -> list[Parts]:
    """The parts of each record of a file."""
    records = RecordFile(path)
    samples = []
    for record in (records[index] for index in range(len(records))):
        names = parse(record).images
        images = {
            f"{n}{Path(name).suffix}": image_path(name, image_folder).read_bytes() for n, name in enumerate(names)
        }
        samples.append({**images, "json": json.dumps(record, ensure_ascii=False).encode()})
    return samples


def write_shard(path: Path, samples: Sequence[Parts], first_key: int = 0) -> int:
    """A shard and its index; the number of samples."""
    offsets = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in enumerate(samples, first_key):
            offsets.append(tar.offset)
            for name, data in parts.items():
                member = tarfile.TarInfo(f"{key:09d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        offsets.append(tar.offset)
    np.array(offsets, "<u8").tofile(path.with_suffix(".tar.idx"))
    return len(samples)


def write_folder(folder: Path, splits: Mapping[str, Sequence[Parts]], size: int = 20) -> Path:
    """A folder of shards of `size` samples each: splits {"train": ..., "val": ...}."""
    (folder / ".nv-meta").mkdir(parents=True)
    counts: dict[str, int] = {}
    parts: dict[str, list[str]] = {}
    for split, samples in splits.items():
        names = [f"{split}-{number:05d}.tar" for number in range(-(-len(samples) // size))]
        for number, name in enumerate(names):
            start = number * size
            counts[name] = write_shard(folder / name, samples[start : start + size], start)
        parts[split] = names
    (folder / ".nv-meta" / ".info.yaml").write_text(yaml.safe_dump({"shard_counts": counts}))
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump({"split_parts": parts, "exclude": []}))
    return folder
