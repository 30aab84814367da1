"""The plots of a report as Plotly figures; vlmsft.report.html puts them on a page, vlmsft.report.plots into PNG files.

They are mappings with "data" and "layout", as Plotly's JSON has them: go.Figure checks each value, which takes 10 ms
for a figure, and a page may hold hundreds.

They have no colours of their own but those of the runs, which are readable on white and on black: what a figure lies on
comes from TEMPLATES.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from plotly.colors import sample_colorscale

from vlmsft.report.curves import AXES, Curve
from vlmsft.report.differences import short_names, show
from vlmsft.report.record import METRICS, RunRecord, metric

Figure = dict[str, Any]

RUN_COLORS = (
    "#3b82d6",
    "#e0702c",
    "#2c9e6b",
    "#c8508f",
    "#8b6fd6",
    "#a8862a",
    "#2a9db5",
    "#d4504c",
    "#7f8c8d",
    "#6f9e2c",
)
RANK_SCALE = ("#3b82d6", "#8f7fc9", "#e0602c")
"""Best to worst, where there are more runs than RUN_COLORS."""
HEAT_SCALE = ("#1f5fae", "#646b7d", "#b8501a")
"""Dark enough for white numbers."""
DASHES = ("solid", "dash", "dot")
"""In turn, where each run has a colour of its own: a run that does the same as another shows through it."""
MOST_LEGEND_RUNS = 12
SPARSE = 25
"""Points up to which each has a mark."""
MOST_CELLS = 20
"""Different values of a key on an axis of a heat map."""
MOST_NUMBERS = 10
"""Columns of a heat map up to which there is room for a number in each cell."""
QUALITIES = ("best_val_loss", "final_val_loss", "best_train_loss", "final_train_loss")
THROUGHPUTS = ("samples_per_second", "tokens_per_second", "tflops_per_second_per_gpu", "mfu")


def _template(ink: str, faint: str, line: str, paper: str) -> dict[str, Any]:
    axis = {
        "gridcolor": line,
        "linecolor": line,
        "zerolinecolor": line,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    layout = {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"bgcolor": paper, "bordercolor": line, "font": {"color": ink}, "namelength": -1},
        "legend": {"font": {"color": ink}},
        "colorway": list(RUN_COLORS),
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": faint, "activecolor": ink},
    }
    parallel = [{"labelfont": {"color": ink}, "tickfont": {"color": ink}, "rangefont": {"color": faint}}]
    return {"layout": layout, "data": {"parcoords": parallel}}


TEMPLATES = {
    "light": _template("#1c1c1e", "#6b6b70", "#d8d8dc", "#ffffff"),
    "dark": _template("#e8e8ea", "#9a9aa0", "#3a3a3e", "#161618"),
}


def run_colors(runs: Sequence[RunRecord]) -> list[str]:
    """A colour for each run: its own where there are few, else by rank of the first of QUALITIES that is known."""
    if len(runs) <= len(RUN_COLORS):
        return list(RUN_COLORS[: len(runs)])
    name = ranked_by(runs)
    values = [known(run.metrics.get(name)) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: math.inf if values[i] is None else values[i])  # type: ignore[arg-type]
    places = [0.0] * len(runs)
    for rank, index in enumerate(order):
        places[index] = rank / (len(runs) - 1)
    return [str(color) for color in sample_colorscale(list(RANK_SCALE), places)]


def run_dashes(num_runs: int) -> list[str]:
    return [DASHES[index % len(DASHES)] if num_runs <= len(RUN_COLORS) else DASHES[0] for index in range(num_runs)]


def ranked_by(runs: Sequence[RunRecord]) -> str:
    return next((name for name in QUALITIES if _any_known(runs, name)), QUALITIES[0])


def known(value: float | None) -> float | None:
    """None for what was not measured, and for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def _any_known(runs: Sequence[RunRecord], name: str) -> bool:
    return any(known(run.metrics.get(name)) is not None for run in runs)


def metrics_of(runs: Sequence[RunRecord]) -> list[str]:
    """METRICS' names that a run has a number of, then evaluation scores."""
    scores = dict.fromkeys(name for run in runs for name in run.metrics if name not in METRICS)
    return [name for name in (*METRICS, *scores) if _any_known(runs, name)]


def qualities_of(runs: Sequence[RunRecord]) -> list[str]:
    """Evaluation scores first: they are what a run is for."""
    there = metrics_of(runs)
    return [*(name for name in there if name not in METRICS), *(name for name in QUALITIES if name in there)]


