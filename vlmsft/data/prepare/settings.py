"""What a preparation is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmsft.errors import Problem

FORMATS = ("jsonl", "energon")


@dataclass(frozen=True)
class Settings:
    """The command's keys; see conf/prepare.yaml and conf/dataset/.

    Only `parameters` of them change what the output holds.
    """

    output: Path
    conversations: str
    validation: str | None
    revision: str | None
    hub_split: str
    images: str | None
    images_sha256: str | None
    formats: tuple[str, ...]
    validation_fraction: float
    split_by: str
    seed: int
    shuffle: bool
    shard_size_mb: float
    shard_max_records: int
    on_problem: str
    verify_images: bool
    download_folder: Path
    download_attempts: int
    keep_archive: bool
    num_threads: int

    def parameters(self) -> dict[str, Any]:
        """What the output depends on, by the keys that the user types."""
        return {
            "dataset.conversations": self.conversations,
            "dataset.validation": self.validation,
            "dataset.revision": self.revision,
            "dataset.hub_split": self.hub_split,
            "dataset.images": self.images,
            "dataset.images_sha256": self.images_sha256,
            "formats": list(self.formats),
            "validation_fraction": self.validation_fraction,
            "split_by": self.split_by,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "shard_size_mb": self.shard_size_mb,
            "shard_max_records": self.shard_max_records,
            "on_problem": self.on_problem,
            "verify_images": self.verify_images,
        }

    def problems(self) -> list[Problem]:
        """Values that no preparation can have."""
        ranges = (
            ("validation_fraction", 0 <= self.validation_fraction < 1, "from 0 (no validation) to below 1"),
            ("split_by", self.split_by in ("record", "image"), "record or image"),
            ("on_problem", self.on_problem in ("raise", "drop"), "raise or drop"),
            ("formats", bool(self.formats) and set(self.formats) <= set(FORMATS), f"some of {', '.join(FORMATS)}"),
            ("shard_size_mb", self.shard_size_mb > 0, "above 0"),
            ("shard_max_records", self.shard_max_records > 0, "above 0"),
            ("download_attempts", self.download_attempts > 0, "above 0"),
            ("num_threads", self.num_threads > 0, "above 0"),
        )
        return [Problem(key, repr(getattr(self, key)), expected) for key, is_right, expected in ranges if not is_right]

    @property
    def work(self) -> Path:
        return self.output / ".work"

    @property
    def image_folder(self) -> Path:
        """Where the prepared records' image names start: the user's folder, or the one that is filled here."""
        if self.images is not None and Path(self.images).is_dir():
            return Path(self.images)
        return self.output / "images"

    @property
    def fills_image_folder(self) -> bool:
        return self.image_folder == self.output / "images"

    @property
    def jsonl_folder(self) -> Path:
        return self.output if "jsonl" in self.formats else self.work

    @property
    def shard_folder(self) -> Path:
        return self.output / "shards"
