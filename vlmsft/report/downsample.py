"""Fewer points of a curve, with every spike still in it."""

from __future__ import annotations

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
    parts, there = _parts(len(values), (most - 2) // (2 if finite.all() else 3))
    good = there & finite[parts]
    lowest = np.where(good, values[parts], np.inf).argmin(axis=1)
    highest = np.where(good, values[parts], -np.inf).argmax(axis=1)
    gap = (there & ~finite[parts]).argmax(axis=1)
    has_good, has_gap = good.any(axis=1), (there & ~finite[parts]).any(axis=1)
    rows = np.arange(len(parts))
    ends = [np.array([0, len(values) - 1])]
    extremes = [parts[rows, place][has_good] for place in (lowest, highest)]
    return np.unique(np.concatenate([*ends, *extremes, parts[rows, gap][has_gap]]))


def part_means(values: np.ndarray, num_parts: int) -> np.ndarray:
    """(num_parts,): the mean of each of equal parts of (N,) values, N >= num_parts; NaN where a part has no number."""
    values = np.asarray(values, dtype=np.float64)
    parts, there = _parts(len(values), num_parts)
    good = there & np.isfinite(values)[parts]
    counts = good.sum(axis=1)
    sums = np.where(good, values[parts], 0.0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(num_parts, np.nan), where=counts > 0)


def _parts(length: int, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(num_parts, width) indices of equal parts of `length` points, and which of them are a part's own: parts differ by
    one point in size, the shorter ones are filled up."""
    edges = np.linspace(0, length, num_parts + 1).astype(int)
    starts, sizes = edges[:-1, None], np.diff(edges)[:, None]
    offsets = np.arange(sizes.max())[None, :]
    return np.minimum(starts + offsets, length - 1), offsets < sizes
