"""Which evaluation's scores a table shows of each run: those that were made alike, so that they may be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmsft.evaluation import manifest as manifests
from vlmsft.report.record import Evaluation, RunRecord


def with_comparable_scores(runs: Sequence[RunRecord], force: bool = False) -> list[RunRecord]:
    """The runs with their evaluations' scores: task by task those made as most runs' are, the newest of these.

    Where all of a run's scores of a task were made otherwise it has none, and a note that says what differs.

    force: its newest score stands there all the same, beside the note
    """
    tasks = sorted({task for run in runs for each in run.evaluations for task in each.scores})
    standards = {task: _standard(runs, task) for task in tasks}
    return [_with_scores(run, standards, force) for run in runs]


def _standard(runs: Sequence[RunRecord], task: str) -> tuple[RunRecord, Evaluation]:
    """An evaluation that most runs have one like; where several are that, the first run's newest."""
    kinds: dict[str, tuple[RunRecord, Evaluation]] = {}  # hundreds of runs are evaluated in a few ways
    of_run = [[_kind(each, task) for each in _of_task(run, task)] for run in runs]
    for run, own in zip(runs, of_run, strict=True):
        for kind, each in zip(reversed(own), reversed(_of_task(run, task)), strict=True):
            kinds.setdefault(kind, (run, each))
    alike = {kind: {k for k in kinds if not _differences(kinds[k][1], one, task)} for kind, (_, one) in kinds.items()}
    return kinds[max(kinds, key=lambda kind: sum(not alike[kind].isdisjoint(own) for own in of_run))]


def _kind(evaluation: Evaluation, task: str) -> str:
    """The same for evaluations between which nothing differs."""
    return json.dumps(manifests.comparable_facts(evaluation.manifest, task), sort_keys=True)


def _of_task(run: RunRecord, task: str) -> list[Evaluation]:
    return [each for each in run.evaluations if task in each.scores]


def _differences(one: Evaluation, other: Evaluation, task: str) -> list[str]:
    return manifests.differences(one.manifest, other.manifest, task)


def _with_scores(run: RunRecord, standards: Mapping[str, tuple[RunRecord, Evaluation]], force: bool) -> RunRecord:
    scores: dict[str, float | None] = {}
    reasons: dict[str, list[str]] = {}  # {what differs: tasks}
    for task, (other, standard) in standards.items():
        own = _of_task(run, task)
        alike = [each for each in own if not _differences(each, standard, task)]
        if own and not alike:
            differences = "; ".join(_differences(own[-1], standard, task))
            reasons.setdefault(f"made otherwise than those of {other.label} ({differences})", []).append(task)
        for each in (alike or (own if force else []))[-1:]:
            scores |= {f"{task}/{name}": score for name, score in each.scores[task].items()}
    says, remedy = ("shown although", "") if force else ("not shown:", "; force=true shows them")
    notes = [f"scores of {', '.join(tasks)} {says} {reason}{remedy}" for reason, tasks in reasons.items()]
    return replace(run, metrics={**run.metrics, **scores}, notes=(*run.notes, *notes))
