"""A comparison of runs as one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from vlmsft.errors import Problem, UserError
from vlmsft.report import figures
from vlmsft.report.curves import AXES, Curve, absent, compact, curves_of
from vlmsft.report.differences import comparable, differing_keys, show
from vlmsft.report.downsample import MOST_POINTS
from vlmsft.report.pictures import Pictures
from vlmsft.report.record import RunRecord, metric
from vlmsft.report.table import Column, best_cells, cell_text, run_table
from vlmsft.report.varied import labels, swept_keys

MOST_KEYS = 6
"""Swept keys that get an axis: more are not to be told apart, and figures of all pairs grow with the square."""
MOST_LETTERS = 2000
"""Of a sample answer."""
SECTIONS = {
    "runs": "Runs",
    "diff": "Differences",
    "curves": "Curves",
    "parallel": "Swept keys",
    "heat": "Two keys",
    "pareto": "Quality and throughput",
    "answers": "Answers",
    "reproduce": "Do it again",
}


def write_report(runs: Sequence[RunRecord], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Writes the page; nothing is overwritten. Raises UserError where `path` exists.

    runs: at least one, in the table's order
    title: None = says how many runs they are
    """
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(Problem("report", f"{path}, which exists", "a new name: nothing is overwritten"))
    text = render(runs, title or f"Comparison of {len(runs)} run{'' if len(runs) == 1 else 's'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, path)


def render(runs: Sequence[RunRecord], title: str) -> str:
    """The page. All that comes from runs is escaped by jinja or travels as JSON, which the page puts in as text."""
    series = [compact(run.curves()) for run in runs]
    curves = curves_of(column for one in series for column in one["curves"])
    keys = swept_keys(runs)
    colors = figures.run_colors(runs)
    chosen = keys[:MOST_KEYS]
    heat_keys = figures.heat_keys(runs, chosen)
    drawn = _figures(runs, chosen, heat_keys, colors)
    answers = _answers(runs)
    data = {
        "runs": _look(runs, colors),
        "axes": AXES,
        "curves": [_curve(curve, len(runs)) for curve in curves],
        "templates": figures.TEMPLATES,
        "most_legend_runs": figures.MOST_LEGEND_RUNS,
        "config": _config(runs),
        "figures": drawn,
        "choosers": _choosers(runs, heat_keys, drawn),
        "answers": answers,
    }
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    # css and js are ours and hold no {{ }}: the autoescape does not touch what is included
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=_subtitle(runs),
        sections=SECTIONS,
        **_table(runs, colors),
        notes=[(run.label, note) for run in runs for note in run.notes],
        many=len(runs) > len(figures.RUN_COLORS),
        ranked_by=metric(figures.ranked_by(runs)).title,
        curves=curves,
        absent=absent(curves),
        most_points=f"{MOST_POINTS:,}",
        keys=chosen,
        left_out_keys=keys[MOST_KEYS:],
        heat_keys=heat_keys,
        most_cells=figures.MOST_CELLS,
        pareto=bool(drawn["pareto"]),
        has_answers=bool(answers["questions"]),
        data=_packed(_json(data)),
        series=_packed(_json(series)),
        plotly=_packed(get_plotlyjs()),
    )


def _subtitle(runs: Sequence[RunRecord]) -> str:
    states = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in runs).items())
    sweeps = sorted({run.sweep_id for run in runs if run.sweep_id})
    sweep = f" of sweep {', '.join(sweeps)}" if 1 <= len(sweeps) <= 3 else ""
    return f"{time.strftime('%Y-%m-%d %H:%M')}; {len(runs)} run{'' if len(runs) == 1 else 's'}{sweep}: {states}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _packed(text: str) -> str:
    """gzip, then base64: curves of 200 runs would be 20 MB as they are, Plotly 5 MB."""
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), compresslevel=6, mtime=0)).decode()


def _look(runs: Sequence[RunRecord], colors: Sequence[str]) -> list[dict[str, str]]:
    """plain: the label as Plotly takes it"""
    names, dashes = labels(runs), figures.run_dashes(len(runs))
    return [
        {"label": name, "plain": figures.plain(name), "color": color, "dash": dash}
        for name, color, dash in zip(names, colors, dashes, strict=True)
    ]


def _curve(curve: Curve, num_runs: int) -> dict[str, Any]:
    layout = figures.curve_figure(curve, num_runs)["layout"]
    # the page has one legend for all
    return {"column": curve.column, "is_loss": curve.is_loss, "layout": {**layout, "showlegend": False}}


# --- table ------------------------------------------------------------------------------------------------------------


