"""Fewer points of a curve, with every spike still in it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

MOST_POINTS = 1000


def keep_extremes(values: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Indices, in order, of at most `most` points: the first, the last, and the lowest and highest of equal parts.

    values: (N,); NaN and infinities are no extremes, but a part that holds any keeps one, so that a gap stays a gap
    most: at least 5
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) <= most:
        return np.arange(len(values))
    finite = np.isfinite(values)
    # 3 points a part where there are gaps
    num_parts = (most - 2) // (2 if finite.all() else 3)
    edges = np.linspace(1, len(values) - 1, num_parts + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(edges.tolist()):
        kept.update(_of_part(values[start:end], finite[start:end], start))
    return np.array(sorted(kept))


def _of_part(values: np.ndarray, finite: np.ndarray, start: int) -> set[int]:
    kept = set()
    if not finite.all():
        kept.add(start + int(np.argmin(finite)))
    if finite.any():
        kept.add(start + int(np.argmin(np.where(finite, values, np.inf))))
        kept.add(start + int(np.argmax(np.where(finite, values, -np.inf))))
    return kept


def part_means(values: np.ndarray, num_parts: int) -> np.ndarray:
    """(num_parts,): the mean of each of equal parts of (N,) values, N >= num_parts; NaN where a part has no number."""
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    starts = np.linspace(0, len(values), num_parts + 1).astype(int)[:-1]
    counts = np.add.reduceat(finite.astype(int), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    return np.divide(sums, counts, out=np.full(num_parts, np.nan), where=counts > 0)
