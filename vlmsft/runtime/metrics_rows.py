"""metrics.csv read by those who don't write it, also while it is written. Imports neither torch nor NeMo."""

from __future__ import annotations

import csv
from pathlib import Path

FAILURE_FILE = "failure.json"
"""What the first worker that failed has to say, in the run folder."""
ENDED_FILE = "finished.json"
"""Beside metrics.csv when the training has come to its end, rather than to an interrupt or an error."""


def read_metrics(path: Path) -> tuple[list[dict[str, float]], list[str]]:
    """The rows (see vlmsft.report.summary.Rows), and what was wrong; a row whose end is missing is left out."""
    try:
        text = path.read_bytes().decode("utf-8", "replace").replace("\0", "")  # Python 3.10's csv stops at one
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{path.name}: can't be read ({error})"]
    whole, newline, rest = text.rpartition("\n")
    notes = [f"{path.name}: the last row is cut off, and left out"] if rest else []
    lines = csv.reader((whole + newline).splitlines())
    columns = next(lines, [])
    if columns and "step" not in columns:
        return [], [*notes, f"{path.name}: has no column step"]
    rows, wrong = [], []
    for number, cells in enumerate(lines, start=2):
        try:
            row = {name: float(cell) for name, cell in zip(columns, cells, strict=True) if cell != ""}
        except ValueError:
            wrong.append(number)
            continue
        rows.append(row)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        notes.append(f"{path.name}: line {wrong[0]}{more} can't be understood, and is left out")
    return rows, notes
