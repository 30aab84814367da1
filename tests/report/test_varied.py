from dataclasses import replace

from page_cases import EVIL, grid

from vlmsft.report.differences import differing_keys, short_names
from vlmsft.report.record import RunRecord
from vlmsft.report.varied import labels, swept_keys


def test_keys_that_change_together_have_one_axis(tmp_path):
    runs = [
        replace(run, config={**run.config, "twice": 2 * run.config["optim.max_lr"], "list": [run.id], "none": None})
        for run in grid(tmp_path)[:3]
    ]
    assert swept_keys(runs) == ["optim.max_lr", "strategy.tensor_model_parallel_size"]


def test_labels_say_what_varies(tmp_path):
    runs = grid(tmp_path)
    assert labels(runs)[:2] == [
        "max_lr=1e-05 tensor_model_parallel_size=1 note=plain",
        "max_lr=1e-05 tensor_model_parallel_size=2 note=plain",
    ]
    assert labels(runs[:1]) == ["0"]
    twins = [replace(runs[0], id="a"), replace(runs[0], id="b")]
    assert labels(twins) == ["a", "b"]
    assert labels([replace(runs[0], name="x"), replace(runs[0], name="y")]) == ["x/0", "y/0"]


def test_paths_with_the_id_do_not_differ(tmp_path):
    runs = grid(tmp_path)
    assert "run_dir" not in differing_keys(runs)
    assert EVIL in labels(runs)[3]


def test_short_names():
    assert short_names(["a.lr", "b.lr", "c.size"]) == {"a.lr": "a.lr", "b.lr": "b.lr", "c.size": "size"}


def test_paths_below_a_run_folder_tell_runs_of_other_names_apart_by_nothing():
    runs = [
        RunRecord(name, id, f"/r/{name}/{id}", "done", config, {}, curves=lambda: None)
        for name, id in (("demo", "a"), ("longer", "b"))
        for config in [{"run_dir": f"/r/{name}/{id}", "log": f"/r/{name}/{id}/log", "also": f"./{name}/{id}.csv"}]
    ]
    assert differing_keys(runs) == []