def _table(runs: Sequence[RunRecord], colors: Sequence[str]) -> dict[str, Any]:
    table = run_table(runs)
    best = best_cells(table)
    rows = []
    for number, (run, row, color) in enumerate(zip(runs, table.rows, colors, strict=True)):
        cells = [_cell(row, column, (number, column.key) in best) for column in table.columns]
        about = ("label", "command", "working_directory", "commit", "location")
        rows.append({"cells": cells, "color": color, **{name: getattr(run, name) for name in about}})
    return {"columns": table.columns, "rows": rows}


def _cell(row: Mapping[str, Any], column: Column, is_best: bool) -> dict[str, str]:
    value = row.get(column.key, "")
    styles = ["number"] * column.is_metric + ["best"] * is_best
    if column.key == "state":
        styles.append(str(value))
    is_number = isinstance(value, float)
    return {
        "text": cell_text(row, column),
        "value": ("nan" if math.isnan(value) else repr(value)) if is_number else show(value),
        "style": " ".join(styles),
    }


def _config(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """values[key][run]: as text, None where the run has no such key. num_same: keys that are the same in all runs."""
    keys = differing_keys(runs)
    every = {key for run in runs for key in run.config}
    same = [key for key in every - set(keys) if len({comparable(run.config, key) for run in runs}) == 1]
    values = [[show(run.config[key]) if key in run.config else None for run in runs] for key in keys]
    return {"keys": keys, "values": values, "num_same": len(same)}


# --- figures with choices ---------------------------------------------------------------------------------------------


def _figures(
    runs: Sequence[RunRecord], keys: Sequence[str], heat_keys: Sequence[str], colors: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """{"heat": {"<key>|<key>|<metric>": figure}, ...}: one for each combination of choices."""
    names = labels(runs)
    metrics = figures.metrics_of(runs)
    parallel = {name: figures.parallel_figure(runs, keys, name) for name in metrics}
    heat = {
        f"{x}|{y}|{name}": figures.heat_figure(runs, x, y, name)
        for x in heat_keys
        for y in heat_keys
        for name in metrics
        if x != y
    }
    pareto = {
        f"{quality}|{throughput}": figures.pareto_figure(runs, names, colors, quality, throughput)
        for quality in figures.qualities_of(runs)
        for throughput in figures.throughputs_of(runs)
    }
    groups = {"parallel": parallel, "heat": heat, "pareto": pareto}
    return {
        group: {choice: figure for choice, figure in made.items() if figure is not None}
        for group, made in groups.items()
    }


def _choosers(runs: Sequence[RunRecord], heat_keys: Sequence[str], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """For each plot its selects, in the order of the parts of its figures' names."""
    qualities = figures.qualities_of(runs)
    others = [name for name in figures.metrics_of(runs) if name not in qualities]
    metrics = _chooser([*qualities, *others])
    keys = [[key, key] for key in heat_keys]
    made = {
        "parallel": [{"id": "parallel-metric", **metrics}],
        "heat": [
            {"id": "heat-x", "options": keys, "chosen": heat_keys[0]},
            {"id": "heat-y", "options": keys, "chosen": heat_keys[1]},
            {"id": "heat-metric", **metrics},
        ]
        if len(heat_keys) > 1
        else [],
        "pareto": [
            {"id": "pareto-quality", **_chooser(qualities)},
            {"id": "pareto-throughput", **_chooser(figures.throughputs_of(runs))},
        ],
    }
    return {name: selects for name, selects in made.items() if drawn[name]}


def _chooser(names: Sequence[str]) -> dict[str, Any]:
    return {"options": [[name, metric(name).title] for name in names], "chosen": names[0] if names else ""}


# --- answers ----------------------------------------------------------------------------------------------------------


def _answers(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Questions with the answers of each run. Runs of other data may ask other questions: they are told apart by what
    they ask and show, not by their number."""
    pictures = Pictures()
    questions: dict[tuple[Any, ...], dict[str, Any]] = {}
    for index, run in enumerate(runs):
        for answer in run.answers:
            places = [pictures.add(path) for path in answer.pictures]
            key = (answer.number, answer.question, answer.reference, *places)
            shown = {"question": _cut(answer.question), "reference": _cut(answer.reference), "pictures": places}
            question = questions.setdefault(key, {**shown, "answers": {}})
            question["answers"][index] = {"text": _cut(answer.answer), "step": answer.step}
    return {
        "questions": list(questions.values()),
        "pictures": pictures.encoded,
        "num_pictures_left_out": pictures.num_left_out,
        "has": [bool(run.answers) for run in runs],
    }


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}... ({len(text):,} letters)"
