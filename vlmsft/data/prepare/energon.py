"""Energon's metadata beside the shards, through its Python API, which asks nothing.

    shards/.nv-meta/.info.yaml     records of each shard
                    split.yaml     train: train-*.tar, val: val-*.tar
                    dataset.yaml   CrudeWebdataset with auto_decode false: the parts reach the cooker as bytes
    shards/*.tar.idx               offsets of the records in each shard

megatron.energon imports torch (4 s), not NeMo: import this module only when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory

from vlmsft.data.prepare.files import written_aside
from vlmsft.errors import Problem, UserError

META = ".nv-meta"
DATASET = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "auto_decode": False}


def file_names(num_records: Mapping[str, int]) -> list[str]:
    """The files of the metadata, as seen from the shards' folder; num_records as in write_metadata."""
    return [f"{META}/{name}" for name in (".info.yaml", "split.yaml", "dataset.yaml")] + [
        f"{shard}.idx" for shard in num_records
    ]


def is_finished(folder: Path, num_records: Mapping[str, int]) -> bool:
    """Whether all files are there; dataset.yaml is written last, and by rename."""
    return all((folder / name).is_file() for name in file_names(num_records))


def write_metadata(folder: Path, num_records: Mapping[str, int], num_workers: int) -> None:
    """Indexes the shards of a folder and writes their metadata.

    num_records: of each shard, by file name. Energon leaves a shard out that it can't read: the counts are compared,
    and a difference raises UserError
    """
    BaseWebdatasetFactory.prepare_dataset(
        EPath(folder),
        list(num_records),
        split_parts_patterns=[("train", "train-.*"), ("val", "val-.*")],
        shuffle_seed=None,
        workers=num_workers,
    )
    info = yaml.safe_load((folder / META / ".info.yaml").read_text(encoding="utf-8"))
    found = info["shard_counts"]
    problems = [
        Problem(str(folder / name), f"{found.get(name, 0)} records as Energon reads it", f"{count}", "Delete it")
        for name, count in num_records.items()
        if found.get(name, 0) != count
    ]
    if problems:
        raise UserError(problems, "the shards are written, their metadata is not")
    with written_aside(folder / META / "dataset.yaml") as file:
        file.write(yaml.safe_dump(DATASET, sort_keys=False).encode())
