"""Where conversations come from, and the one form that all of them are brought into.

A source yields raw records. `Normaliser` makes a prepared record of each: {"id" if it had one, "image": name or list of
names, absent for text alone, "conversations" or "messages": the turns as they were}. Image names that stood in content
parts move to `image`; pictures that stood in the record itself become files.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from vlmsft.data.prepare.files import sha256_of, written_aside
from vlmsft.data.records import RecordFile, RecordProblem, parse
from vlmsft.errors import Problem, UserError, nearest

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


class Source(Protocol):
    """Raw records, the name of each for messages, and what the manifest says about their origin."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def where(self, index: int) -> str: ...

    def identity(self) -> dict[str, Any]: ...


def open_source(name: str, revision: str | None, split: str) -> Source:
    """The conversations called `name`: a JSON, JSONL or Parquet file, a folder that `datasets` can load, or a hub id.

    revision, split: of a hub dataset; split also of a folder
    Raises UserError where there is no such file or dataset
    """
    path = Path(name).expanduser()
    if path.is_file():
        return ParquetSource(path) if path.suffix == ".parquet" else JsonSource(path)
    if path.is_dir():
        return DatasetSource(str(path), None, split)
    if path.suffix in (".json", ".jsonl", ".parquet") or not HUB_ID.fullmatch(name):
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        expected = "a JSON, JSONL or Parquet file, a dataset's folder, or a Hugging Face dataset id (owner/name)"
        raise UserError(Problem("dataset.conversations", f"no file {name}", expected, nearest(path.name, beside)))
    return DatasetSource(name, revision, split)


class JsonSource:
    """A JSON list or JSONL file."""

    def __init__(self, path: Path):
        self.records = RecordFile(path)
        self.where = self.records.where

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Any]:
        return (self.records[index] for index in range(len(self)))

    def identity(self) -> dict[str, Any]:
        return {"file": str(self.records.path), "sha256": self.records.sha256}


class ParquetSource:
    """A Parquet file; columns of pictures are structs of `bytes` and `path`, as `datasets` writes them."""

    def __init__(self, path: Path):
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(Problem(str(path), f"a broken file ({error})", "a whole Parquet file")) from None

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __iter__(self) -> Iterator[Any]:
        for batch in self._file.iter_batches(batch_size=64):  # pictures may be megabytes each
            yield from batch.to_pylist()

    def where(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def identity(self) -> dict[str, Any]:
        return {"file": str(self.path), "sha256": sha256_of(self.path)}


class DatasetSource:
    """A Hugging Face dataset, from the hub (through its cache) or from a folder; pictures stay encoded."""

    def __init__(self, name: str, revision: str | None, split: str):
        import datasets

        self.name, self.split = name, split
        self.commit = None if Path(name).is_dir() else resolve_revision(name, revision)
        try:
            data = datasets.load_dataset(name, revision=self.commit or revision, split=split)
        except Exception as error:  # datasets raises its own, huggingface_hub's, OSError and ValueError
            raise UserError(_not_loaded(name, split, error)) from None
        assert isinstance(data, datasets.Dataset)
        for column, feature in data.features.items():
            if (encoded := _with_encoded_images(feature)) != feature:
                data = data.cast_column(column, encoded)
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def identity(self) -> dict[str, Any]:
        return {"dataset": self.name, "split": self.split, "revision": self.commit}


def resolve_revision(name: str, revision: str | None) -> str | None:
    """The commit that a hub dataset's revision stands for now; None where the hub can't be asked (then the cache
    serves, or loading says why not)."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=20).sha
    except Exception:  # offline mode, no network, gated: load_dataset says it better, or has it cached
        return None


def _not_loaded(name: str, split: str, error: Exception) -> Problem:
    text = " ".join(str(error).split())
    remedy = "With no network, name a local file: dataset.conversations=records.jsonl"
    if any(sign in text for sign in ("401", "403", "gated", "authenticated")):
        remedy = "Accept its conditions on the hub and set HF_TOKEN to a token that may read it"
    found = f"{name} (split {split}), which can't be loaded: {type(error).__name__}: {text[:300]}"
    return Problem("dataset.conversations", found, "a dataset id or a file that is there", remedy)


def _with_encoded_images(feature: Any) -> Any:
    """The same feature with pictures left as {"bytes", "path"}: the original bytes, nothing decoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {key: _with_encoded_images(value) for key, value in feature.items()}
    if isinstance(feature, list):
        return [_with_encoded_images(value) for value in feature]
    if hasattr(feature, "feature"):  # List, LargeList, Sequence: the name depends on the version
        return type(feature)(_with_encoded_images(feature.feature))
    return feature


class Normaliser:
    """Prepared records from raw ones.

    image_folder: where pictures that stand in records are written, as their original bytes, under a name made of their
        content: the same picture in two records is one file
    inside: whether image names must stay inside the image folder (they become files there)
    """

    def __init__(self, image_folder: Path, inside: bool):
        self.image_folder = image_folder
        self.inside = inside

    def __call__(self, raw: Any) -> dict[str, Any]:
        """The prepared record. Raises UserError with all that is wrong in the raw one."""
        record = _without_nulls(raw) if isinstance(raw, dict) else raw
        if isinstance(record, dict):
            record = self._with_names(record)
        conversation = parse(record)
        names = list(conversation.images)
        outside = [name for name in names if self.inside and not is_inside(name)]
        if outside:
            expected = "a relative name without '..'"
            raise UserError([RecordProblem("", f"image {name}", expected, kind="image names") for name in outside])
        key = "conversations" if "conversations" in record else "messages"
        prepared = {"id": record["id"]} if isinstance(record.get("id"), (str, int)) else {}
        if names:
            prepared["image"] = names[0] if len(names) == 1 else names
        return {**prepared, key: [_without_names(turn) for turn in record[key]]}

    def _with_names(self, record: dict[str, Any]) -> dict[str, Any]:
        """Pictures of the record and of its content parts written out, their names in their place."""
        record = dict(record)
        for key in ("image", "images"):
            if key in record:
                record[key] = self._names(record[key])
        turns = record.get("conversations", record.get("messages"))
        for turn in turns if isinstance(turns, list) else []:
            for part in _image_parts(turn):
                part["image"] = self._names(part["image"]) if "image" in part else part.get("path")
        return _without_nulls(record)

    def _names(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._names(item) for item in value]
        if not isinstance(value, dict):
            return value
        return self._write(value["bytes"]) if value.get("bytes") else value.get("path")

    def _write(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()[:32]
        name = f"{digest[:2]}/{digest}.{_suffix(data)}"
        path = self.image_folder / name
        if not path.is_file():
            with written_aside(path) as file:
                file.write(data)
        return name


def is_inside(name: str) -> bool:
    """Whether a name stays below the folder that it starts from."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts


def _without_nulls(value: Any) -> Any:
    """Arrow fills the keys that a record doesn't have with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _image_parts(turn: Any) -> list[dict]:
    content = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]


def _without_names(turn: dict) -> dict:
    """The turn with image parts that say only where an image stands."""
    key = "value" if "value" in turn else "content"
    if not isinstance(turn[key], list):
        return turn
    return {**turn, key: [{"type": "image"} if part["type"] == "image" else part for part in turn[key]]}


def _suffix(data: bytes) -> str:
    """The usual suffix of an encoded picture's format; img where Pillow doesn't know it (the check names the file)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or "img"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return "img"
    return SUFFIX_OF_FORMAT.get(kind, kind.lower())
