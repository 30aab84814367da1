"""The table of an evaluation, made of its folder alone: models, tasks, metrics, differences to the base.

results.json   {model: {task: {metric: {...}}}}, see `numbers`
results.csv    a line for each of them, all digits
results.md, results.html   scores as the tutorial's table has them, and a line for each with its intervals
gallery.html   every answer (vlmsft.evaluation.gallery)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmsft.evaluation import manifest as manifests
from vlmsft.evaluation import tables
from vlmsft.evaluation.engines import numerics_warnings
from vlmsft.evaluation.statistics import Bootstrap, Difference, Summary, Value, compare, summarize
from vlmsft.evaluation.store import Score, Store

BOOTSTRAP = Bootstrap(num_resamples=9999, seed=0, confidence=0.95)


@dataclass(frozen=True)
class Row:
    """A model's score. difference: to the base; None for the base itself"""

    model: str
    task: str
    metric: str
    summary: Summary
    difference: Difference | None


@dataclass(frozen=True)
class Results:
    """rows: by task, metric, then model, the base first
    notes: what a reader must know of them
    forced: what differs between models that force=true compares all the same
    """

    base: str
    models: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    forced: tuple[str, ...]


def write(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes results.* and gallery.html into an evaluation's folder, in place of those of before, and prints the table.

    Gives what results.json holds.
    """
    from vlmsft.evaluation import gallery

    store = Store(folder)
    manifest = json.loads((store.folder / "manifest.json").read_text(encoding="utf-8"))
    results = gather(manifest, store)
    found = numbers(results)
    contents = {
        "results.json": json.dumps(found, indent=2, ensure_ascii=False) + "\n",
        "results.csv": tables.as_csv(found),
        "results.md": tables.as_markdown(results, manifest["id"]),
        "results.html": tables.as_html(results, manifest["id"]),
        "gallery.html": gallery.html(manifest, store),
    }
    for name, content in contents.items():
        _replace(store.folder / name, content)
    tables.show(results)
    return found


def _replace(path: Path, content: str) -> None:
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(content, encoding="utf-8", errors="backslashreplace", newline="")
    os.replace(aside, path)


# --- the numbers ------------------------------------------------------------------------------------------------------


def gather(manifest: Mapping[str, Any], store: Store, bootstrap: Bootstrap = BOOTSTRAP) -> Results:
    """All that the store has scores of. A question without a score counts as missing, also where nothing says why."""
    base = manifest["base"]
    models = (base, *(name for name in manifest["models"] if name != base))
    scores: dict[tuple[str, str], dict[str, list[Score]]] = {}
    for score in store.scores():
        scores.setdefault((score.task, score.metric), {}).setdefault(score.model, []).append(score)
    expected = {
        task: [(sample.id, repeat) for repeat in range(manifest["repeats"]) for sample in store.samples(task)]
        for task in manifest["tasks"]
    }
    rows: list[Row] = []
    for task in manifest["tasks"]:
        for (of_task, metric), by_model in scores.items():
            if of_task == task:
                values = {model: _values(by_model[model], expected[task]) for model in models if model in by_model}
                rows += _rows(task, metric, values, base, bootstrap)
    return Results(base, models, tuple(rows), tuple(_notes(manifest, base, bootstrap)), tuple(_forced(manifest, base)))


def _values(scores: Iterable[Score], expected: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Value]:
    values = {place: Value(None) for place in expected}
    return values | {(each.id, each.repeat): Value(each.score, each.out_of, each.group) for each in scores}


def _rows(
    task: str, metric: str, values: Mapping[str, Mapping[tuple[str, int], Value]], base: str, bootstrap: Bootstrap
) -> Iterator[Row]:
    for model, own in values.items():
        is_compared = model != base and base in values
        difference = compare(own, values[base], bootstrap) if is_compared else None
        yield Row(model, task, metric, summarize(own, bootstrap), difference)


def numbers(results: Results) -> dict[str, Any]:
    """{model: {task: {metric: {"score", "interval", "delta", "delta_interval", "win", "tie", "loss", "num_compared",
    "num", "num_missing", "spread", "repeats"}}}}, null where there is none: of the base nothing is compared."""
    found: dict[str, Any] = {model: {} for model in results.models}
    for row in results.rows:
        difference = asdict(row.difference) if row.difference else dict.fromkeys(Difference.__dataclass_fields__)
        found[row.model].setdefault(row.task, {})[row.metric] = {
            **asdict(row.summary),
            "delta": difference["delta"],
            "delta_interval": difference["interval"],
            **{name: difference[name] for name in ("win", "tie", "loss")},
            "num_compared": difference["num"],
        }
    return found


def _notes(manifest: Mapping[str, Any], base: str, bootstrap: Bootstrap) -> Iterator[str]:
    share = f"{bootstrap.confidence:.0%}".replace("%", " %")
    yield (
        f"Intervals: {share}, bootstrap over questions ({bootstrap.num_resamples:,} draws, seed {bootstrap.seed}), "
        "for differences paired by question; repeats of a question are averaged first"
    )
    yield "Missing: answers without a score (no answer, no verdict of the judge); they are left out, not zero"
    yield f"Δ and win/tie/loss: against {base}, over questions that both have a score for"
    generation = ", ".join(f"{key} {value}" for key, value in manifest["generation"].items() if value != [])
    limit = "" if manifest["limit"] is None else f"; the first {manifest['limit']} questions of each task"
    yield f"Generation: {generation}; each question asked {_times(manifest['repeats'])}{limit}"
    judges = {task["judge"]["model"] for task in manifest["tasks"].values() if task.get("judge")}
    if judges:
        yield f"Judge: {', '.join(sorted(judges))}"
    for name, facts in manifest["models"].items():
        for warning in numerics_warnings(facts["engine"], facts["engine_version"]):
            yield f"Warning: {name}: {warning}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _forced(manifest: Mapping[str, Any], base: str) -> Iterator[str]:
    theirs = manifests.of_model(dict(manifest), base)
    for name in manifest["models"]:
        ours = manifests.of_model(dict(manifest), name)
        found = [line for task in manifest["tasks"] for line in manifests.differences(ours, theirs, task)]
        if found:
            said = "; ".join(dict.fromkeys(found))
            yield f"Warning: {name} and {base} are compared although they differ: {said}"
