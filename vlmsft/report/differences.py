"""Which config keys differ between runs, and how keys and values are written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmsft.report.record import RunRecord

IDENTITY = ("id", "run_dir", "sweep.id", "sweep.num", "sweep.varies")
"""Differ in any two runs, and say nothing."""


def differing_keys(runs: Sequence[RunRecord]) -> list[str]:
    """Keys whose values are not the same in all runs (missing is a value of its own), in the order of the configs.

    Left out: what names the run itself, such as its folder and paths below it; those of runs of other names too.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in IDENTITY)
    return [key for key in keys if _differs(key, runs)]


def _differs(key: str, runs: Sequence[RunRecord]) -> bool:
    if len({comparable(run.config, key) for run in runs}) == 1:
        return False
    return len({_without_id(run, key) for run in runs}) > 1


def _without_id(run: RunRecord, key: str) -> str:
    """Of words only, and as a word of its own: an id may be 1."""
    text = comparable(run.config, key)
    if not isinstance(run.config.get(key), str):
        return text
    for own, name in ((run.config.get("run_dir"), "<run_dir>"), (f"{run.name}/{run.id}", "<run>"), (run.id, "<id>")):
        text = re.sub(rf"(?<!\w){re.escape(str(own))}(?!\w)", name, text)
    return text


def comparable(config: Mapping[str, Any], key: str) -> str:
    """A value as text; "" for a key that is not there."""
    if key not in config:
        return ""
    value = config[key]
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, (list, dict)) else repr(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """{"optim.max_lr": "max_lr"}; as many parts from the end as tell them apart."""
    short: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        short[key] = next((end for end in ends if _is_only_one(end, keys)), key)  # `seed` beside `data.seed`
    return short


def _is_only_one(end: str, keys: Sequence[str]) -> bool:
    return sum(f".{key}".endswith(f".{end}") for key in keys) == 1


def show(value: Any) -> str:
    """As a person writes it: 0.001, 3e-05, true."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
