"""Runs to compare: the folders that a real sweep of four jobs left (tests/report/data), and what may happen to them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from score_cases import manifest

from vlmsft.report.record import Evaluation, RunRecord
from vlmsft.report.runs import curves

DATA = Path(__file__).parent / "data"
"""experiment=demo with 20 steps, optim.max_lr=1e-3,3e-3 strategy.tensor_model_parallel_size=1,2: the text files of the
run folders, with other paths and another host than those of the machine that they ran on."""


def sweep(tmp_path: Path) -> list[Path]:
    """The four run folders in a runs/ of their own, in the order of the jobs."""
    shutil.copytree(DATA, tmp_path / "runs")
    return sorted((tmp_path / "runs" / "lr_tp").iterdir())


def made_up(
    id: str,
    config: dict | None = None,
    state: str = "done",
    evaluations: Sequence[Evaluation] = (),
    **metrics: float | None,
) -> RunRecord:
    """A record without files."""
    return RunRecord(
        "demo",
        id,
        f"/runs/demo/{id}",
        state,
        config or {},
        metrics,
        curves=lambda: curves([]),
        evaluations=tuple(evaluations),
    )


def evaluation(score: float, tasks: Sequence[str] = ("sample",), **facts: Any) -> Evaluation:
    """Of one metric; facts: what `manifest` takes."""
    return Evaluation("0", manifest(tasks, **facts), {task: {"rouge": score} for task in tasks})
