"""What a run's metrics.csv tells: how far it is, and the metric that a sweep looks for. Neither torch nor NeMo."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.csv"
TAIL_BYTES = 64 * 1024
MODES = {"min": min, "max": max, "last": lambda values: values[-1]}


@dataclass(frozen=True)
class Progress:
    """step: optimizer steps done; the losses are the last ones, None where there is none yet"""

    step: int = 0
    train_loss: float | None = None
    val_loss: float | None = None


def objective_of(run_dir: str | os.PathLike[str], name: str, mode: str) -> float | None:
    """The smallest, largest or last value of a metric; None where the run has no (finite) one.

    name: a column of metrics.csv
    mode: a key of MODES
    """
    values = [value for row in _rows(Path(run_dir, METRICS_FILE)) if (value := _number(row.get(name))) is not None]
    values = [value for value in values if math.isfinite(value)]
    return MODES[mode](values) if values else None


def progress_of(run_dir: str | os.PathLike[str]) -> Progress:
    """How far a run is, by the end of its metrics.csv."""
    rows = _tail(Path(run_dir, METRICS_FILE))
    if not rows:
        return Progress()
    return Progress(int(_last(rows, "step") or 0), _last(rows, "reduced_train_loss"), _last(rows, "val_loss"))


def _last(rows: list[dict[str, str]], name: str) -> float | None:
    values = (_number(row.get(name)) for row in reversed(rows))
    return next((value for value in values if value is not None), None)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def _tail(path: Path) -> list[dict[str, str]]:
    """The rows of the last TAIL_BYTES."""
    try:
        with open(path, "rb") as file:
            header = file.readline()
            start, size = file.tell(), file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    lines = text.splitlines()
    if size - TAIL_BYTES > start:
        lines = lines[1:]  # cut in the middle
    return list(csv.DictReader([header.decode("utf-8"), *lines]))


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
