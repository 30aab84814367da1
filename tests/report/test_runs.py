"""Runs read from their folders: whole ones, and ones that something happened to."""

from __future__ import annotations

import json
import math
import os
import shlex
import time

import pytest
from config_cases import compose_command
from omegaconf import OmegaConf
from report_cases import sweep
from score_cases import manifest

from vlmsft.errors import UserError
from vlmsft.report.runs import FRESH_SECONDS, named_folders, read_run, run_folders, sweep_runs
from vlmsft.report.table import NOISE
from vlmsft.runtime.provenance import flatten
from vlmsft.sweeping.ledger import JobRow, Ledger


def test_a_run_of_the_sweep(tmp_path):
    folder = sweep(tmp_path)[3]
    run = read_run(folder)
    assert (run.name, run.id, run.state) == ("lr_tp", folder.name, "done")
    assert run.notes == ()
    assert run.config["optim.max_lr"] == 0.003 and run.config["strategy.tensor_model_parallel_size"] == 2
    rows = run.curves()
    assert list(rows["step"]) == list(range(1, 21))
    assert run.metrics["step"] == 20
    assert run.metrics["max_lr"] == pytest.approx(0.003)
    assert run.metrics["final_train_loss"] == rows["reduced_train_loss"].iloc[-1]
    assert run.metrics["best_train_loss"] == rows["reduced_train_loss"].min()
    assert run.metrics["final_val_loss"] == rows["val_loss"].iloc[-1] < rows["val_loss"].iloc[9]
    assert run.metrics["samples_per_second"] == pytest.approx(rows["samples_per_second"].median())
    assert run.metrics["tokens_per_second"] == pytest.approx(rows["tokens_per_second"].median())
    assert run.metrics["gpu_hours"] is None, "it ran on a CPU"
    assert run.sweep_id == folder.name.rpartition("-")[0]
    assert len(run.commit.split()[0]) == 40
    assert [answer.number for answer in run.answers] == [0, 1, 2, 3] and {answer.step for answer in run.answers} == {20}
    assert run.answers[0].pictures == (str(folder / "answers" / "0-0.jpg"),)


def test_the_command_gives_the_same_config_again(tmp_path):
    for folder in sweep(tmp_path):
        run = read_run(folder)
        words = shlex.split(run.command)
        assert words[:3] == ["python", "-m", "vlmsft.train"]
        again = flatten(OmegaConf.to_container(compose_command("train", words[3:]), resolve=True))
        for key, value in run.config.items():
            if key.startswith(("sweep.", "log.", "resume.", "plan.")) or key in NOISE or "/" in str(value):
                continue
            assert again[key] == value or folder.name in str(value), key


def test_the_command_has_a_run_folder_of_its_own(tmp_path):
    (tmp_path / "overrides.yaml").write_text("- experiment=demo\n- id=3\n- +sweep.id=a\n- 'name=a b'\n")
    assert read_run(tmp_path).command == "python -m vlmsft.train experiment=demo 'name=a b'"


def test_a_gpus_hours_over_two_starts(tmp_path):
    config = "trainer: {accelerator: gpu, devices: 4, num_nodes: 2, max_steps: 9}\n"
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "metrics.csv").write_text("step,elapsed_seconds\n1,100\n2,1800\n3,50\n4,1800\n")
    assert read_run(tmp_path).metrics["gpu_hours"] == 8.0
    (tmp_path / "config.yaml").write_text(config.replace("4", "auto"))
    (tmp_path / "provenance.json").write_text('{"machine": {"gpus": ["a", "b"]}}')
    assert read_run(tmp_path).metrics["gpu_hours"] == 4.0


def test_the_config_of_the_newest_start_that_is_whole(tmp_path):
    folder = sweep(tmp_path)[0]
    config = (folder / "config.yaml").read_text()
    for number, lr in ((2, "0.5"), (10, "0.25")):
        (folder / f"resume-{number}").mkdir()
        (folder / f"resume-{number}" / "config.yaml").write_text(config.replace("max_lr: 0.001", f"max_lr: {lr}"))
        (folder / f"resume-{number}" / "provenance.json").write_text("{}")
    assert read_run(folder).config["optim.max_lr"] == 0.25
    (folder / "resume-10" / "config.yaml").unlink()
    run = read_run(folder)
    assert run.config["optim.max_lr"] == 0.5
    assert "resume-10/config.yaml: missing, the start was cut off" in run.notes


