"""What a run logged by step, as compact numbers for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from vlmsft.report.downsample import MOST_POINTS, keep_extremes, part_means

DIGITS = 4
"""Significant ones, of values: finer than a pixel."""


@dataclass(frozen=True)
class Curve:
    """A column of metrics.csv that gets a plot."""

    column: str
    title: str
    is_loss: bool = False  # can have a logarithmic scale


CURVES = (
    Curve("reduced_train_loss", "training loss", is_loss=True),
    Curve("val_loss", "validation loss", is_loss=True),
    Curve("lr", "learning rate"),
    Curve("grad_norm", "gradient norm", is_loss=True),
    Curve("samples_per_second", "samples/s"),
    Curve("tokens_per_second", "tokens/s"),
    Curve("tflops_per_second_per_gpu", "TFLOP/s per GPU"),
    Curve("mfu", "model FLOP/s utilisation"),
    Curve("data_wait_fraction", "share of a step that waits for data"),
    Curve("peak_memory_gib", "peak memory, GiB"),
)
NAMED_SETS = "val_loss_"
"""Columns of validation sets with a name begin so."""
AXES = {"step": "optimizer steps", "samples": "samples", "tokens": "tokens", "hours": "hours of training"}


def curves_of(columns: Iterable[str]) -> list[Curve]:
    """Those that get a plot; each named validation set's loss after `val_loss`."""
    there = set(columns)
    named = [name for name in sorted(there) if name.startswith(NAMED_SETS)]
    sets = [Curve(name, f"validation loss, {name.removeprefix(NAMED_SETS)}", is_loss=True) for name in named]
    at = next(place for place, curve in enumerate(CURVES) if curve.column == "val_loss") + 1
    return [curve for curve in (*CURVES[:at], *sets, *CURVES[at:]) if curve.column in there]


def absent(present: Sequence[Curve]) -> list[str]:
    """Titles of the usual plots that there are no data for."""
    return [curve.title for curve in CURVES if curve not in present]


def logged(frame: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), (N,) each: the rows that have a value.

    A training loss that is missing beside a learning rate was NaN: it stays.
    """
    if not _has(frame, column) or "step" not in frame:
        return np.array([]), np.array([])
    steps, values = _array(frame, "step"), _array(frame, column)
    there = ~np.isnan(values)
    if column == "reduced_train_loss" and "lr" in frame:
        there |= ~np.isnan(_array(frame, "lr"))
    return steps[there], values[there]


def points(frame: pd.DataFrame, column: str, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of at most `most` points, the extremes among them."""
    steps, values = logged(frame, column)
    kept = keep_extremes(values, most)
    return steps[kept], values[kept]


def axes(frame: pd.DataFrame, most: int = MOST_POINTS // 4) -> dict[str, np.ndarray]:
    """{"step", "samples", "tokens", "hours"}: each (N,), N <= most, rising; only those that were logged.

    Between two of these points an axis is taken as straight: a page needs no x for each curve and axis.
    """
    if "step" not in frame or frame.empty:
        return {}
    found = {"step": _array(frame, "step")}
    if "consumed_samples" in frame:
        found["samples"] = _filled(_array(frame, "consumed_samples"))
    if "elapsed_seconds" in frame:
        found["hours"] = without_restarts(_filled(_array(frame, "elapsed_seconds"))) / 3600
    if (tokens := consumed_tokens(frame, found.get("samples"))) is not None:
        found["tokens"] = tokens
    found = {name: values for name, values in found.items() if np.isfinite(values).any()}
    if len(frame) <= most:
        return found
    rows = np.unique(np.linspace(0, len(frame) - 1, most).astype(int))
    return {name: values[rows] for name, values in found.items()}


def consumed_tokens(frame: pd.DataFrame, samples: np.ndarray | None) -> np.ndarray | None:
    """As logged, or else added up from tokens/s over samples/s times the samples of each row; None where neither is."""
    if "consumed_tokens" in frame:
        return _filled(_array(frame, "consumed_tokens"))
    if samples is None or not {"tokens_per_second", "samples_per_second"} <= {*frame.columns}:
        return None
    per_sample = _array(frame, "tokens_per_second") / _array(frame, "samples_per_second")
    if not np.isfinite(per_sample).any():
        return None
    steps = np.diff(np.nan_to_num(samples), prepend=0)
    return np.cumsum(steps * _filled(per_sample))


def without_restarts(seconds: np.ndarray) -> np.ndarray:
    """A resumed run counts from 0 again: here it goes on from where it was."""
    falls = np.diff(seconds, prepend=seconds[:1]) < 0
    before = np.concatenate([[0.0], seconds[:-1]])
    return seconds + np.cumsum(np.where(falls, before, 0.0))


def _has(frame: pd.DataFrame, column: str) -> bool:
    return column in frame and bool(frame[column].notna().to_numpy().any())


def _array(frame: pd.DataFrame, column: str) -> np.ndarray:
    return np.asarray(frame[column], dtype=float)


def _filled(values: np.ndarray) -> np.ndarray:
    """Empty cells (rows of a validation alone) get the value of the row before, the first ones of the row after."""
    return np.asarray(pd.Series(values).ffill().bfill())


def rounded(values: np.ndarray, digits: int = DIGITS) -> list[float | None]:
    """Significant digits; None for NaN and infinities, which JSON has no name for."""
    values = np.asarray(values, dtype=float)
    finite = np.isfinite(values)
    safe = np.where(finite & (values != 0), values, 1.0)
    places = digits - 1 - np.floor(np.log10(np.abs(safe)))
    # a whole number over a power of ten is the double that is written shortest
    up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)
    short = np.where(finite, np.round(np.where(finite, values, 0.0) * up / down) / up * down, np.nan)
    return [value if value == value else None for value in short.tolist()]


def compact(frame: pd.DataFrame) -> dict[str, Any]:
    """One run's part of the page's data: {"axes": {name: values}, "curves": {column: [steps, values]}}.

    Steps are the first one, then differences. A curve with points left out has a second pair, steps and means of equal
    parts: a mean of what is left, the highest and lowest points, would not be the curve's.
    """
    found: dict[str, Any] = {}
    for curve in curves_of(map(str, frame.columns)):
        steps, values = logged(frame, curve.column)
        if not len(steps):
            continue
        kept = keep_extremes(values)
        found[curve.column] = [_differences(steps[kept]), rounded(values[kept])]
        if len(kept) < len(values):
            means = [part_means(of, MOST_POINTS // 2) for of in (steps, values)]
            found[curve.column] += [_differences(means[0]), rounded(means[1])]
    return {"axes": {name: rounded(places, digits=7) for name, places in axes(frame).items()}, "curves": found}


def _differences(steps: np.ndarray) -> list[int]:
    return np.diff(np.round(steps).astype(int), prepend=0).tolist()
