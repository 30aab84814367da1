"""python -m vlmsft.compare sweep=ID | runs=[a,b] | runs=all | wandb=entity/project: what differs between runs.

Exit code 0: a table was shown, with what could not be read named on stderr; 2: there is nothing to show.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from vlmsft.cli import command
from vlmsft.errors import Problem, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from vlmsft.report.record import RunRecord
    from vlmsft.report.table import RunTable

SOURCES = ("sweep", "runs", "wandb")
FORMATS = ("table", "csv", "markdown")
FORMAT_OF_SUFFIX = {".csv": "csv", ".md": "markdown"}
UNENDED = ("running", "pending")
TEXTS = ("wandb", "sort", "output", "report", "plots")
IDS = ("sweep", "group")
SWITCHES = ("watch", "force")


@dataclass(frozen=True)
class Found:
    """notes: what could not be read, and offline runs that W&B's server doesn't have yet."""

    runs: list[RunRecord]
    notes: list[str]


@command("compare")
def main(cfg: DictConfig) -> None:
    compare(cfg)


def compare(cfg: DictConfig) -> None:
    """Shows, or writes, the table. Raises UserError where there is nothing to show or a key is wrong."""
    from vlmsft.report.table import run_table

    raise_wrong_values(cfg)
    if cfg.watch:
        watch(cfg)
    found = find(cfg)
    table = run_table(found.runs, cfg.sort)
    form = cfg.format or FORMAT_OF_SUFFIX.get(Path(cfg.output or "").suffix, "table")
    if cfg.output is not None:
        with _naming("output", cfg.output):
            write_new(Path(cfg.output), as_text(table, form))
    elif not cfg.watch:
        show(table, form)
    write_pages(cfg, found.runs)
    for note in found.notes:
        print(note, file=sys.stderr)


def raise_wrong_values(cfg: DictConfig) -> None:
    """Raises UserError with each key that is wrong before anything is read."""
    problems = kind_problems(cfg)
    given = [source for source in SOURCES if cfg[source] is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of sweep, runs and wandb"
        problems.append(Problem("runs", found, "one of sweep=ID, runs=all, runs=[a,b], wandb=entity/project"))
    if cfg.group is not None and cfg.wandb is None:
        problems.append(Problem("group", repr(cfg.group), "null without wandb=", f"Write sweep={cfg.group}"))
    if cfg.format not in (None, *FORMATS):
        problems.append(Problem("format", repr(cfg.format), f"one of {', '.join(FORMATS)}"))
    for key in ("output", "report", "plots"):
        if isinstance(cfg[key], str) and os.path.lexists(cfg[key]):
            problems.append(Problem(key, f"{cfg[key]}, which exists", "a new name: nothing is overwritten"))
    if problems:
        raise UserError(problems, "nothing was read")


def kind_problems(cfg: DictConfig) -> list[Problem]:
    """Values that are no text, no id, no number or no switch."""
    expected = [(key, is_text(cfg[key]) or cfg[key] is None, "a text") for key in TEXTS]
    expected += [(key, is_id(cfg[key]) or cfg[key] is None, "an id") for key in IDS]
    expected += [(key, isinstance(cfg[key], bool), "true or false") for key in SWITCHES]
    names = cfg.runs if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    are_ids = cfg.runs is None or (len(names) > 0 and all(map(is_id, names)))
    expected.append(("runs", are_ids, "all, or a list of names, ids and paths"))
    expected.append(("runs_dir", is_text(cfg.runs_dir), "a folder"))
    seconds = cfg.watch_seconds
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    expected.append(("watch_seconds", is_number and 0 < seconds < math.inf, "seconds, more than 0"))
    return [Problem(key, repr(cfg[key]), what, _quoted(key, cfg[key])) for key, holds, what in expected if not holds]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_id(value: Any) -> bool:
    """1 is a text without quotes."""
    return is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _quoted(key: str, value: Any) -> str:
    """3e211004 is a number too."""
    return f"""Quote it: {key}='"..."'""" if isinstance(value, (int, float)) and key in (*TEXTS, *IDS, "runs") else ""


def find(cfg: DictConfig) -> Found:
    """The runs that the config names. Raises UserError where there are none; a missing one among others is a note."""
    if cfg.wandb is not None:
        runs, problems = _of_wandb(cfg)
    elif cfg.sweep is not None:
        from vlmsft.report.runs import sweep_runs

        runs, problems = sweep_runs(str(cfg.sweep), Path(cfg.runs_dir)), []
    else:
        runs, problems = _of_folders(cfg)
    if not runs:
        where = cfg.wandb or cfg.runs_dir
        raise UserError(problems or Problem("runs", "no run", f"runs in {where}"), "there is nothing to show")
    from vlmsft.report.scores import with_comparable_scores

    runs = with_comparable_scores(runs, cfg.force)
    notes = [f"{run.label}: {note}" for run in runs for note in run.notes]
    return Found(runs, [*map(str, problems), *notes, *_unchecked(runs), *_offline(cfg, runs)])


def _of_folders(cfg: DictConfig) -> tuple[list[RunRecord], list[Problem]]:
    from vlmsft.report.runs import named_folders, read_run, run_folders

    if cfg.runs == "all":
        return [read_run(folder) for folder in run_folders(Path(cfg.runs_dir))], []
    folders: dict[Path, None] = {}
    problems: list[Problem] = []
    for name in cfg.runs if isinstance(cfg.runs, ListConfig) else [cfg.runs]:
        try:
            folders.update(dict.fromkeys(named_folders(str(name), Path(cfg.runs_dir))))
        except UserError as error:
            problems += error.problems
    return [read_run(folder) for folder in folders], problems


def _of_wandb(cfg: DictConfig) -> tuple[list[RunRecord], list[Problem]]:
    from vlmsft.report import wandb_runs

    group = None if cfg.group is None else str(cfg.group)
    if os.path.isdir(cfg.wandb):
        return wandb_runs.offline_runs(Path(os.path.abspath(cfg.wandb)), group), []
    return wandb_runs.online_runs(cfg.wandb, group), []


def _unchecked(runs: Sequence[RunRecord]) -> list[str]:
    """Scores that W&B has, which doesn't say how they were made."""
    from vlmsft.report.record import METRICS

    scored = [run for run in runs if not run.evaluations and any(name not in METRICS for name in run.metrics)]
    says = "W&B doesn't say how evaluation scores were made; runs=... of the run folders compares only those made alike"
    return [says] if len(scored) > 1 else []


