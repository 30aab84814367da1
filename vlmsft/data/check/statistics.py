"""Counts that are gathered in parts, in any order, and added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np

from vlmsft.data.collate import padded_length

SIZE_STEP = 16
"""Image sizes are counted in steps of so many pixels."""


class Histogram:
    """How often each number from 0 on occurred: 8 bytes for each number up to the largest."""

    def __init__(self, values: Iterable[int] = ()):
        self.counts = np.bincount(np.fromiter(values, np.int64))

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and np.array_equal(self.counts, other.counts)

    def add(self, value: int, times: int = 1) -> None:
        if value >= len(self.counts):
            self.counts = np.pad(self.counts, (0, max(value + 1, 2 * len(self.counts)) - len(self.counts)))
        self.counts[value] += times

    def merge(self, other: Histogram) -> None:
        length = max(len(self.counts), len(other.counts))
        mine, others = (np.pad(counts, (0, length - len(counts))) for counts in (self.counts, other.counts))
        self.counts = mine + others

    @property
    def max(self) -> int:
        """0 of nothing."""
        return int(np.flatnonzero(self.counts)[-1]) if self.counts.any() else 0

    @property
    def mean(self) -> float:
        return float(self.counts @ np.arange(len(self.counts))) / max(len(self), 1)

    def quantile(self, share: float) -> int:
        """The least number that at least `share` of all are not above."""
        if not self.counts.any():
            return 0
        return int(np.searchsorted(np.cumsum(self.counts), share * len(self) - 1e-9))

    def above(self, limit: int) -> int:
        """How many are larger than `limit`."""
        return int(self.counts[limit + 1 :].sum())


@dataclass
class Statistics:
    """Of the samples read so far. Those that can't be understood count as records only."""

    num_records: int = 0
    num_truncated_tokens: int = 0
    token_lengths: Histogram = field(default_factory=Histogram)  # text tokens of a sample, template included
    answer_lengths: Histogram = field(default_factory=Histogram)  # of which are learnt
    turns: Histogram = field(default_factory=Histogram)
    images_per_sample: Histogram = field(default_factory=Histogram)
    tiles: Histogram = field(default_factory=Histogram)  # of each distinct image
    canvases: Counter[tuple[int, int]] = field(default_factory=Counter)  # (rows, columns) of tiles
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) // SIZE_STEP
    image_formats: Counter[str] = field(default_factory=Counter)

    def merge(self, other: Statistics) -> None:
        for part in fields(self):
            mine, others = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, Histogram):
                mine.merge(others)
            elif isinstance(mine, Counter):
                mine.update(others)
            else:
                setattr(self, part.name, mine + others)

    @property
    def num_images(self) -> int:
        """Distinct images that could be read."""
        return len(self.tiles)

    def proposed_length(self, share: float) -> int:
        """The decoder_seq_length, a multiple of 64, that holds `share` of the samples whole."""
        return padded_length(max(self.token_lengths.quantile(share), 1))
