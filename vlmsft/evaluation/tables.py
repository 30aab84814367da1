"""An evaluation's results as they are read: on the console, as Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from vlmsft.runtime.logging import console

if TYPE_CHECKING:
    from vlmsft.evaluation.results import Results, Row

TEMPLATE = Path(__file__).with_name("results.html.j2")
FINE_SCALE = 10.0
"""Scores up to this get two decimals: judges' points; percentages get one."""
MINUS = "−"


@dataclass(frozen=True)
class Texts:
    """A row as it is read; "" where there is nothing. verdict: "better", "worse" where Δ's interval leaves out zero"""

    task: str
    metric: str
    model: str
    score: str
    interval: str
    delta: str
    delta_interval: str
    win_tie_loss: str
    num: str
    missing: str
    spread: str
    verdict: str


HEADERS = {
    "task": "task",
    "metric": "metric",
    "model": "model",
    "score": "score",
    "interval": "95 %",
    "delta": "Δ",
    "delta_interval": "95 % of Δ",
    "win_tie_loss": "win/tie/loss",
    "num": "n",
    "missing": "missing",
    "spread": "± repeats",
}
NAMES = ("task", "metric", "model")


def texts(results: Results) -> list[Texts]:
    """One for each row."""
    digits = _digits(results.rows)
    return [_texts(row, digits[row.task, row.metric]) for row in results.rows]


def _digits(rows: Iterable[Row]) -> dict[tuple[str, str], int]:
    digits: dict[tuple[str, str], int] = {}
    for row in rows:
        fine = row.summary.score is None or abs(row.summary.score) <= FINE_SCALE
        digits[row.task, row.metric] = min(digits.get((row.task, row.metric), 2), 2 if fine else 1)
    return digits


def _texts(row: Row, digits: int) -> Texts:
    summary, difference = row.summary, row.difference
    verdict = ""
    if difference and difference.interval:
        low, high = difference.interval
        verdict = "better" if low > 0 else "worse" if high < 0 else ""
    return Texts(
        *(row.task, row.metric, row.model),
        score=_number(summary.score, digits),
        interval=_range(summary.interval, digits),
        delta=_number(difference.delta, digits, sign=True) if difference else "",
        delta_interval=_range(difference.interval, digits, sign=True) if difference else "",
        win_tie_loss=f"{difference.win}/{difference.tie}/{difference.loss}" if difference else "",
        num=f"{summary.num}",
        missing=f"{summary.num_missing}" if summary.num_missing else "",
        spread=_number(summary.spread, digits + 1),
        verdict=verdict,
    )


def _number(value: float | None, digits: int, sign: bool = False) -> str:
    if value is None:
        return ""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", MINUS)


def _range(interval: tuple[float, float] | None, digits: int, sign: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (_number(end, digits, sign) for end in interval)
    return f"{low} to {high}"


def _shown_columns(lines: Sequence[Texts]) -> list[str]:
    """Those that say something."""
    return [name for name in HEADERS if name in NAMES or any(getattr(line, name) for line in lines)]


def show(results: Results) -> None:
    """The rows on the console, and what they should not have been made of."""
    lines = texts(results)
    columns = _shown_columns(lines)
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(HEADERS[name], justify="left" if name in NAMES else "right", no_wrap=name not in NAMES)
    previous: Texts | None = None
    for line in lines:
        table.add_row(*(_styled(line, name, previous) for name in columns))
        previous = line
    console().print(table)
    for note in results.forced:
        console().print(note, style="yellow", markup=False, highlight=False)


STYLES = {"better": "green", "worse": "red", "": ""}


def _styled(line: Texts, name: str, previous: Texts | None) -> Text:
    """Names that the row above has already are left out in a terminal; in a log each line stands by itself."""
    value = getattr(line, name)
    if console().is_terminal and previous is not None:
        is_same = previous.task == line.task and (name == "task" or previous.metric == line.metric)
        value = "" if is_same and name in ("task", "metric") else value
    return Text(value, style=STYLES[line.verdict] if name.startswith("delta") else "")


def matrix(results: Results) -> tuple[list[tuple[str, str]], list[tuple[str, list[Texts | None]]]]:
    """The tutorial's table: (task, metric) of each column, and (model, cell of each column) of each row."""
    cells = {(line.model, line.task, line.metric): line for line in texts(results)}
    columns = list(dict.fromkeys((row.task, row.metric) for row in results.rows))
    rows = [(model, [cells.get((model, *column)) for column in columns]) for model in results.models]
    return columns, [(model, row) for model, row in rows if any(row)]


def as_csv(found: Mapping[str, Any]) -> str:
    """results.json's content with all digits, a line for each model, task and metric; an empty field = none."""
    intervals = {"interval": ("low", "high"), "delta_interval": ("delta_low", "delta_high")}
    lines = []
    for model, task, metric, values in _flat(found):
        line: dict[str, Any] = {"model": model, "task": task, "metric": metric}
        for name, value in values.items():
            if name in intervals:
                line.update(zip(intervals[name], value or (None, None), strict=True))
            elif name != "repeats":
                line[name] = value
        lines.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else ["model", "task", "metric"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for model, tasks in found.items():
        for task, metrics in tasks.items():
            for metric, values in metrics.items():
                yield model, task, metric, values


def as_markdown(results: Results, id: str) -> str:
    """Both tables and the notes."""
    columns, rows = matrix(results)
    head = ["model", *(f"{task}<br>{metric}" for task, metric in map(_escaped_pair, columns))]
    body = [[_escaped(model), *(_matrix_cell(cell) for cell in cells)] for model, cells in rows]
    lines = texts(results)
    names = _shown_columns(lines)
    details = [[_escaped(getattr(line, name)) for name in names] for line in lines]
    notes = "\n".join(f"- {_escaped(note)}" for note in (*results.notes, *results.forced))
    return "\n".join(
        [
            f"# Evaluation {id}",
            "",
            *_markdown_table(head, body, 1),
            "",
            *_markdown_table([HEADERS[name] for name in names], details, len(NAMES)),
            "",
            notes,
            "",
        ]
    )


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], num_names: int) -> list[str]:
    """num_names: columns of words, the others are numbers"""
    rule = [":--" if number < num_names else "--:" for number in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _escaped_pair(pair: tuple[str, str]) -> tuple[str, str]:
    return _escaped(pair[0]), _escaped(pair[1])


def _matrix_cell(cell: Texts | None) -> str:
    if cell is None or not cell.score:
        return "–"
    delta = f" ({cell.delta})" if cell.delta else ""
    return f"**{cell.score}**{delta}" if cell.verdict == "better" else f"{cell.score}{delta}"


def as_html(results: Results, id: str) -> str:
    """A page of its own; it links to gallery.html beside it."""
    import jinja2

    columns, rows = matrix(results)
    lines = texts(results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        id=id,
        base=results.base,
        columns=columns,
        rows=rows,
        lines=lines,
        names=_shown_columns(lines),
        headers=HEADERS,
        words=NAMES,
        notes=[*results.notes, *results.forced],
    )