def _offline(cfg: DictConfig, runs: Sequence[RunRecord]) -> list[str]:
    """The command that sends what W&B has offline only, where there is something."""
    from vlmsft.runtime.wandb_files import sync_command, unsynced_folders

    places = [Path(run.location) for run in runs] if cfg.wandb is None else [Path(os.path.abspath(cfg.wandb))]
    folders = [folder for place in places for folder in unsynced_folders(place)]
    if not folders:
        return []
    count = f"{len(folders)} offline W&B folder{'s' if len(folders) > 1 else ''}"
    return [f"{count} not uploaded yet: {sync_command(folders)}"]


# --- showing ----------------------------------------------------------------------------------------------------------


def show(table: RunTable, form: str) -> None:
    from vlmsft.report.table import as_rich
    from vlmsft.runtime.logging import console

    if form == "table" and console().is_terminal:
        console().print(as_rich(table, console()))
    else:
        sys.stdout.write(as_text(table, form))


def as_text(table: RunTable, form: str) -> str:
    from vlmsft.report.table import as_csv, as_markdown

    return {"csv": as_csv, "markdown": as_markdown, "table": _plain}[form](table)


def _plain(table: RunTable) -> str:
    """The terminal's table without a terminal: as wide as it is."""
    import io

    from rich.console import Console

    from vlmsft.report.table import as_rich

    page = io.StringIO()
    wide = Console(file=page, width=100_000)
    wide.print(as_rich(table, wide))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def write_new(path: Path, text: str) -> None:
    """Written aside first, so that Ctrl-C leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    if os.path.lexists(path):
        raise UserError(Problem("output", f"{path}, which exists", "a new name: nothing is overwritten"))
    os.replace(partial, path)


def write_pages(cfg: DictConfig, runs: Sequence[RunRecord]) -> None:
    """The HTML report, and the plots as PNG, where they are asked for."""
    if cfg.report is not None:
        from vlmsft.report.html import write_report

        with _naming("report", cfg.report):
            write_report(runs, cfg.report)
    if cfg.plots is not None:
        from vlmsft.report.plots import write_pngs

        with _naming("plots", cfg.plots):
            write_pngs(runs, cfg.plots)


@contextmanager
def _naming(key: str, path: str) -> Iterator[None]:
    """Says what was written where, or why not."""
    try:
        yield
    except OSError as error:
        found = f"{path}, where nothing can be written ({error.strerror or error})"
        raise UserError(Problem(key, found, "a new name in a folder of yours"), "this was not written") from error
    print(f"{'table' if key == 'output' else key}: {path}")


def watch(cfg: DictConfig) -> None:
    """The table until all runs have ended or Ctrl-C; where stdout is no terminal, anew when it has changed."""
    from vlmsft.runtime.logging import console

    try:
        if console().is_terminal:
            _watch_live(cfg, console())
        else:
            _watch_lines(cfg)
    except KeyboardInterrupt:
        print("no longer watched; the runs go on", file=sys.stderr)


def _watch_live(cfg: DictConfig, out: Console) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from vlmsft.report.table import as_rich, run_table

    with Live(console=out, auto_refresh=False, vertical_overflow="visible") as live:

        def update(found: Found) -> None:
            status = Text(f"{_count_states(found.runs)}; {time.strftime('%H:%M:%S')}; Ctrl-C ends the watching only")
            live.update(Group(as_rich(run_table(found.runs, cfg.sort), out), status), refresh=True)

        _until_ended(cfg, update)


def _watch_lines(cfg: DictConfig) -> None:
    from vlmsft.report.table import run_table

    last = ""

    def update(found: Found) -> None:
        nonlocal last
        text = as_text(run_table(found.runs, cfg.sort), cfg.format or "table")
        if text != last:
            print(text, flush=True)
        last = text

    _until_ended(cfg, update)


def _until_ended(cfg: DictConfig, update: Callable[[Found], None]) -> None:
    while True:
        found = find(cfg)
        update(found)
        if not any(run.state in UNENDED for run in found.runs):
            return
        time.sleep(cfg.watch_seconds)


def _count_states(runs: Sequence[RunRecord]) -> str:
    states = [run.state for run in runs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


if __name__ == "__main__":
    main()
