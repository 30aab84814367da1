"""The numbers that sum up a run, from the rows of its metrics: the same for a run folder and for W&B."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, float]]
"""A row for each step, in the order of the steps. What was not measured is not in a row; NaN is a value."""

MEDIANS = ("samples_per_second", "tokens_per_second", "tflops_per_second_per_gpu", "mfu", "data_wait_fraction")
"""Summed up by their median: the first steps of each start are slow."""


def summarize(rows: Rows, num_gpus: int) -> dict[str, float | None]:
    """The numbers of vlmsft.report.record.METRICS; None = not measured.

    num_gpus: of all nodes; 0 = trained on a CPU, so that there are no GPU hours
    """
    train, validation = _values(rows, "reduced_train_loss"), _values(rows, "val_loss")
    seconds = training_seconds(rows)
    return {
        "final_val_loss": validation[-1] if validation else None,
        "best_val_loss": _of_numbers(min, validation),
        "final_train_loss": train[-1] if train else None,
        "best_train_loss": _of_numbers(min, train),
        "step": _of_numbers(max, _values(rows, "step")),
        "max_lr": _of_numbers(max, _values(rows, "lr")),
        **{name: _of_numbers(statistics.median, _values(rows, name)) for name in MEDIANS},
        "peak_memory_gib": _of_numbers(max, _values(rows, "peak_memory_gib")),
        "gpu_hours": seconds * num_gpus / 3600 if seconds is not None and num_gpus else None,
    }


def _values(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def _of_numbers(function: Callable[[Iterable[float]], float], values: Iterable[float]) -> float | None:
    """NaN left out; NaN where there is nothing else."""
    values = list(values)
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return math.nan if values else None
    return function(numbers)


def training_seconds(rows: Rows) -> float | None:
    """Validations and checkpoints included; a continued run's starts added up, each up to its last row."""
    elapsed = [seconds for seconds in _values(rows, "elapsed_seconds") if not math.isnan(seconds)]
    if not elapsed:
        return None
    ends = [before for before, after in itertools.pairwise(elapsed) if after < before]
    return sum(ends) + elapsed[-1]


def num_gpus(config: Mapping[str, Any], gpus_of_machine: int) -> int:
    """Of a flat config's trainer, as Lightning reads it.

    gpus_of_machine: what "auto" and -1 mean
    """
    if config.get("trainer.accelerator") != "gpu":
        return 0
    devices = config.get("trainer.devices")
    if isinstance(devices, list):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 0:
        devices = gpus_of_machine
    nodes = config.get("trainer.num_nodes")
    return devices * (nodes if isinstance(nodes, int) else 1)


def nan_notes(rows: Rows) -> list[str]:
    """Each metric that is NaN somewhere, with the first such step."""
    notes = []
    for name in dict.fromkeys(name for row in rows for name in row):
        bad = [row for row in rows if math.isnan(row.get(name, 0.0))]
        if bad:
            count = f"{len(bad)} row{'s' if len(bad) > 1 else ''}"
            notes.append(f"{name} is NaN in {count}, first at step {bad[0].get('step', math.nan):.0f}")
    return notes
