"""Runs as their folders have them: runs/<name>/<id>. Imports neither torch nor NeMo.

Reading never fails as a whole: what a folder lacks, or holds half of, is a note of its record. Folders are read while
their runs write them.
"""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlmsft.errors import Problem, UserError, nearest
from vlmsft.evaluation.manifest import comparable_facts
from vlmsft.report.record import Evaluation, RunRecord, SampleAnswer
from vlmsft.report.summary import nan_notes, num_gpus, summarize
from vlmsft.runtime.metrics_rows import ENDED_FILE, FAILURE_FILE, read_metrics
from vlmsft.runtime.provenance import flatten

if TYPE_CHECKING:
    from vlmsft.sweeping.ledger import JobRow

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's is ten times as fast, and not built everywhere."""
FILES = ("config.yaml", "provenance.json", "metrics.csv", "overrides.yaml", "config.yaml.partial")
"""A folder with one of them is a run's."""
FRESH_SECONDS = 600.0
"""A run that has written nothing for so long doesn't run any more: steps and checkpoints take less."""
MAX_DEPTH = 4
"""Of run folders below runs/: a name may hold slashes."""


# --- finding ----------------------------------------------------------------------------------------------------------


def is_run_folder(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in FILES)


def run_folders(folder: Path, depth: int = MAX_DEPTH) -> list[Path]:
    """All run folders in `folder`, itself included, by path; nothing inside a run folder is looked at.

    Raises UserError where a folder can't be read.
    """
    if is_run_folder(folder):
        return [folder]
    if depth == 0 or not folder.is_dir():
        return []
    try:
        children = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        found = f"{error.filename}, which can't be read ({error.strerror})"
        raise UserError(Problem("runs", found, "folders of yours")) from error
    return [found for child in children for found in run_folders(child, depth - 1)]


def named_folders(name: str, runs_dir: Path) -> list[Path]:
    """The run folders that a user means. Raises UserError where there are none.

    name: a run folder or one above several, from here or from runs_dir; or the id of a run
    """
    for folder in (Path(os.path.abspath(os.path.expanduser(name))), runs_dir / name):
        if found := run_folders(folder):
            return found
    known = run_folders(runs_dir)
    if found := [folder for folder in known if folder.name == name]:
        return found
    paths = [folder.relative_to(runs_dir) for folder in known]
    choices = [text for path in paths for text in (path.name, str(path), str(path.parent))]
    remedy = nearest(name, choices) or f"Give <name>/<id> or an id of a run below {runs_dir}, or the path of a folder"
    raise UserError(Problem("runs", f"{name!r}, where no run is", "a run folder, or a folder of some", remedy))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_run(run_dir: Path, state: str | None = None, sweep_id: str | None = None) -> RunRecord:
    """The record of a run folder.

    state, sweep_id: what a sweep's ledger says; None = as the folder has it
    """
    notes: list[str] = []
    start, config = _newest_config(run_dir, notes)
    provenance = _read_json(start / "provenance.json", notes, run_dir)
    rows, row_notes = read_metrics(run_dir / "metrics.csv")
    flat = flatten(config)
    state = state or _state(run_dir, flat, rows)
    if state != "running":  # a row that is just being written is no fault
        notes += row_notes
    notes += [f"metrics.csv: {note}" for note in nan_notes(rows)]
    gpus = num_gpus(flat, len((provenance.get("machine") or {}).get("gpus") or ()))
    overrides = _read_yaml(start / "overrides.yaml", [], run_dir)
    return RunRecord(
        name=str(config.get("name", run_dir.parent.name)),
        id=str(config.get("id", run_dir.name)),
        location=str(run_dir),
        state=state,
        config=flat,
        metrics=summarize(rows, gpus),
        curves=lambda: curves(read_metrics(run_dir / "metrics.csv")[0]),
        command=command_of(overrides if isinstance(overrides, list) else []),
        working_directory=str(provenance.get("working_directory", "")),
        commit=commit_of(provenance),
        sweep_id=sweep_id or flat.get("sweep.id"),
        answers=read_answers(run_dir / "answers.jsonl", notes),
        evaluations=read_evaluations(run_dir / "evaluation", notes),
        notes=tuple(notes),
    )


def _newest_config(run_dir: Path, notes: list[str]) -> tuple[Path, dict[str, Any]]:
    """The folder and the config of the newest start (the run folder, resume-1, ...) whose config is whole."""
    resumes = [path for path in run_dir.glob("resume-*") if path.is_dir() and path.name[7:].isdigit()]
    starts = [run_dir, *sorted(resumes, key=lambda path: int(path.name[7:]))]
    for start in reversed(starts):
        config = _read_yaml(start / "config.yaml", notes, run_dir)
        if isinstance(config, dict) and config:
            return start, config
    return run_dir, {}


def _read_yaml(path: Path, notes: list[str], run_dir: Path) -> Any:
    name = path.relative_to(run_dir)
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=LOADER)
    except FileNotFoundError:
        notes.append(f"{name}: missing, the start was cut off")
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        notes.append(f"{name}: can't be read ({_first_line(error)})")
        return None
    if not text.strip():
        notes.append(f"{name}: empty")
    elif not text.endswith("\n"):
        notes.append(f"{name}: cut off")
    return tree


