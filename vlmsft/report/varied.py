"""What someone varied between runs, and what a run is called for it."""

from __future__ import annotations

from collections.abc import Sequence

from vlmsft.report.differences import comparable, short_names, show
from vlmsft.report.record import RunRecord
from vlmsft.report.table import config_columns


def swept_keys(runs: Sequence[RunRecord]) -> list[str]:
    """Keys of the run table whose values are numbers, words or switches: those that a plot can have as an axis.

    Keys that always change together (one interpolates the other) come once, the first of them.
    """
    found: dict[tuple[int, ...], str] = {}
    for key in config_columns(runs):
        values = [run.config.get(key) for run in runs]
        if any(isinstance(value, (list, dict)) for value in values) or all(value is None for value in values):
            continue
        order: dict[str, int] = {}
        pattern = tuple(order.setdefault(comparable(run.config, key), len(order)) for run in runs)
        found.setdefault(pattern, key)
    return list(found.values())


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """What each run is called in plots: what varies, where up to three keys do and tell the runs apart."""
    keys = swept_keys(runs)
    names = short_names(keys)
    varied = [" ".join(f"{names[key]}={show(run.config.get(key))}" for key in keys) for run in runs]
    if 1 <= len(keys) <= 3 and len(set(varied)) == len(runs):
        return varied
    if len({run.name for run in runs}) == 1 and len({run.id for run in runs}) == len(runs):
        return [run.id for run in runs]
    full = [run.label for run in runs]
    return full if len(set(full)) == len(runs) else [run.location for run in runs]