def throughputs_of(runs: Sequence[RunRecord]) -> list[str]:
    return [name for name in THROUGHPUTS if _any_known(runs, name)]


# --- curves -----------------------------------------------------------------------------------------------------------


def curve_figure(curve: Curve, num_runs: int, lines: Sequence[Mapping[str, Any]] = (), axis: str = "step") -> Figure:
    """lines: {"x", "y", "name", "color", "dash"} of each run; a page adds its own"""
    layout = {
        "title": {"text": curve.title, "font": {"size": 15}, "x": 0.02},
        "xaxis": {"title": {"text": AXES[axis]}},
        "yaxis": {"type": "log" if curve.is_loss and _spans_decades(lines) else "linear"},
        "showlegend": 1 < num_runs <= MOST_LEGEND_RUNS,
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "font": {"size": 11}},
        "margin": {"l": 50, "r": 12, "t": 40, "b": 40},
        "hovermode": "closest",
    }
    return {"data": [_curve_trace(line) for line in lines], "layout": layout}


def _curve_trace(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": line["x"],
        "y": line["y"],
        "name": plain(line["name"]),
        "mode": "lines+markers" if len(line["x"]) <= SPARSE else "lines",
        "line": {"color": line["color"], "dash": line["dash"], "width": 1.6},
        "marker": {"size": 5},
    }


