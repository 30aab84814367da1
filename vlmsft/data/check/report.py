"""The report of a scan: a page of text, and a page of HTML that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmsft.data.check.findings import KINDS, LOST, REFUSED
from vlmsft.data.check.parts import Extreme, Settings
from vlmsft.data.check.pictures import thumbnail
from vlmsft.data.check.scan import Scan
from vlmsft.data.check.statistics import SIZE_STEP, Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("report.html.j2")
INK, BAR, MARK = "#8a8a90", "#4c8dd6", "#d6604c"
"""Readable on white and on black."""
SHARE = 0.999
"""Of the samples that the shorter proposed length holds whole."""


def verdict(scan: Scan) -> str:
    """One sentence."""
    outcomes = {REFUSED: 0, LOST: 0}
    for kind, count in scan.counts.items():
        if KINDS[kind].outcome in outcomes:
            outcomes[KINDS[kind].outcome] += count
    said = [f"{count:,} would be {outcome}" for outcome, count in outcomes.items() if count]
    if not scan.is_complete:
        said = said or ["nothing wrong so far"]
        return f"Interrupted: {' and '.join(said)} of what was read"
    return f"{' and '.join(said)} in training" if said else "Training would take all of it as it is"


def facts(scan: Scan, settings: Settings) -> Iterator[tuple[str, str]]:
    """(name, value) of what the report opens with."""
    statistics = scan.statistics
    for one in scan.sets:
        place = getattr(one, "path", None) or getattr(one, "folder", "")
        yield one.split, place
    for name, (done, total) in scan.read.items():
        yield f"{name} read", f"{total:,}" if done == total else f"{done:,} of {total:,}"
    splits = ", ".join(f"{count:,} {split}" for split, count in scan.splits.items())
    yield "samples", f"{splits}; {int(statistics.images_per_sample.counts[:1].sum()):,} of them without an image"
    lengths = statistics.token_lengths
    if len(lengths):
        quantiles = ", ".join(f"{name} {lengths.quantile(share):,}" for name, share in QUANTILES)
        yield "text tokens", f"mean {lengths.mean:,.0f}, {quantiles}, longest {lengths.max:,}"
        yield "learnt tokens", f"{_total(statistics.answer_lengths):,}, {statistics.answer_lengths.mean:,.0f} a sample"
        limit = settings.decoder_seq_length
        over = lengths.above(limit)
        yield "decoder_seq_length", f"{limit:,}, which {over:,} samples exceed"
        whole, most = statistics.proposed_length(1.0), statistics.proposed_length(SHARE)
        yield "proposed", f"{whole:,} holds every sample whole, {most:,} holds {SHARE:.1%} of them"
    if statistics.num_images:
        formats = ", ".join(f"{count:,} {name}" for name, count in statistics.image_formats.most_common(5))
        yield "images", f"{statistics.num_images:,} looked at ({settings.images}): {formats}"
        tiles = ", ".join(f"{count:,} of {n}" for n, count in enumerate(statistics.tiles.counts.tolist()) if count)
        yield "tiles", f"{tiles}; mean {statistics.tiles.mean:.2f}"


QUANTILES = (("median", 0.5), ("99 %", 0.99), ("99.9 %", 0.999))


def _total(histogram: Histogram) -> int:
    return round(histogram.mean * len(histogram))


def rows(scan: Scan) -> list[dict[str, Any]]:
    """What was found, a row for each kind."""
    return [
        {
            "title": kind.title,
            "count": f"{scan.counts[name]:,}",
            "outcome": kind.outcome,
            "first": f"{scan.examples[name][0].where}: {scan.examples[name][0].text}",
        }
        for name, kind in KINDS.items()
        if scan.counts[name]
    ]


def text(scan: Scan, settings: Settings) -> str:
    """A page for the console."""
    known = list(facts(scan, settings))
    width = max(len(name) for name, _ in known)
    lines = [f"{name:{width}}  {value}" for name, value in known]
    if scan.counts:
        lines.append("")
    for row in rows(scan):
        lines.append(f"{row['count']:>9}  {row['outcome']:8} {row['title']}")
        lines.append(f"{'':20}{_cut(row['first'])}")
    return "\n".join([*lines, "", verdict(scan)])


def _cut(line: str, most: int = 180) -> str:
    """Without its middle where it is too long: a path stands at the start, what is wrong at the end."""
    half = (most - 3) // 2
    return line if len(line) <= most else f"{line[:half]}...{line[-half:]}"


def html(scan: Scan, settings: Settings, subtitle: str, findings_name: str) -> str:
    """The whole report. findings_name: of the file with all findings"""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    verdict_class = "good" if scan.is_clean and scan.is_complete else "refused"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title="Data check",
        subtitle=subtitle,
        verdict=verdict(scan),
        verdict_class=verdict_class,
        facts=list(facts(scan, settings)),
        rows=rows(scan),
        findings_name=findings_name,
        plots=list(plots(scan, settings)),
        groups=list(_groups(scan)),
    )


def _groups(scan: Scan) -> Iterator[dict[str, Any]]:
    """The worst samples of each kind, and those of unusual size, with their pictures."""
    for name, kind in KINDS.items():
        if name in scan.examples:
            yield {"title": kind.title[0].upper() + kind.title[1:], "cards": list(map(_card, scan.examples[name]))}
    extremes = (("Longest texts", scan.longest), ("Largest images", scan.largest), ("Smallest images", scan.smallest))
    for title, found in extremes:
        if found:
            yield {"title": title, "cards": list(map(_card, found))}


def _card(one: Any | Extreme) -> dict[str, str | None]:
    image = thumbnail(one.image) if isinstance(one.image, str) else one.image
    picture = base64.b64encode(image).decode() if image else None
    return {"where": one.where, "text": _cut(one.text, 300), "picture": picture}


# --- plots ------------------------------------------------------------------------------------------------------------


def plots(scan: Scan, settings: Settings) -> Iterator[str]:
    """SVG texts. Lines and bars are of middle grey and blue; the page colours the words."""
    statistics = scan.statistics
    if len(statistics.token_lengths):
        limits = {"decoder_seq_length": settings.decoder_seq_length, "99.9 %": statistics.token_lengths.quantile(SHARE)}
        yield _plot(lambda axes: _draw_lengths(axes, statistics.token_lengths, limits))
        yield _plot(lambda axes: _draw_counts(axes, statistics.images_per_sample, "images of a sample", "samples"))
        yield _plot(lambda axes: _draw_counts(axes, statistics.turns, "turns of a sample", "samples"))
    if statistics.num_images:
        yield _plot(lambda axes: _draw_sizes(axes, statistics.sizes.items()))
        shapes = {f"{rows} x {columns}": n for (rows, columns), n in sorted(statistics.canvases.items())}
        yield _plot(
            lambda axes: _draw_bars(axes, list(shapes), list(shapes.values()), "rows x columns of tiles", "images")
        )


def _plot(draw: Any) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "vlmsft", "font.size": 11}
    for name in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"):
        settings[name] = INK
    with rc_context(settings):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.patch.set_alpha(0)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _draw_lengths(axes: Axes, lengths: Histogram, limits: dict[str, int]) -> None:
    import numpy as np

    largest = max(lengths.max, 1)
    edges = np.linspace(0, largest + 1, min(80, largest + 2))
    heights, _ = np.histogram(np.arange(len(lengths.counts)), bins=edges, weights=lengths.counts)
    axes.bar(edges[:-1], heights, width=np.diff(edges), align="edge", color=BAR)
    for name, value in limits.items():
        if value <= 1.2 * largest:
            axes.axvline(value, color=MARK, linewidth=1)
            axes.annotate(f"{name} {value:,}", (value, 0.97), xycoords=("data", "axes fraction"), rotation=90, va="top")
    axes.set_xlabel("text tokens of a sample, template included")
    axes.set_ylabel("samples")
    axes.set_yscale("symlog")


def _draw_counts(axes: Axes, counts: Histogram, x: str, y: str) -> None:
    last = min(counts.max, 20)
    values = [int(counts.counts[n]) for n in range(last + 1)]
    names = [str(n) for n in range(last + 1)]
    if counts.max > last:
        names[-1], values[-1] = f"{last}+", values[-1] + counts.above(last)
    _draw_bars(axes, names, values, x, y)


def _draw_bars(axes: Axes, names: list[str], values: list[int], x: str, y: str) -> None:
    axes.bar(names, values, color=BAR)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _draw_sizes(axes: Axes, sizes: Iterable[tuple[tuple[int, int], int]]) -> None:
    found = list(sizes)
    most = max(count for _, count in found)
    axes.scatter(
        [(width + 0.5) * SIZE_STEP for (width, _), _ in found],
        [(height + 0.5) * SIZE_STEP for (_, height), _ in found],
        s=[4 + 60 * (count / most) ** 0.5 for _, count in found],
        color=BAR,
        alpha=0.6,
        linewidth=0,
    )
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels")
