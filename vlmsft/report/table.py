"""One table of runs: what differs in their configs, beside what they reached. For a terminal, as CSV, as Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmsft.errors import Problem, UserError, nearest
from vlmsft.report.differences import differing_keys, short_names, show
from vlmsft.report.record import METRICS, RunRecord, metric

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

NOISE = ("id", "name", "run_dir", "sweep", "resume", "log.log_dir", "log.name", "log.tensorboard", "log.wandb")
"""Keys, and all below them, that say where a run is written and how it is called."""
STATE_STYLES = {"running": "cyan", "done": "green", "failed": "red", "infeasible": "yellow", "pending": "dim"}


@dataclass(frozen=True)
class Column:
    """key: as `sort` and CSV have it: "run", "state", a config's key or a metric's name
    title: as a person reads it
    """

    key: str
    title: str
    is_metric: bool = False


@dataclass(frozen=True)
class RunTable:
    """rows: for each run its cells by column key; a key that is not there has no value in this run."""

    columns: list[Column]
    rows: list[dict[str, Any]]


def run_table(runs: Sequence[RunRecord], sort: str | None = None) -> RunTable:
    """The table, in the order of `runs` or sorted.

    sort: a column's key or title, "-" before it = descending; runs without a value come last either way.
        Raises UserError where no column is called so.
    """
    keys = config_columns(runs)
    short = short_names(keys)
    columns = [Column("run", "run"), Column("state", "state")]
    columns += [Column(key, short[key]) for key in keys]
    columns += [Column(name, metric(name).title, is_metric=True) for name in metric_columns(runs)]
    rows = [_row(run, columns) for run in runs]
    return RunTable(columns, rows if sort is None else _sorted(rows, columns, sort))


def config_columns(runs: Sequence[RunRecord]) -> list[str]:
    """The keys that differ, without NOISE, by name: W&B keeps no order. Of keys with the same last name and the same
    values the one with the fewest parts: `seed` stands for `data.seed`, which interpolates it."""
    chosen: dict[tuple[str, ...], str] = {}
    for key in sorted(differing_keys(runs), key=lambda key: key.count(".")):
        if any(key == noise or key.startswith(f"{noise}.") for noise in NOISE):
            continue
        values = tuple(_text(run.config[key]) if key in run.config else "" for run in runs)
        chosen.setdefault((key.rpartition(".")[2], *values), key)
    return sorted(chosen.values())


def metric_columns(runs: Sequence[RunRecord]) -> list[str]:
    """Metrics that some run has: METRICS in their order, then evaluations' scores."""
    there = dict.fromkeys(name for run in runs for name, value in run.metrics.items() if value is not None)
    return [*(name for name in METRICS if name in there), *sorted(name for name in there if name not in METRICS)]


def _row(run: RunRecord, columns: Sequence[Column]) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.label, "state": run.state}
    for column in columns[2:]:
        if column.is_metric:
            if run.metrics.get(column.key) is not None:
                row[column.key] = run.metrics[column.key]
        elif column.key in run.config:
            row[column.key] = run.config[column.key]
    return row


def _sorted(rows: list[dict[str, Any]], columns: Sequence[Column], sort: str) -> list[dict[str, Any]]:
    wanted = sort.removeprefix("-")
    key = next((column.key for column in columns if wanted in (column.key, column.title)), None)
    if key is None:
        names = [name for column in columns for name in (column.key, column.title)]
        expected = f"a column: {', '.join(column.key for column in columns)}"
        raise UserError(Problem("sort", repr(sort), expected, nearest(wanted, names)))
    there = [row for row in rows if key in row and not _is_nan(row[key])]
    there.sort(key=lambda row: _order(row[key]), reverse=sort.startswith("-"))
    return there + [row for row in rows if not any(row is other for other in there)]


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers before words."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, float(value), "") if is_number else (1, 0.0, _text(value))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _text(value: Any) -> str:
    """A config's value with all its digits."""
    return repr(value) if isinstance(value, float) else show(value)


def _full(value: Any, column: Column) -> str:
    """A metric with seven digits, as metrics.csv has it; a config's value with all of its."""
    if column.is_metric:
        return f"{value:.0f}" if float(value).is_integer() else f"{value:.7g}"
    return _text(value)


def _short(value: Any, column: Column) -> str:
    """Four digits are enough for a person; a count of steps has all of its."""
    if column.is_metric and isinstance(value, float):
        if value.is_integer() and abs(value) < 1e9:
            return f"{value:.0f}"
        return f"{value:.4g}"
    return show(value)


# --- forms ------------------------------------------------------------------------------------------------------------


def as_csv(table: RunTable) -> str:
    """Column keys; what has no value is empty, NaN is "nan"."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.key for column in table.columns])
    for row in table.rows:
        writer.writerow([_full(row[column.key], column) if column.key in row else "" for column in table.columns])
    return text.getvalue()


def as_markdown(table: RunTable) -> str:
    """Numbers of metrics in bold where no run has a better one."""
    best = best_cells(table)
    lines = [_line([column.title for column in table.columns])]
    lines.append("|" + "|".join(" ---: " if column.is_metric else " --- " for column in table.columns) + "|")
    for number, row in enumerate(table.rows):
        cells = [cell_text(row, column) for column in table.columns]
        marked = [
            f"**{cell}**" if (number, column.key) in best else cell
            for cell, column in zip(cells, table.columns, strict=True)
        ]
        lines.append(_line(marked))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def cell_text(row: Mapping[str, Any], column: Column) -> str:
    return _short(row[column.key], column) if column.key in row else ""


def best_cells(table: RunTable) -> set[tuple[int, str]]:
    """(row number, column key) of the best value of each metric that has a better way, where values differ."""
    found = set()
    for column in table.columns:
        better = metric(column.key).better if column.is_metric else None
        values = [row[column.key] for row in table.rows if column.key in row and not _is_nan(row[column.key])]
        if better is None or len(set(values)) < 2:
            continue
        best = min(values) if better == "lower" else max(values)
        found |= {(number, column.key) for number, row in enumerate(table.rows) if row.get(column.key) == best}
    return found


def as_rich(table: RunTable, console: Console) -> RichTable:
    """The best values bold. Where it is wider than the console, each run gets a column instead of a row; what is wider
    still is folded."""
    wide, tall = _rich(table, transposed=False), _rich(table, transposed=True)
    return tall if _width(wide, console) > console.width >= _width(tall, console) else wide


def _width(made: RichTable, console: Console) -> int:
    """Characters that it takes unfolded; a console's own measure ends at its width."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=1_000_000), made).maximum


def _rich(table: RunTable, transposed: bool) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    best = best_cells(table)
    cells = [[Text(column.title, style="bold") for column in table.columns]]
    for number, row in enumerate(table.rows):
        styles = ["bold green" if (number, column.key) in best else "" for column in table.columns]
        styles[1] = STATE_STYLES.get(str(row["state"]), "")
        cells.append(
            [Text(cell_text(row, column), style=style) for column, style in zip(table.columns, styles, strict=True)]
        )
    if transposed:
        cells = [list(line) for line in zip(*cells, strict=True)]
    made = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(cells[0]):
        is_number = place > 0 if transposed else table.columns[place].is_metric
        made.add_column(head, justify="right" if is_number else "left", overflow="fold")
    for line in cells[1:]:
        made.add_row(*line)
    return made