def test_scores_of_evaluations(tmp_path):
    folder = sweep(tmp_path)[0]
    (folder / "evaluation").mkdir()
    for name, age, score in (("b", 10, 0.25), ("a", 0, 0.75)):
        scores = {"heron": {"judge": {"score": score, "num": 3, "num_missing": 0}}}
        tree = {"id": name, "manifest": manifest(["heron"]), "scores": scores}
        path = folder / "evaluation" / f"{name}.json"
        path.write_text(json.dumps(tree))
        os.utime(path, (time.time() - age, time.time() - age))
    (folder / "evaluation" / "c.json").write_text('{"scores": [1]}')
    (folder / "evaluation" / "d.json").write_text('{"sco')
    (folder / "evaluation" / "e.json").write_text(json.dumps({"manifest": {}, "scores": scores}))
    run = read_run(folder)
    assert [(each.id, each.scores) for each in run.evaluations] == [
        ("b", {"heron": {"judge": 0.25}}),
        ("a", {"heron": {"judge": 0.75}}),
    ], "oldest first"
    assert run.evaluations[0].manifest == manifest(["heron"])
    named = ["evaluation/c.json", "evaluation/d.json", "evaluation/e.json"]
    assert [note.partition(":")[0] for note in run.notes] == named


# --- what may happen to a folder --------------------------------------------------------------------------------------


def test_metrics_cut_off_in_the_last_row(tmp_path):
    folder = sweep(tmp_path)[0]
    path = folder / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-20])
    run = read_run(folder)
    assert run.metrics["step"] == 19
    assert run.notes == ("metrics.csv: the last row is cut off, and left out",)
    (folder / "finished.json").unlink()
    assert read_run(folder).state == "running" and read_run(folder).notes == (), "it is being written"


def test_nan_is_shown_and_named(tmp_path):
    (tmp_path / "config.yaml").write_text("name: a\n")
    (tmp_path / "metrics.csv").write_text("step,reduced_train_loss,val_loss\n1,2.5,\n2,nan,1.5\n3,nan,nan\n")
    run = read_run(tmp_path)
    assert math.isnan(run.metrics["final_train_loss"]) and run.metrics["best_train_loss"] == 2.5
    assert math.isnan(run.metrics["final_val_loss"]) and run.metrics["best_val_loss"] == 1.5
    assert "metrics.csv: reduced_train_loss is NaN in 2 rows, first at step 2" in run.notes
    assert "metrics.csv: val_loss is NaN in 1 row, first at step 3" in run.notes


@pytest.mark.parametrize(
    ("name", "data", "note"),
    [
        ("metrics.csv", b"step,lr\n1,0.5\n2,?\n3\n", "metrics.csv: line 3 and 1 more can't be understood"),
        ("metrics.csv", b"", None),
        ("metrics.csv", b"\xff\xfe\x00\n1\n", "metrics.csv: has no column step"),
        ("config.yaml", b"name: a\noptim: {max", "config.yaml: can't be read"),
        ("config.yaml", b"name: a\noptim:\n  max_l", "config.yaml: cut off"),
        ("config.yaml", b"", "config.yaml: empty"),
        ("provenance.json", b'{"command": ["a", ', "provenance.json: can't be read"),
        ("provenance.json", b"[]", "provenance.json: no JSON object"),
        ("answers.jsonl", b'{"step": 1}\n{"st', "answers.jsonl: line 1 can't be understood"),
    ],
)
def test_a_file_that_is_damaged_is_named_and_the_rest_shown(tmp_path, name, data, note):
    folder = sweep(tmp_path)[0]
    (folder / name).write_bytes(data)
    run = read_run(folder)
    assert any(found.startswith(note) for found in run.notes) if note else run.notes == ()
    assert name == "metrics.csv" or run.metrics["final_val_loss"] is not None
    assert name == "config.yaml" or run.config["optim.max_lr"] == 0.001


