"""The run table: which columns, in which order, in which form."""

from __future__ import annotations

import csv
import io
import math

import pytest
from report_cases import made_up, sweep
from rich.console import Console

from vlmsft.errors import UserError
from vlmsft.report.runs import read_run
from vlmsft.report.table import as_csv, as_markdown, as_rich, config_columns, run_table


def order(runs, sort):
    return [row["run"].partition("/")[2] for row in run_table(runs, sort).rows]


def test_only_what_differs_of_a_real_sweep(tmp_path):
    """Their folders, ids and all that is made of them differ as well."""
    runs = [read_run(folder) for folder in sweep(tmp_path)]
    assert config_columns(runs) == ["optim.max_lr", "strategy.tensor_model_parallel_size"]
    assert config_columns(runs[:2]) == ["strategy.tensor_model_parallel_size"]
    assert config_columns(runs[:1]) == config_columns([]) == []


def test_a_key_that_another_interpolates_comes_once():
    runs = [
        made_up("a", {"seed": 1, "data.seed": 1, "x.seed": 5}),
        made_up("b", {"seed": 2, "data.seed": 2, "x.seed": 6}),
    ]
    assert config_columns(runs) == ["seed", "x.seed"]
    titles = [column.title for column in run_table(runs).columns]
    assert titles == ["run", "state", "seed", "x.seed"], "as many parts as tell them apart"


def test_a_key_that_a_run_lacks_differs_from_null():
    runs = [made_up("a", {"peft": None, "lr": 1}), made_up("b", {"peft.dim": 8, "lr": 1})]
    assert as_csv(run_table(runs)).splitlines() == ["run,state,peft,peft.dim", "demo/a,done,null,", "demo/b,done,,8"]


def test_metrics_that_no_run_has_get_no_column():
    runs = [made_up("a", final_val_loss=1.0, mfu=None), made_up("b", final_val_loss=None, **{"heron/judge": 0.5})]
    assert as_csv(run_table(runs)) == "run,state,final_val_loss,heron/judge\ndemo/a,done,1,\ndemo/b,done,,0.5\n"


def test_sorting():
    runs = [
        made_up("a", {"lr": 1e-3, "peft": "lora"}, mfu=0.25),
        made_up("b", {"lr": 1e-5, "peft": "none"}, mfu=math.nan),
        made_up("c", {"lr": 1e-4, "peft": "lora"}, mfu=0.5),
        made_up("d", {"lr": "auto", "peft": "lora"}),
    ]
    assert order(runs, None) == ["a", "b", "c", "d"]
    assert order(runs, "mfu") == ["a", "c", "b", "d"]
    assert order(runs, "-mfu") == ["c", "a", "b", "d"], "NaN and missing last either way"
    assert order(runs, "MFU") == ["a", "c", "b", "d"]
    assert order(runs, "lr") == ["b", "c", "a", "d"], "by value, words after numbers"
    assert order(runs, "-peft") == ["b", "a", "c", "d"], "equal ones as they were"
    with pytest.raises(UserError, match=r"sort: found 'mfuu', expected a column: run, .*Did you mean 'mfu'"):
        run_table(runs, "mfuu")


def test_csv_reads_back(tmp_path):
    runs = [read_run(folder) for folder in sweep(tmp_path)]
    rows = list(csv.DictReader(io.StringIO(as_csv(run_table(runs, "-optim.max_lr")))))
    assert [row["optim.max_lr"] for row in rows] == ["0.003", "0.003", "0.001", "0.001"]
    assert [float(row["final_val_loss"]) for row in rows] == [
        run.metrics["final_val_loss"] for run in (*runs[2:], *runs[:2])
    ]
    assert {row["step"] for row in rows} == {"20"}


def test_markdown():
    runs = [
        made_up("a", {"note": "x|y"}, final_val_loss=0.123456),
        made_up("b", {"note": "z"}, final_val_loss=math.nan),
    ]
    runs += [made_up("c", {"note": "z"}, final_val_loss=2.0)]
    assert as_markdown(run_table(runs)).splitlines() == [
        "| run | state | note | val loss |",
        "| --- | --- | --- | ---: |",
        "| demo/a | done | x\\|y | **0.1235** |",
        "| demo/b | done | z | nan |",
        "| demo/c | done | z | 2 |",
    ]


@pytest.mark.parametrize(("width", "is_tall"), [(120, False), (40, True)])
def test_a_narrow_terminal_gets_a_column_for_each_run(width, is_tall):
    runs = [made_up(i, {"optim.max_lr": float(i)}, final_val_loss=1.5, mfu=0.25, gpu_hours=2.0) for i in "12"]
    page = io.StringIO()
    console = Console(file=page, width=width, force_terminal=True, no_color=True)
    console.print(as_rich(run_table(runs), console))
    first = next(line for line in page.getvalue().splitlines() if line.strip())
    assert ("demo/1" in first and "demo/2" in first) == is_tall
    assert "…" not in page.getvalue()


def test_the_best_is_marked_the_way_its_metric_goes():
    runs = [made_up("a", final_val_loss=1.0, mfu=0.25, step=5), made_up("b", final_val_loss=2.0, mfu=0.5, step=6)]
    lines = as_markdown(run_table(runs)).splitlines()
    assert lines[2:] == ["| demo/a | done | **1** | 5 | 0.25 |", "| demo/b | done | 2 | 6 | **0.5** |"]
