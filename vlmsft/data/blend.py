"""Several datasets as one, with one index over all their samples."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from vlmsft.data.order import whole_weights
from vlmsft.data.sources import Source

if TYPE_CHECKING:
    from vlmsft.data.dataset import FailedBatch
    from vlmsft.data.encode import EncodedSample, SampleEncoder

SET_KEY, SET_NAMES_KEY = "validation_set", "validation_set_names"
"""Of a batch, for the host: (B,) int64, each sample's dataset; and the names of all datasets."""


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

    def text_sizes(self, indices: np.ndarray) -> np.ndarray:
        """(N,) how long the samples' texts are, roughly. Of ConversationDatasets: nobody trains on a ShardDataset."""
        datasets: list[Any] = self.datasets
        places = [self._place(index) for index in indices.tolist()]
        return np.array([datasets[number].text_sizes(np.array([within]))[0] for number, within in places])

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
