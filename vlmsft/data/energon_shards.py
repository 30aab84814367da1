"""A folder of WebDataset shards with Energon's metadata, read by index. Imports neither NeMo nor Energon.

    .nv-meta/.info.yaml     shard_counts: {train-00000.tar: 1000, ...}
             split.yaml     split_parts: {train: [train-00000.tar, ...], val: [...]}
    train-00000.tar         members <key>.<part>: 0.jpg, 1.png, ... (or jpg), the images in order, and json, the record
    train-00000.tar.idx     uint64 offsets of the samples, one more for the end

The record is LLaVA's (vlmsft.data.records) or only its list of turns, as the tutorial writes it. dataset.yaml is not
read: what the parts mean is said here, whatever sample type `energon prepare` was told.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import braceexpand
import numpy as np
import yaml
from torch.utils.data import Dataset

from vlmsft.data.collate import collate
from vlmsft.data.dataset import FailedBatch
from vlmsft.data.encode import EncodedSample, SampleEncoder, load_image
from vlmsft.data.records import named, parse
from vlmsft.data.skips import skip_of
from vlmsft.errors import Problem, UserError, nearest

META, SHARDS = ".nv-meta", "shards"
RECORD_PART = "json"
_PART = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # Energon's split_name_re: key, part
_IMAGE_PART = re.compile(r"^(?:(\d+)\.[^.]+|jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_PREPARE = "The demo's: python -m vlmsft.prepare dataset=sample; your own: dataset=local"


@dataclass(frozen=True)
class ShardFolder:
    """The shards of one split.

    path: the folder that holds .nv-meta
    counts: samples of each shard, by name
    """

    path: Path
    split: str
    counts: dict[str, int]

    @classmethod
    def open(cls, path: str | Path, split: str, key: str = "data.path") -> ShardFolder:
        """Reads the metadata of `path`, or of `path`/shards where that has it.

        key: of the config, for messages
        Raises UserError with every shard that is missing, cut or without an index; costs a few stat calls for each.
        """
        folder = metadata_folder(Path(path))
        if folder is None:
            found = f"no such folder {path}" if not Path(path).is_dir() else f"no {META} in {path}"
            raise UserError(Problem(key, found, "a folder of shards with Energon's metadata", _PREPARE))
        shard_counts = read_yaml(folder / META / ".info.yaml", "shard_counts", dict)
        splits = read_yaml(folder / META / "split.yaml", "split_parts", dict)
        if not splits.get(split):
            expected = f"shards in split {split!r} of {folder / META / 'split.yaml'}"
            without = "data.validation_path=null for a run without validation" if split == "val" else ""
            raise UserError(Problem(key, f"none (splits: {', '.join(splits) or 'none'})", expected, without))
        excluded = set(expanded(read_yaml(folder / META / "split.yaml", "exclude", list)))
        if samples := [name for name in excluded if "/" in name]:
            found, remedy = f"exclude: {samples[0]}", "Prepare the dataset without the sample"
            raise UserError(Problem(str(folder / META / "split.yaml"), found, "names of whole shards", remedy))
        names = [name for name in expanded(splits[split]) if name not in excluded]
        if unknown := [name for name in names if name not in shard_counts]:
            hint = nearest(unknown[0], shard_counts)
            where = str(folder / META / "split.yaml")
            raise UserError(Problem(where, unknown[0], "a shard that .info.yaml counts", hint))
        shards = cls(folder, split, {name: shard_counts[name] for name in names if shard_counts[name]})
        if problems := [problem for name in shards.counts for problem in shards.problems_of(name)]:
            raise UserError(problems)
        return shards

    def __len__(self) -> int:
        return sum(self.counts.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over name, count and bytes of each shard and the sha256 of its index: a sample replaced by one of the
        same size goes unnoticed, as the shards themselves aren't read."""
        digest = hashlib.sha256()
        for name, count in self.counts.items():
            index = hashlib.sha256(self.index_path(name).read_bytes()).hexdigest()
            digest.update(f"{name}\t{count}\t{(self.path / name).stat().st_size}\t{index}\n".encode())
        return digest.hexdigest()

    def index_path(self, name: str) -> Path:
        return (self.path / name).with_suffix(".tar.idx")

    def offsets(self, name: str) -> np.ndarray:
        """(samples + 1,) uint64: where each sample of a shard begins in bytes, and where the last one ends."""
        return np.fromfile(self.index_path(name), dtype="<u8")

    def problems_of(self, name: str) -> list[Problem]:
        """What is wrong with a shard, without reading it."""
        path, remedy = self.path / name, "Prepare the dataset again, or restore the file"
        if not path.is_file():
            return [Problem(str(path), "no such shard", f"{self.counts[name]} samples", remedy)]
        if not self.index_path(name).is_file():
            return [Problem(str(self.index_path(name)), "no such file", "the shard's index", remedy)]
        offsets = self.offsets(name)
        if len(offsets) != self.counts[name] + 1:
            found = f"{len(offsets) - 1} samples in its index"
            return [Problem(str(path), found, f"{self.counts[name]}, as .info.yaml says", remedy)]
        size = path.stat().st_size
        if size < offsets[-1]:
            return [Problem(str(path), f"{size} bytes", f"at least {offsets[-1]}: the shard is cut", remedy)]
        return []