def test_a_start_that_was_cut_off(tmp_path):
    folder = tmp_path / "demo" / "1"
    folder.mkdir(parents=True)
    (folder / "config.yaml.partial").write_text("name")
    assert run_folders(tmp_path) == [folder]
    run = read_run(folder)
    assert (run.label, run.config, run.metrics["step"]) == ("demo/1", {}, None)
    assert "config.yaml: missing, the start was cut off" in run.notes
    assert run.curves().empty


def test_states(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 3}\n")
    (tmp_path / "metrics.csv").write_text("step\n1\n2\n")
    assert read_run(tmp_path).state == "running"
    (tmp_path / "failure.json").write_text("{}")
    assert read_run(tmp_path).state == "failed"
    (tmp_path / "failure.json").unlink()
    for path in tmp_path.iterdir():
        os.utime(path, (0, time.time() - FRESH_SECONDS - 1))
    assert read_run(tmp_path).state == "unknown"
    (tmp_path / "finished.json").write_text('{"step": 2}')  # stopped early, by its own will
    assert read_run(tmp_path).state == "done"


# --- finding ----------------------------------------------------------------------------------------------------------


def test_names_of_runs(tmp_path, monkeypatch):
    folders = sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    assert named_folders(f"lr_tp/{folders[1].name}", runs) == [folders[1]]
    assert named_folders(folders[1].name, runs) == [folders[1]]
    assert named_folders(f"runs/lr_tp/{folders[1].name}", tmp_path / "elsewhere") == [folders[1]]
    assert named_folders("lr_tp", runs) == named_folders("runs", runs) == folders
    with pytest.raises(UserError, match=r"runs: found 'lr_pt', where no run is.*Did you mean 'lr_tp'"):
        named_folders("lr_pt", runs)
    with pytest.raises(UserError, match="no run is"):
        named_folders("x", tmp_path / "nothing")


def test_the_jobs_of_a_ledger(tmp_path):
    folders = sweep(tmp_path)
    unstarted = {"config_yaml": "optim: {max_lr: 0.5}\n", "overrides": ["experiment=demo", "optim.max_lr=0.5"]}
    ledger = Ledger(tmp_path / "runs" / "sweeps" / "abc", create=True)
    ledger.add(
        [
            JobRow(0, "a", [], str(folders[0]), state="done"),
            JobRow(1, "b", [], str(folders[1]), state="failed", reason="out of memory"),
            JobRow(2, "c", ["optim.max_lr=0.5"], str(tmp_path / "runs" / "lr_tp" / "abc-2"), record=unstarted),
        ]
    )
    runs = sweep_runs("abc", tmp_path / "runs")
    assert [(run.state, run.sweep_id) for run in runs] == [("done", "abc"), ("failed", "abc"), ("pending", "abc")]
    assert runs[1].notes == ("failed: out of memory",)
    assert runs[2].config["optim.max_lr"] == 0.5 and runs[2].metrics == {} and runs[2].curves().empty
    assert runs[2].command == "python -m vlmsft.train experiment=demo optim.max_lr=0.5"


def test_a_sweep_without_its_ledger(tmp_path):
    folders = sweep(tmp_path)
    sweep_id = folders[0].name.rpartition("-")[0]
    assert [run.location for run in sweep_runs(sweep_id, tmp_path / "runs")] == [str(folder) for folder in folders]
    (tmp_path / "runs" / "sweeps" / "abcd").mkdir(parents=True)
    with pytest.raises(UserError, match=r"sweep: found 'abce', .*Did you mean 'abcd'"):
        sweep_runs("abce", tmp_path / "runs")
    (tmp_path / "runs" / "sweeps" / "abcd" / "ledger.sqlite").write_text("no database, but as long as one would be")
    with pytest.raises(UserError, match=r"abcd/ledger.sqlite: found .*database"):
        sweep_runs("abcd", tmp_path / "runs")