def _spans_decades(lines: Sequence[Mapping[str, Any]]) -> bool:
    values = [value for line in lines for value in line["y"] if value is not None and math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 100


# --- swept keys -------------------------------------------------------------------------------------------------------


def parallel_figure(runs: Sequence[RunRecord], keys: Sequence[str], name: str) -> Figure | None:
    """Parallel coordinates: an axis for each key, the metric's at the end. None where no run has the metric."""
    chosen = [run for run in runs if known(run.metrics.get(name)) is not None]
    if not chosen or not keys:
        return None
    values = [run.metrics[name] for run in chosen]
    names = short_names(keys)
    dimensions = [_dimension(names[key], [run.config.get(key) for run in chosen]) for key in keys]
    dimensions.append({"label": plain(metric(name).title), "values": values})
    line = {
        "color": values,
        "colorscale": _best_first(name, RANK_SCALE),
        "showscale": True,
        "colorbar": {"thickness": 10},
    }
    angle = -12 if len(keys) > 4 else 0
    trace = {"type": "parcoords", "dimensions": dimensions, "line": line, "labelangle": angle}
    return {"data": [trace], "layout": {"margin": {"l": 60, "r": 40, "t": 70, "b": 24}}}


def _dimension(label: str, values: Sequence[Any]) -> dict[str, Any]:
    """Numbers that span decades on a logarithmic axis, words and switches at equal distances."""
    label = plain(label)
    levels = levels_of(values)
    if not _are_numbers(levels):
        places = [levels.index(value) for value in values]
        return {"label": label, "values": places, "tickvals": list(range(len(levels))), "ticktext": _texts(levels)}
    if min(levels) > 0 and max(levels) / min(levels) >= 20:
        shown = levels if len(levels) <= 8 else levels[:: math.ceil(len(levels) / 8)]
        ticks = [math.log10(level) for level in shown]
        logs = [math.log10(value) for value in values]
        return {"label": f"{label} (log)", "values": logs, "tickvals": ticks, "ticktext": _texts(shown)}
    if len(levels) <= 8:
        return {"label": label, "values": list(values), "tickvals": levels, "ticktext": _texts(levels)}
    return {"label": label, "values": list(values)}


def levels_of(values: Sequence[Any]) -> list[Any]:
    """The different values: numbers by size, then the others as words in order."""
    different = list({show(value): value for value in values}.values())
    return sorted(different, key=lambda value: (not _is_number(value), value if _is_number(value) else show(value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(_is_number(value) for value in values)


def _texts(values: Sequence[Any]) -> list[str]:
    return [plain(show(value)) for value in values]


def heat_keys(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[str]:
    """Keys with few enough values for an axis."""
    return [key for key in keys if len(levels_of([run.config.get(key) for run in runs])) <= MOST_CELLS]


def heat_figure(runs: Sequence[RunRecord], x: str, y: str, name: str) -> Figure | None:
    """The metric over two keys. Runs that agree in both share a cell: it holds their mean, and their number."""
    cells: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        cell = cells.setdefault((show(run.config.get(x)), show(run.config.get(y))), [])
        if (value := known(run.metrics.get(name))) is not None:
            cell.append(value)
    if not any(cells.values()):
        return None
    columns = [show(value) for value in levels_of([run.config.get(x) for run in runs])]
    rows = [show(value) for value in levels_of([run.config.get(y) for run in runs])]
    trace = {
        "type": "heatmap",
        "x": [plain(column) for column in columns],
        "y": [plain(row) for row in rows],
        "z": [[_mean(cells.get((column, row))) for column in columns] for row in rows],
        "text": [[_cell_text(cells.get((column, row))) for column in columns] for row in rows],
        "textfont": {"color": "#ffffff"},
        "hovertemplate": f"{_in_template(x)} = %{{x}}<br>{_in_template(y)} = %{{y}}<br>%{{text}}<extra></extra>",
        "colorscale": _best_first(name, HEAT_SCALE),
        "colorbar": {
            "title": {"text": plain(metric(name).title), "side": "right", "font": {"size": 13}},
            "thickness": 10,
        },
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
    }
    if len(columns) <= MOST_NUMBERS:
        trace["texttemplate"] = "%{text}"
    layout = {
        "xaxis": {"title": {"text": plain(x)}, "type": "category", "showgrid": False},
        "yaxis": {"title": {"text": plain(y)}, "type": "category", "showgrid": False},
        "margin": {"l": 60, "r": 12, "t": 24, "b": 50},
    }
    return {"data": [trace], "layout": layout}


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _cell_text(values: Sequence[float] | None) -> str:
    """Empty where no such run was made; a dash where those that were have no value."""
    if values is None:
        return ""
    mean = _mean(values)
    if mean is None:
        return "-"
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g}<br>mean of {len(values)}"


def _best_first(name: str, scale: Sequence[str]) -> list[list[Any]]:
    """The scale as Plotly wants it, its first colour at the better end."""
    colors = reversed(scale) if metric(name).better == "higher" else scale
    return [[place / (len(scale) - 1), color] for place, color in enumerate(colors)]


# --- quality against throughput ---------------------------------------------------------------------------------------


def pareto_front(points: Sequence[tuple[float, float]], better: tuple[str, str]) -> list[int]:
    """Indices, from the best first coordinate on, of the points that no other beats in one coordinate without losing
    in the other. Equal points are all in it.

    better: "lower" or "higher" of each coordinate
    """
    signs = [1.0 if way == "lower" else -1.0 for way in better]
    scaled = [(signs[0] * first, signs[1] * second) for first, second in points]
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: scaled[i]):
        last = scaled[front[-1]] if front else (math.inf, math.inf)
        if scaled[index][1] < last[1] or scaled[index] == last:
            front.append(index)
    return front


def pareto_figure(
    runs: Sequence[RunRecord], names: Sequence[str], colors: Sequence[str], quality: str, throughput: str
) -> Figure | None:
    """names, colors: of each run. None where no run has both numbers."""
    pairs = [(known(run.metrics.get(throughput)), known(run.metrics.get(quality))) for run in runs]
    chosen = [index for index, pair in enumerate(pairs) if None not in pair]
    if not chosen:
        return None
    points = [(float(x), float(y)) for x, y in (pairs[index] for index in chosen) if x is not None and y is not None]
    front = pareto_front(points, ("higher", metric(quality).better or "lower"))
    ring = {"size": 17, "color": "rgba(0,0,0,0)", "line": {"color": "#8a8a90", "width": 1.5}}
    best = {
        "type": "scatter",
        "name": "Pareto front",
        "x": [points[place][0] for place in front],
        "y": [points[place][1] for place in front],
        "mode": "lines+markers",
        "line": {"color": "#8a8a90", "width": 1.5, "dash": "dot"},
        "marker": ring,
        "hoverinfo": "skip",
    }
    every = {
        "type": "scatter",
        "name": "runs",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "mode": "markers",
        "text": [plain(names[index]) for index in chosen],
        "marker": {"size": 10, "color": [colors[index] for index in chosen]},
        "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": plain(metric(throughput).title)}},
        "yaxis": {"title": {"text": plain(metric(quality).title)}},
        "legend": {"orientation": "h", "y": 1.1},
        "margin": {"l": 60, "r": 12, "t": 24, "b": 50},
        "hovermode": "closest",
    }
    return {"data": [best, every], "layout": layout}


def _in_template(text: str) -> str:
    """A hovertemplate would take %{...} in it for a variable."""
    return plain(text).replace("{", "(").replace("}", ")")


def plain(text: str) -> str:
    """Plotly reads a few HTML tags in its texts: here < and > stand for themselves."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