def metadata_folder(path: Path) -> Path | None:
    """`path`, or `path`/shards, whichever holds Energon's metadata."""
    return next((folder for folder in (path, path / SHARDS) if (folder / META / ".info.yaml").is_file()), None)


def expanded(patterns: list[str]) -> list[str]:
    """The names of split.yaml; "train-{00000..00009}.tar" stands for ten."""
    return [name for pattern in patterns for name in braceexpand.braceexpand(pattern)]


def read_yaml(path: Path, key: str, kind: type) -> Any:
    """The value of a key, of a type; an empty one where it is absent. Raises UserError."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")).get(key, kind())
    except (OSError, yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        found = f"unreadable ({type(error).__name__}: {error})"
        raise UserError(Problem(str(path), found, f"a YAML mapping with {key}", _PREPARE)) from None
    if not isinstance(value, kind):
        raise UserError(Problem(str(path), f"{key}: {value!r}", f"a {kind.__name__}", _PREPARE))
    return value


class ShardDataset(Dataset):
    """Encoded samples of a split, by index, in the order of its shards. ~index (negative) is the same without loss.

    As ConversationDataset, for shards: items are EncodedSample, or the UserError that names folder, shard and key.
    """

    def __init__(self, shards: ShardFolder, encoder: SampleEncoder, on_error: Literal["raise", "skip"] = "raise"):
        self.shards = shards
        self.encoder = encoder
        self.on_error: Literal["raise", "skip"] = on_error
        self._names = list(shards.counts)
        self._ends = np.cumsum(list(shards.counts.values()))
        self._offsets: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> EncodedSample | UserError:
        name, key, parts = self._read(index if index >= 0 else ~index)
        item = encode_item(parts, self.encoder, self.where(name, key), self.on_error, self.shards)
        return item.without_loss() if index < 0 and isinstance(item, EncodedSample) else item

    def sample(self, index: int) -> EncodedSample:
        """The sample; raises UserError that names shard and key."""
        name, key, parts = self._read(index)
        return encode_parts(parts, self.encoder, self.where(name, key))

    def where(self, name: str, key: str) -> str:
        return f"{self.shards.path / name}:{key}"

    def collate(self, items: list[EncodedSample | UserError]) -> dict | FailedBatch:
        return collate_items(items, self.encoder)

    def parts(self, index: int) -> dict[str, bytes]:
        """The sample's members by part, in the shard's order; raises UserError when they can't be read."""
        parts = self._read(index)[2]
        if isinstance(parts, UserError):
            raise parts
        return parts

    def _read(self, index: int) -> tuple[str, str, dict[str, bytes] | UserError]:
        """(shard, key, parts or why there are none)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        name = self._names[number]
        within = index - (int(self._ends[number - 1]) if number else 0)
        if name not in self._offsets:
            self._offsets[name] = self.shards.offsets(name)
        start, end = (int(offset) for offset in self._offsets[name][within : within + 2])
        try:
            with open(self.shards.path / name, "rb") as file:
                file.seek(start)
                key, parts = split_members(file.read(end - start))
        except (OSError, tarfile.TarError, ValueError) as error:
            found = f"unreadable ({type(error).__name__}: {error})"
            place = f"{self.shards.path / name}, sample {within}"
            expected = "a sample between its offsets in the shard's index"
            return name, "", UserError(Problem(place, found, expected, "Prepare the dataset again"))
        return name, key, parts


def split_members(data: bytes) -> tuple[str, dict[str, bytes]]:
    """(key, parts by name) of the tar members of one sample. Raises tarfile.TarError or ValueError."""
    key, parts = "", {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            match = _PART.match(member.name)
            if member.isreg() and match:
                content = tar.extractfile(member)
                assert content is not None  # of a regular file
                key = match[1]
                parts[match[2]] = content.read()
                if len(parts[match[2]]) != member.size:
                    raise ValueError(f"{member.name} is cut: {len(parts[match[2]])} of {member.size} bytes")
    if not parts:
        raise ValueError("no member")
    return key, parts


def encode_parts(parts: Mapping[str, bytes] | UserError, encoder: SampleEncoder, where: str) -> EncodedSample:
    """The encoded sample of a shard's parts, exactly as ConversationDataset makes it of the same record and images.

    where: folder, shard and key, in front of errors
    Raises UserError with all that is wrong.
    """
    if isinstance(parts, UserError):
        raise parts
    try:
        images = image_parts(parts)
        conversation = parse(record_of(parts, list(images)))
        if len(images) != len(conversation.images):
            found = f"{len(images)} image part(s) ({', '.join(images) or 'none'})"
            raise UserError(Problem("", found, f"{len(conversation.images)}, one for each image of the record"))
        pictures = [load_image(io.BytesIO(data), name=f"part {name}") for name, data in images.items()]
        return encoder.encode(conversation.turns, pictures)
    except UserError as error:
        raise UserError(named(error.problems, where)) from None


def encode_item(
    parts: Mapping[str, bytes] | UserError,
    encoder: SampleEncoder,
    where: str,
    on_error: Literal["raise", "skip"],
    shards: ShardFolder,
) -> EncodedSample | UserError:
    """`encode_parts`, with the error as the item, or with on_error="skip" a stand-in that says what it stands for.

    What damages a whole shard is never skipped: parts that are a UserError stay one.
    """
    try:
        return encode_parts(parts, encoder, where)
    except UserError as error:
        if on_error == "raise" or isinstance(parts, UserError):
            return error
        try:
            return encoder.stand_in(skip_of(where, error, str(shards.path), len(shards)))
        except UserError as broken:  # the processor, without which no sample can be read
            return broken


def collate_items(items: list[EncodedSample | UserError], encoder: SampleEncoder) -> dict | FailedBatch:
    problems = [problem for item in items if isinstance(item, UserError) for problem in item.problems]
    if problems:
        return FailedBatch(problems)
    return collate([item for item in items if isinstance(item, EncodedSample)], encoder.pad_token_id)


def image_parts(parts: Mapping[str, bytes]) -> dict[str, bytes]:
    """The image parts: those that begin with a number in its order, others in the shard's."""
    matches = {name: match for name in parts if (match := _IMAGE_PART.match(name))}
    ordered = sorted(matches, key=lambda name: int(matches[name][1] or 0))
    return {name: parts[name] for name in ordered}


def record_of(parts: Mapping[str, bytes], image_names: list[str]) -> Any:
    """The record that the parts hold. Raises UserError where there is none."""
    if RECORD_PART not in parts:
        raise UserError(Problem("", f"parts {', '.join(parts)}", f"a part {RECORD_PART} with the record"))
    try:
        record = json.loads(parts[RECORD_PART])
    except ValueError as error:
        raise UserError(Problem("", f"broken JSON ({error})", "one whole JSON value")) from None
    if isinstance(record, list):  # the tutorial's shards hold the turns only
        return {"conversations": record, **({"image": image_names} if image_names else {})}
    return record
