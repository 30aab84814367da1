"""Runs as W&B has them: its offline folders, and its server. The same records as of their run folders, where
vlmsft.runtime.wandb logged them; of other runs what has the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmsft.errors import Problem, UserError
from vlmsft.report.record import RunRecord
from vlmsft.report.runs import command_of, commit_of, curves, has_all_steps, is_fresh
from vlmsft.report.summary import nan_notes, num_gpus, summarize
from vlmsft.runtime.provenance import flatten
from vlmsft.runtime.wandb_files import SCORES, WandbLog, has_key, log_files, read_log

STEP_NAMES = ("step", "trainer/global_step", "_step")
"""What a row's optimizer step may be called: by us, by Lightning's own logger, by W&B."""
STATES = {"running": "running", "finished": "done", "crashed": "failed", "failed": "failed", "killed": "cancelled"}
SECONDS_TO_ANSWER = 30
RUNS_AT_ONCE = 8


def record(
    *,
    run_id: str,
    location: str,
    state: str,
    config: Mapping[str, Any],
    read_rows: Callable[[], list[dict[str, float]]],
    scores: Mapping[str, float],
    notes: Sequence[str],
) -> RunRecord:
    """config: as W&B has it, vlmsft's resolved config with "provenance"; read_rows: of `merged`; called again for
    curves, so that a record holds none"""
    provenance = config.get("provenance")
    provenance = provenance if isinstance(provenance, dict) else {}
    own = {key: value for key, value in config.items() if key not in ("provenance", "_wandb")}
    flat, rows = flatten(own), read_rows()
    gpus = num_gpus(flat, len((provenance.get("machine") or {}).get("gpus") or ()))
    return RunRecord(
        name=str(own.get("name", "")) or run_id,
        id=str(own.get("id", run_id)),
        location=location,
        state="done" if has_all_steps(flat, rows) else state,
        config=flat,
        metrics={**summarize(rows, gpus), **scores},
        curves=lambda: curves(read_rows()),
        command=command_of(provenance.get("overrides") or []),
        working_directory=str(provenance.get("working_directory", "")),
        commit=commit_of(provenance),
        sweep_id=flat.get("sweep.id"),
        notes=(*notes, *nan_notes(rows)),
    )


def merged(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """W&B's history as vlmsft.report.summary.Rows: one row for each optimizer step, numbers only.

    A validation's numbers come in a row of their own after the step's; an evaluation's have no step, and are left out.
    """
    lines = [{name: n for name, value in line.items() if (n := _number(value)) is not None} for line in history]
    name_of_step = next((name for name in STEP_NAMES if any(name in line for line in lines)), "")
    rows: dict[float, dict[str, float]] = {}
    for numbers in lines:
        step = numbers.get(name_of_step)
        if step is not None:
            row = rows.setdefault(step, {"step": step})
            row.update({name: number for name, number in numbers.items() if not name.startswith("_")})
    return [rows[step] for step in sorted(rows)]


def _number(value: Any) -> float | None:
    """JSON has no NaN: W&B writes it as a word."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


# --- offline folders --------------------------------------------------------------------------------------------------


def offline_runs(folder: Path, group: str | None = None) -> list[RunRecord]:
    """The runs in W&B's files below a folder; the starts of one run are one record. Raises UserError where none is.

    group: those of this group only
    """
    logs: dict[str, list[WandbLog]] = {}
    problems = []
    files = log_files(folder)
    for path in files:
        try:
            log = read_log(path)
        except (OSError, ValueError) as error:
            problems.append(Problem(str(path), str(error).splitlines()[0], "a file that W&B wrote"))
            continue
        if not log.run_id:
            problems.append(Problem(str(path), "no run in it", "a file that W&B wrote: it was cut off at its start"))
        elif group in (None, log.group):
            logs.setdefault(f"{log.entity}/{log.project}/{log.run_id}", []).append(log)
    if not logs:
        of_group = "" if group is None else f" of group {group!r}"
        expected = f"a folder with W&B's offline runs{of_group} (offline-run-*)"
        raise UserError(problems or Problem("wandb", f"{folder}, with {len(files)} W&B files", expected))
    unread = [str(problem) for problem in problems]
    found = [_of_logs(starts) for starts in logs.values()]
    return [_with_notes(found[0], unread), *found[1:]]


def _with_notes(run: RunRecord, notes: Sequence[str]) -> RunRecord:
    return replace(run, notes=(*run.notes, *notes)) if notes else run


def _of_logs(starts: Sequence[WandbLog]) -> RunRecord:
    last = starts[-1]
    paths = [log.path for log in starts]
    scores = [row for log in starts for row in log.rows if any(name.startswith(SCORES) for name in row)]
    return record(
        run_id=last.run_id,
        location=str(last.path.parent),
        state=_offline_state(last),
        config=last.config,
        read_rows=lambda: merged(row for path in paths for row in read_log(path).rows),
        scores=_scores({name: value for row in scores for name, value in row.items()}),
        notes=[f"{last.path.name}: the last record is cut off, and left out"] if last.is_cut else [],
    )


def _offline_state(log: WandbLog) -> str:
    if log.exit_code is not None:
        return "failed" if log.exit_code else "done"
    return "running" if is_fresh([log.path]) else "unknown"


def _scores(summary: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name.removeprefix(SCORES): _number(summary[name]) for name in summary if name.startswith(SCORES)}
    return {name: number for name, number in numbers.items() if number is not None}


# --- the server -------------------------------------------------------------------------------------------------------


def online_runs(path: str, group: str | None = None) -> list[RunRecord]:
    """The runs of a project on W&B's server, oldest first. Raises UserError where W&B gives none.

    path: entity/project, or project of the account's default entity
    group: those of this group only
    """
    if not has_key():
        remedy = "Set WANDB_API_KEY or type `wandb login`; wandb=FOLDER reads what W&B wrote offline"
        raise UserError(Problem("wandb", "no login to W&B", "a key", remedy))
    if not all(path.split("/")) or path.count("/") > 1:
        raise UserError(Problem("wandb", repr(path), "entity/project, or a folder that exists"))
    import wandb

    try:
        api = wandb.Api(timeout=SECONDS_TO_ANSWER)  # pyright: ignore[reportAttributeAccessIssue]
        filters = {} if group is None else {"group": group}
        runs = list(api.runs(path, filters=filters, lazy=False))
    except Exception as error:  # W&B's client raises a dozen kinds, its service's own among them
        said = (str(error) or type(error).__name__).splitlines()[0]
        remedy = f"W&B says: {said}"
        raise UserError(Problem("wandb", repr(path), "a project that this account can read", remedy)) from error
    if not runs:
        of_group = "" if group is None else f" of group {group!r}"
        raise UserError(Problem("wandb", f"no run{of_group} in {path}", "a project with runs"))
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        return list(pool.map(_of_server, runs))


def _of_server(run: Any) -> RunRecord:
    notes: list[str] = []

    def read_rows() -> list[dict[str, float]]:
        try:
            return merged(run.scan_history(use_cache=False))
        except Exception as error:  # as above; the run is still shown
            notes.append(f"W&B gave no history: {(str(error) or type(error).__name__).splitlines()[0]}")
            return []

    made = record(
        run_id=run.id,
        location="/".join(run.path),
        state=STATES.get(run.state, "unknown"),
        config=run.config,
        read_rows=read_rows,
        scores=_scores(dict(run.summary)),
        notes=(),
    )
    return _with_notes(made, notes)
