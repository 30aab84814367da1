"""Several datasets as one: what a user writes to name them, and one index over all their samples.

The plain form, for `data.train_path`, `data.validation_path` and Energon's `data.path`:

    train.jsonl                                    one dataset
    [a.jsonl, b.jsonl]                             several; each sample once an epoch
    {chat: a.jsonl, ocr: {path: b.jsonl}}          several with names: validation logs val_loss_chat and val_loss_ocr
    {chat: {path: a.jsonl, weight: 3}, ocr: {path: b.jsonl, weight: 1, image_folder: scans}}

`weight` is a dataset's share of the samples of each step (here 3 of 4), by all datasets or by none. A weighted dataset
has epochs of its own: it starts over when all its samples have come by, however far the others are.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset

from vlmsft.errors import Problem, UserError, nearest

if TYPE_CHECKING:
    from vlmsft.data.dataset import FailedBatch
    from vlmsft.data.encode import EncodedSample, SampleEncoder

SET_KEY, SET_NAMES_KEY = "validation_set", "validation_set_names"
"""Of a batch, for the host: (B,) int64, each sample's dataset; and the names of all datasets."""


@dataclass(frozen=True)
class Source:
    """One dataset as the user named it.

    key: of the config, for messages, e.g. data.train_path.chat
    name: None where the user gave a path only
    weight: share of each step's samples, relative to the others'; None = by the number of samples
    """

    key: str
    name: str | None
    path: str
    weight: float | None = None
    image_folder: str | None = None


def sources(value: Any, key: str, image_folder: str | None = None, *, has_image_folders: bool = True) -> list[Source]:
    """The datasets that `value` (a path, a list or a mapping: see above) names, in its order; [] for None.

    key: of the config, for messages
    image_folder: of the datasets that name none
    has_image_folders: False where images lie with the records
    Raises UserError with all that can't be understood.
    """
    known = ("path", "weight", "image_folder") if has_image_folders else ("path", "weight")
    if value is None:
        return []
    if isinstance(value, str):
        return [Source(key, None, value, image_folder=image_folder)]
    problems: list[Problem] = []
    if isinstance(value, Mapping) and value:
        found = [
            _named_source(name, entry, f"{key}.{name}", image_folder, known, problems) for name, entry in value.items()
        ]
        problems += _weight_problems(found, key)
    elif isinstance(value, Sequence) and value:
        found = [_listed_source(entry, f"{key}[{n}]", image_folder, problems) for n, entry in enumerate(value)]
    else:
        raise UserError(Problem(key, repr(value), "a path, a list of paths or a mapping of names to paths"))
    if problems:
        raise UserError(problems)
    return found


def _listed_source(entry: Any, key: str, image_folder: str | None, problems: list[Problem]) -> Source:
    if not isinstance(entry, str):
        problems.append(Problem(key, repr(entry), "a path", "With more than a path, datasets are a mapping by name"))
    return Source(key, None, str(entry), image_folder=image_folder)


def _named_source(
    name: Any, entry: Any, key: str, image_folder: str | None, known: Sequence[str], problems: list[Problem]
) -> Source:
    if not str(name).replace("-", "_").isidentifier():
        problems.append(Problem(key, repr(name), "a name of letters, digits, - and _: it becomes part of a metric's"))
    if isinstance(entry, str):
        return Source(key, str(name), entry, image_folder=image_folder)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        problems.append(Problem(key, repr(entry), "a path, or a mapping with `path`"))
        return Source(key, str(name), "")
    for other in entry:
        if other not in known:
            hint = nearest(str(other), known)
            problems.append(Problem(f"{key}.{other}", repr(entry[other]), " or ".join(known), hint))
    weight = entry.get("weight")
    if weight is not None and not (type(weight) in (int, float) and 0 < weight < math.inf):
        problems.append(Problem(f"{key}.weight", repr(weight), "a positive number, or no weight at all"))
        weight = None
    return Source(key, str(name), entry["path"], weight, entry.get("image_folder", image_folder))