def _read_json(path: Path, notes: list[str], run_dir: Path) -> dict[str, Any]:
    name = path.relative_to(run_dir)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{name}: missing, the start was cut off")
    except (OSError, ValueError) as error:
        notes.append(f"{name}: can't be read ({_first_line(error)})")
    else:
        if isinstance(tree, dict):
            return tree
        notes.append(f"{name}: no JSON object")
    return {}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def curves(rows: Sequence[Mapping[str, float]]) -> Any:
    """A DataFrame of the rows; what was not measured is NaN."""
    import pandas

    return pandas.DataFrame.from_records(list(rows))


def read_answers(path: Path, notes: list[str]) -> tuple[SampleAnswer, ...]:
    """Those of the last validation; a line whose end is missing is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    found: dict[int, list[SampleAnswer]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            pictures = tuple(str(path.parent / name) for name in row["image"])
            answer = SampleAnswer(
                row["step"], row["number"], row["question"], row["reference"], row["answer"], pictures
            )
        except (ValueError, KeyError, TypeError):
            notes.append(f"{path.name}: line {number} can't be understood, and is left out")
            continue
        found.setdefault(answer.step, []).append(answer)
    return tuple(found[max(found)]) if found else ()


def read_evaluations(folder: Path, notes: list[str]) -> tuple[Evaluation, ...]:
    """Of <run_dir>/evaluation/*.json, oldest first."""
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        tree = _read_json(path, notes, folder.parent)
        try:
            manifest, tasks = tree["manifest"], tree["scores"].items()
            scores = {task: {name: entry["score"] for name, entry in metrics.items()} for task, metrics in tasks}
            for task in scores:
                comparable_facts(manifest, task)
            found.append(Evaluation(path.stem, manifest, scores))
        except (AttributeError, KeyError, TypeError):
            if tree:  # else a note says already what is wrong
                notes.append(f"{path.relative_to(folder.parent)}: scores in a form that is not known, left out")
    return tuple(found)


def _state(run_dir: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> str:
    if (run_dir / ENDED_FILE).exists() or has_all_steps(config, rows):
        return "done"
    if (run_dir / FAILURE_FILE).exists():
        return "failed"
    return "running" if is_fresh(run_dir / name for name in ("metrics.csv", "nemo.log", *FILES)) else "unknown"


def has_all_steps(config: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> bool:
    steps = config.get("trainer.max_steps")
    return isinstance(steps, int) and steps > 0 and bool(rows) and rows[-1].get("step", 0) >= steps


def is_fresh(paths: Iterable[Path]) -> bool:
    """Whether one of the files was written within FRESH_SECONDS."""
    return any(path.exists() and time.time() - path.stat().st_mtime < FRESH_SECONDS for path in paths)


# --- doing it again ---------------------------------------------------------------------------------------------------


def command_of(overrides: Sequence[str]) -> str:
    """What to type to do a run again, in a run folder of its own."""
    own = ("id=", "run_dir=", "sweep.")
    kept = [override for override in overrides if not override.lstrip("+").startswith(own)]
    return f"python -m vlmsft.train {shlex.join(kept)}" if kept else ""


def commit_of(provenance: Mapping[str, Any]) -> str:
    code = provenance.get("code") or {}
    changed = " with the changes in diff.patch" if code.get("dirty") is True else ""
    return f"{code['commit']}{changed}" if code.get("commit") else ""


# --- sweeps -----------------------------------------------------------------------------------------------------------


def sweep_runs(sweep: str, runs_dir: Path) -> list[RunRecord]:
    """A record for each job of a sweep, also of those without a run folder yet. Raises UserError where there is none.

    sweep: its id, or its folder
    """
    folder = Path(sweep) if (Path(sweep) / "ledger.sqlite").is_file() else runs_dir / "sweeps" / sweep
    if (folder / "ledger.sqlite").is_file():
        from vlmsft.sweeping.ledger import Ledger

        try:
            jobs = Ledger(folder).jobs()
        except sqlite3.Error as error:
            raise UserError(Problem(f"{folder}/ledger.sqlite", str(error), "a sweep's ledger")) from error
        return [_of_job(job, folder.name) for job in jobs]
    found = [folder for folder in run_folders(runs_dir) if _sweep_of(folder) == sweep]
    if not found:
        known = sorted(path.name for path in (runs_dir / "sweeps").glob("*") if path.is_dir())
        remedy = nearest(sweep, known) or (f"There are {', '.join(known)}" if known else "")
        raise UserError(Problem("sweep", repr(sweep), f"a sweep below {runs_dir / 'sweeps'}", remedy))
    return [read_run(folder) for folder in found]


def _sweep_of(run_dir: Path) -> Any:
    sweep = _newest_config(run_dir, [])[1].get("sweep")
    return sweep.get("id") if isinstance(sweep, dict) else None


def _of_job(job: JobRow, sweep_id: str) -> RunRecord:
    run_dir = Path(job.run_dir)
    if is_run_folder(run_dir):
        record = read_run(run_dir, job.state, sweep_id)
    else:
        record = RunRecord(
            name=run_dir.parent.name,
            id=run_dir.name,
            location=str(run_dir),
            state=job.state,
            config=flatten(yaml.load(job.record["config_yaml"], Loader=LOADER)),
            metrics={},
            curves=lambda: curves([]),
            command=command_of(job.record["overrides"]),
            sweep_id=sweep_id,
        )
    return replace(record, notes=(*record.notes, f"{job.state}: {job.reason}")) if job.reason else record
