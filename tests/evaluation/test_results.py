"""results.json and the tables that are made of it."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from results_toys import make, manifest

from vlmsft.evaluation import results, tables
from vlmsft.evaluation.statistics import Bootstrap
from vlmsft.evaluation.store import Score

KEYS = {"score", "interval", "delta", "delta_interval", "win", "tie", "loss", "num", "num_missing"}
FEW = Bootstrap(num_resamples=99)


def gathered(store, **more):
    return results.gather(manifest(**more), store, FEW)


def test_every_file_is_written_and_the_table_shown(tmp_path, capsys):
    make(tmp_path)
    found = results.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"results.json", "results.csv", "results.md", "results.html", "gallery.html"} <= names
    assert not any(name.endswith(".partial") for name in names)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    assert list(found) == ["base", "sft", "sft_energon"]
    assert set(found["sft"]["heron"]["rougel"]) >= KEYS
    shown = capsys.readouterr().out
    assert "sft_energon" in shown and "win/tie/loss" in shown


def test_numbers_are_those_of_the_scores(tmp_path):
    store = make(tmp_path)
    found = results.numbers(gathered(store))
    scores = {model: {} for model in found}
    for score in store.scores():
        if (score.task, score.metric) == ("vqa", "rougel") and score.score is not None:
            scores[score.model][score.id] = score.score
    ours = found["sft_energon"]["vqa"]["rougel"]
    both = [(value, scores["base"][id]) for id, value in scores["sft_energon"].items()]
    assert ours["score"] == pytest.approx(np.mean([value for value, _ in both]))
    assert ours["delta"] == pytest.approx(np.mean([value - base for value, base in both]))
    assert (ours["num"], ours["num_missing"], ours["num_compared"]) == (10, 2, 10)
    assert ours["win"] == sum(value > base for value, base in both)
    assert ours["win"] + ours["tie"] + ours["loss"] == 10
    assert ours["delta"] != pytest.approx(ours["score"] - found["base"]["vqa"]["rougel"]["score"]), "of other questions"


def test_of_the_base_nothing_is_compared(tmp_path):
    found = results.numbers(gathered(make(tmp_path), base="sft"))
    assert list(found) == ["sft", "base", "sft_energon"]
    assert found["sft"]["vqa"]["rougel"]["delta"] is None and found["sft"]["vqa"]["rougel"]["win"] is None
    assert found["base"]["vqa"]["rougel"]["delta"] is not None


def test_a_relative_metric_is_its_ratio(tmp_path):
    """Heron's: 3 of 8 points in each category for the base; 3, 4 and 5 for the others."""
    found = results.numbers(gathered(make(tmp_path)))
    assert found["base"]["heron"]["heron-bench"]["score"] == pytest.approx(100 * 3 / 8)
    assert found["sft"]["heron"]["heron-bench"]["score"] == pytest.approx(100 * (3 + 4 + 5) / 3 / 8)


def test_what_nobody_scored_is_missing(tmp_path):
    """A folder whose evaluation was killed before all was asked."""
    store = make(tmp_path)
    store.write_scores([score for score in store.scores() if not score.id.endswith(("-4", "-5"))])
    found = results.numbers(gathered(store))["base"]["vqa"]["rougel"]
    assert (found["num"], found["num_missing"]) == (10, 2)


def test_repeats_have_a_spread(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert results.numbers(gathered(make(once)))["base"]["vqa"]["rougel"]["spread"] is None
    store = make(twice, repeats=2)
    found = results.numbers(gathered(store, repeats=2))["base"]["vqa"]["rougel"]
    assert len(found["repeats"]) == 2 and found["spread"] == pytest.approx(np.std(found["repeats"], ddof=1))
    assert found["num"] == 12
    header = tables.as_markdown(gathered(store, repeats=2), "id")
    assert "± repeats" in header and "± repeats" not in tables.as_markdown(gathered(make(once / "again")), "id")


def test_the_csv_has_all_digits(tmp_path):
    found = results.numbers(gathered(make(tmp_path)))
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert len(rows) == 9
    row = next(row for row in rows if (row["model"], row["task"], row["metric"]) == ("sft", "vqa", "rougel"))
    assert float(row["delta_low"]) == found["sft"]["vqa"]["rougel"]["delta_interval"][0]
    assert float(row["score"]) == found["sft"]["vqa"]["rougel"]["score"]
    assert next(row for row in rows if row["model"] == "base")["delta"] == ""


def test_the_tutorials_table(tmp_path):
    columns, rows = tables.matrix(gathered(make(tmp_path)))
    assert columns == [("heron", "rougel"), ("heron", "heron-bench"), ("vqa", "rougel")]
    assert [model for model, _ in rows] == ["base", "sft", "sft_energon"]
    cell = rows[1][1][1]
    assert cell is not None and (cell.score, cell.delta, cell.verdict) == ("50.0", "+12.5", "better")


def test_points_get_two_decimals_and_percentages_one(tmp_path):
    store = make(tmp_path)
    store.write_scores(
        [*store.scores(), *(Score("base", "vqa", f"vqa-{n}", 0, "judge", 3 + n / 12) for n in range(12))]
    )
    cells = {(line.model, line.metric): line for line in tables.texts(gathered(store))}
    assert cells["base", "judge"].score == "3.46" and "." in cells["base", "rougel"].score[-2]


def test_a_difference_counts_where_its_interval_leaves_out_zero(tmp_path):
    lines = tables.texts(gathered(make(tmp_path, num=40)))
    for line in lines:
        low, _, high = line.delta_interval.replace("−", "-").partition(" to ")
        expected = "" if not low else "better" if float(low) > 0 else "worse" if float(high) < 0 else ""
        assert line.verdict == expected
    assert {line.verdict for line in lines} == {"", "better"}


def test_names_are_no_markup(tmp_path):
    name = "a|b <script>alert(1)</script>"
    given = {"models": ("base", name), "tasks": ("vqa",)}
    found = results.gather(manifest(**given), make(tmp_path, **given), FEW)
    markdown, html = tables.as_markdown(found, "id"), tables.as_html(found, "id")
    assert "a\\|b &lt;script>" in markdown and "<script" not in markdown
    assert "<script" not in html and "&lt;script&gt;" in html


def test_what_was_forced_and_what_is_off_is_said(tmp_path, capsys):
    given = manifest()
    other = {**given["models"]["sft"], "engine": "transformers serve", "engine_version": "4.57.6"}
    given["models"] = {**given["models"], "sft": other}
    found = results.gather(given, make(tmp_path), FEW)
    assert len(found.forced) == 1 and "engine: transformers serve / vlmsft builtin" in found.forced[0]
    assert any(note.startswith("Warning: sft:") for note in found.notes)
    for text in (tables.as_markdown(found, "id"), tables.as_html(found, "id")):
        assert "although they differ" in text
    tables.show(found)
    assert "although they differ" in capsys.readouterr().out


def test_manifest_facts_are_under_the_table(tmp_path):
    text = tables.as_markdown(results.gather(manifest(limit=12), make(tmp_path), FEW), "id")
    for part in ("max_new_tokens 1024", "asked once", "the first 12 questions", "Judge: gpt-4o", "99 draws, seed 0"):
        assert part in text