def _weight_problems(found: list[Source], key: str) -> list[Problem]:
    without = [source.name for source in found if source.weight is None]
    if not without or len(without) == len(found):
        return []
    return [Problem(key, f"no weight for {', '.join(map(str, without))}", "a weight for every dataset, or for none")]


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the same proportion, for arithmetic that is exact: (0.7, 0.3) is (7, 3)."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    return tuple(number // math.gcd(*whole) for number in whole)


def blend_counts(weights: Sequence[int], num_samples: int) -> list[int]:
    """How many of the first `num_samples` of a blended stream come from each dataset.

    The k-th sample (from 0) of a dataset with weight w stands at position (k + 1/2) / w, and the stream takes samples
    by position (Webster's method): a dataset stays within a sample or so of its share, and a longer stream begins with
    the shorter one, so that it can be cut and continued anywhere.
    """
    counts = [(2 * num_samples * weight + sum(weights)) // (2 * sum(weights)) for weight in weights]
    while sum(counts) > num_samples:
        last = max(range(len(weights)), key=lambda i: (Fraction(2 * counts[i] - 1, weights[i]), i))
        counts[last] -= 1
    while sum(counts) < num_samples:
        counts[next_dataset(weights, counts)] += 1
    return counts


def next_dataset(weights: Sequence[int], counts: Sequence[int]) -> int:
    """The dataset that a blended stream takes its next sample from, when it took `counts` so far."""
    return min(range(len(weights)), key=lambda i: (Fraction(2 * counts[i] + 1, weights[i]), i))


class Samples(Protocol):
    """What vlmsft's loaders need of a dataset: ConversationDataset, ShardDataset or a Blend of these."""

    encoder: SampleEncoder

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def sample(self, index: int) -> EncodedSample: ...
    def collate(self, items: list) -> dict | FailedBatch: ...


class _Item(NamedTuple):
    dataset: int
    item: Any


class Blend(Dataset):
    """Datasets one behind the other. ~index (negative) is the same sample without loss, as in each of them.

    names: each dataset's; when all are given batches say which dataset a sample is of (SET_KEY, SET_NAMES_KEY)
    weights: each dataset's share in training; None = each sample once an epoch
    """

    def __init__(
        self, datasets: Sequence[Samples], names: Sequence[str] | None, weights: Sequence[float] | None = None
    ):
        self.datasets = list(datasets)
        self.names = None if names is None else tuple(names)
        self.weights = None if weights is None else whole_weights(weights)
        self.encoder = self.datasets[0].encoder
        self.ends = list(accumulate(len(dataset) for dataset in self.datasets))

    @property
    def sizes(self) -> list[int]:
        return [len(dataset) for dataset in self.datasets]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> _Item:
        number, within = self._place(index if index >= 0 else ~index)
        return _Item(number, self.datasets[number][within if index >= 0 else ~within])

    def sample(self, index: int) -> EncodedSample:
        """The sample; raises UserError that names where it stands."""
        number, within = self._place(index)
        return self.datasets[number].sample(within)

    def collate(self, items: list[_Item]) -> dict | FailedBatch:
        batch = self.datasets[0].collate([item for _, item in items])
        if self.names is None or not isinstance(batch, dict):
            return batch
        return {**batch, SET_KEY: torch.tensor([number for number, _ in items]), SET_NAMES_KEY: self.names}

    def _place(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self.ends, index)
        return number, index - (self.ends[number] - len(self.datasets[number]))


def joined(datasets: Sequence[Samples], found: Sequence[Source], *, named: bool) -> Samples:
    """One dataset of all: itself where there is one without a name, else a Blend.

    named: batches say which dataset a sample is of, where the user gave names
    """
    if len(datasets) == 1 and (found[0].name is None or not named):
        return datasets[0]
    names = [source.name for source in found if source.name is not None]
    weights = [source.weight for source in found if source.weight is not None]
    return Blend(datasets, names if named and names else None, weights or None)


def label(source: Source, number: int) -> str:
    """A dataset's name, or its place in the list."""
    return source.name if source.name is not None else str(number)
