"""Training and validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def by_record(num_records: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and the validation records, each in the order that they are written in.

    The tutorial's datasets.Dataset.train_test_split(test_size=fraction, shuffle=True, seed=seed), without importing
    it. One picture may be in both
    """
    num_validation = math.ceil(fraction * num_records)
    order = np.random.default_rng(seed).permutation(num_records)
    return order[num_validation:], order[:num_validation]


def by_image(images: Sequence[Sequence[str]], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As by_record, but all records of a picture are on one side.

    Groups of records that share pictures are taken at random until validation holds the fraction, or would hold more
    by the next group than it now lacks.
    images: the pictures' names, for each record
    """
    group_of = _groups(images)
    num_validation = math.ceil(fraction * len(images))
    sizes = np.bincount(group_of, minlength=len(images))
    chosen, count = np.zeros(len(images), bool), 0
    for group in np.random.default_rng(seed).permutation(np.unique(group_of)):
        if abs(count + sizes[group] - num_validation) < abs(count - num_validation):
            chosen[group], count = True, count + int(sizes[group])
        if count >= num_validation:
            break
    order = np.random.default_rng(seed).permutation(len(images))
    in_validation = chosen[group_of[order]]
    return order[~in_validation], order[in_validation]


def _groups(images: Sequence[Sequence[str]]) -> np.ndarray:
    """For each record the number of the first record that it is tied to by shared pictures, through others too."""
    parent = list(range(len(images)))

    def first(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    user_of: dict[str, int] = {}
    for index, names in enumerate(images):
        for name in names:
            a, b = first(index), first(user_of.setdefault(name, index))
            parent[max(a, b)] = min(a, b)
    return np.array([first(index) for index in range(len(images))], np.int64)
