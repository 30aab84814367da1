"""The report's plots as PNG files, drawn by Kaleido in a Chromium or Chrome that is installed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmsft.errors import Problem, UserError
from vlmsft.report import figures
from vlmsft.report.curves import curves_of, points
from vlmsft.report.record import RunRecord
from vlmsft.report.varied import labels, swept_keys

SIZE = {"width": 900, "height": 560, "scale": 2}
"""Of a PNG file: CSS pixels, times scale."""
MOST_KEYS = 6
INSTALL = "Install a browser (Debian: apt install chromium) or run `plotly_get_chrome`; BROWSER_PATH may name one"


def write_pngs(runs: Sequence[RunRecord], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes a file for each plot that there are data for, and gives their paths; nothing is overwritten.

    runs: at least one. Raises UserError where a file is in the way, or where Kaleido or a browser is missing
    """
    folder = Path(folder)
    made = dict(all_figures(runs))
    paths = {name: folder / f"{name}.png" for name in made}
    problems = [Problem("plots", f"{path}, which exists", "a new name") for path in paths.values() if path.exists()]
    if problems:
        raise UserError(problems)
    folder.mkdir(parents=True, exist_ok=True)
    _draw([(_on_white(made[name]), path) for name, path in paths.items()])
    return list(paths.values())


def _draw(files: Sequence[tuple[figures.Figure, Path]]) -> None:
    try:
        import kaleido
        from choreographer.errors import BrowserFailedError, ChromeNotFoundError
    except ImportError:
        problem = Problem("plots", "no kaleido", "the package that draws PNG files", 'pip install "vlmsft[plots]"')
        raise UserError(problem) from None
    options = {"format": "png", **SIZE}
    specs = [{"fig": figure, "path": str(path), "opts": options} for figure, path in files]
    for name in ("kaleido", "choreographer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        kaleido.write_fig_from_object_sync(specs, kopts={"mathjax": False})  # MathJax would come from a network
    except ChromeNotFoundError:
        named = f"BROWSER_PATH={os.environ['BROWSER_PATH']}" if "BROWSER_PATH" in os.environ else "no browser"
        raise UserError(Problem("plots", named, "a Chromium or Chrome", INSTALL)) from None
    except BrowserFailedError as error:
        raise UserError(
            Problem("plots", f"a browser that doesn't start ({error})", "a Chromium or Chrome", INSTALL)
        ) from error


def _on_white(figure: figures.Figure) -> dict[str, Any]:
    layout = {**figure["layout"], "template": figures.TEMPLATES["light"], "paper_bgcolor": "#ffffff"}
    return {"data": figure["data"], "layout": layout}


def all_figures(runs: Sequence[RunRecord]) -> Iterator[tuple[str, figures.Figure]]:
    """(file name without suffix, figure): each curve over steps, and the others as the page first shows them."""
    names, colors = labels(runs), figures.run_colors(runs)
    yield from _curves(runs, names, colors)
    keys = swept_keys(runs)[:MOST_KEYS]
    quality = next(iter([*figures.qualities_of(runs), *figures.metrics_of(runs)]), None)
    if quality is None:
        return
    found = {"swept_keys": figures.parallel_figure(runs, keys, quality)}
    axes = figures.heat_keys(runs, keys)[:2]
    if len(axes) == 2:
        found["two_keys"] = figures.heat_figure(runs, axes[0], axes[1], quality)
    if throughputs := figures.throughputs_of(runs):
        found["pareto"] = figures.pareto_figure(runs, names, colors, quality, throughputs[0])
    yield from ((name, figure) for name, figure in found.items() if figure is not None)


def _curves(
    runs: Sequence[RunRecord], names: Sequence[str], colors: Sequence[str]
) -> Iterator[tuple[str, figures.Figure]]:
    frames = [run.curves() for run in runs]
    dashes = figures.run_dashes(len(runs))
    for curve in curves_of(str(column) for frame in frames for column in frame.columns):
        lines = []
        for frame, name, color, dash in zip(frames, names, colors, dashes, strict=True):
            steps, values = points(frame, curve.column)
            if len(steps):
                lines.append({"x": steps.tolist(), "y": values.tolist(), "name": name, "color": color, "dash": dash})
        if lines:
            file_name = re.sub(r"[^\w.-]+", "_", curve.column)
            yield f"curve_{file_name}", figures.curve_figure(curve, len(lines), lines)
