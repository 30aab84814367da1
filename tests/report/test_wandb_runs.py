"""W&B's real package writes a sweep offline, its real `wandb sync` uploads it to a server on this machine, and its real
client reads it back from there: the table is the run folders' own each time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from config_cases import compose
from report_cases import sweep
from score_cases import manifest
from wandb_server import KEY, Server

from vlmsft.compare import find
from vlmsft.errors import UserError
from vlmsft.report.runs import read_run
from vlmsft.report.scores import with_comparable_scores
from vlmsft.report.table import as_csv, run_table
from vlmsft.report.wandb_runs import merged, offline_runs, online_runs
from vlmsft.runtime.wandb_files import log_files, read_log, sync_command, unsynced_folders

GROUP = "3f2a1b0c"


@dataclass
class Logged:
    folders: list[Path]
    server: Server


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The four runs in W&B's offline files and on the server; the last one by two starts of which the second did two
    steps again."""
    import wandb

    from vlmsft.runtime.metrics_rows import read_metrics
    from vlmsft.runtime.wandb import RunLogger
    from vlmsft.runtime.wandb_scores import log_scores

    with pytest.MonkeyPatch.context() as patch:
        server = Server()
        patch.setenv("WANDB_BASE_URL", server.url)
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        folders = sweep(tmp_path_factory.mktemp("wandb"))
        for number, folder in enumerate(folders):
            rows = read_metrics(folder / "metrics.csv")[0]
            starts = [rows] if number < 3 else [rows[:12], rows[10:]]
            for start in starts:
                logger = RunLogger("vlmsft", f"lr_tp-{folder.name}", folder, group=GROUP, offline=True, entity="team")
                logger.expect_rows()
                for row in start:
                    validation = {name: row[name] for name in ("step", "val_loss") if name in row}
                    logger.log_row({name: value for name, value in row.items() if name != "val_loss"})
                    if len(validation) == 2:
                        logger.log_row(validation)
                logger.finalize("success")
                wandb.finish()
        scores = {"heron": {"judge": {"score": 0.1234567, "num": 3, "num_missing": 0}, "rouge": {"score": None}}}
        (folders[3] / "evaluation").mkdir()
        (folders[3] / "evaluation" / "1.json").write_text(
            json.dumps({"manifest": manifest(["heron"]), "scores": scores})
        )
        wait_for_ends(folders)
        assert log_scores(folders[3], scores)
        patch.setenv("WANDB_MODE", "online")
        wait_for_ends(folders)
        all_folders = [offline for folder in folders for offline in unsynced_folders(folder)]
        command = [sys.executable, "-m", *sync_command(all_folders).split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        yield Logged(folders, server)
        wandb.teardown()
        server.shutdown()


def wait_for_ends(folders: list[Path]) -> None:
    """W&B's writer may still be at it when `wandb.finish` returns."""
    deadline = time.monotonic() + 60
    while any(read_log(path).exit_code is None for folder in folders for path in log_files(folder / "wandb")):
        assert time.monotonic() < deadline, "an offline run without an end"
        time.sleep(0.1)


def table(runs) -> str:
    return as_csv(run_table(with_comparable_scores(sorted(runs, key=lambda run: run.id))))


def test_the_same_table_from_folders_offline_files_and_the_server(logged):
    local = table(read_run(folder) for folder in logged.folders)
    assert local.count("\n") == 5 and "optim.max_lr" in local and "nan" not in local
    assert "heron/judge" in local and local.endswith(",0.1234567\n")
    assert table(offline_runs(logged.folders[0].parent)) == local
    assert table(online_runs("team/vlmsft")) == local


def test_the_same_curves_and_command(logged):
    first = read_run(logged.folders[3])
    uploaded = {run.id: run for run in online_runs("team/vlmsft")}
    others = [offline_runs(logged.folders[3])[0], uploaded[first.id]]
    for run in others:
        assert (run.command, run.commit, run.sweep_id) == (first.command, first.commit, first.sweep_id)
        assert run.command.startswith("python -m vlmsft.train experiment=demo")
        assert run.working_directory == "/home/user"
        columns = ["step", "reduced_train_loss", "val_loss", "lr"]
        assert run.curves()[columns].equals(first.curves()[columns]), "each step once, though two were done twice"
    assert others[1].location == f"team/vlmsft/lr_tp-{logged.folders[3].name}"


def test_syncing_two_starts_of_a_run_loses_and_doubles_nothing(logged):
    (stored,) = [run for name, run in logged.server.runs.items() if name.endswith("-3")]
    assert logged.server.overwritten == [] and logged.server.unknown == []
    steps = [row["step"] for row in stored.history() if "reduced_train_loss" in row]
    assert steps == list(range(1, 21))
    assert [row["_step"] for row in stored.history()] == list(range(len(stored.history())))
    assert logged.server.artifacts.count(f"config/config-lr_tp-{logged.folders[3].name}") == 2


def test_what_is_uploaded_is_listed_no_more(logged, tmp_path):
    assert [unsynced_folders(folder) for folder in logged.folders] == [[], [], [], []]
    shutil.copytree(logged.folders[3], tmp_path / "run")
    for mark in (tmp_path / "run").rglob("*.synced"):
        mark.unlink()
    folders = unsynced_folders(tmp_path / "run")
    assert len(folders) == 3, "two starts and the evaluation"
    command = f"wandb sync {folders[0]} {folders[1]} {folders[2]}"
    assert sync_command(folders) == command
    found = find(compose(f"wandb={tmp_path}", config_name="compare"))
    assert found.notes[-1] == f"3 offline W&B folders not uploaded yet: {command}"


def test_groups(logged):
    assert len(online_runs("team/vlmsft", GROUP)) == len(offline_runs(logged.folders[0].parent, GROUP)) == 4
    with pytest.raises(UserError, match="no run of group 'other' in team/vlmsft"):
        online_runs("team/vlmsft", "other")
    with pytest.raises(UserError, match="offline runs of group 'other'"):
        offline_runs(logged.folders[0].parent, "other")


def test_an_offline_file_cut_off_in_the_middle(logged, tmp_path):
    """As a machine that died leaves it; another is no file of W&B's at all."""
    shutil.copytree(logged.folders[0] / "wandb", tmp_path / "wandb")
    (path,) = log_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-3000])
    (tmp_path / "run-x").mkdir()
    (tmp_path / "run-x" / "x.wandb").write_text("nothing")
    (run,) = offline_runs(tmp_path)
    assert run.state == "running"
    assert 0 < len(run.curves()) < 21
    assert f"{path.name}: the last record is cut off, and left out" in run.notes
    assert any("x.wandb: found" in note for note in run.notes)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is no file of W&B's"):
        offline_runs(tmp_path)


def test_a_project_that_is_not_there(logged):
    with pytest.raises(UserError, match=r"wandb: found 'team/none', expected a project.*W&B says: .*none"):
        online_runs("team/none")
    with pytest.raises(UserError, match="expected entity/project"):
        online_runs("a/b/c")


def test_a_key_that_the_server_refuses(logged):
    logged.server.refuses_key = True
    try:
        with pytest.raises(UserError, match=r"W&B says: .*user is not logged in"):
            online_runs("team/vlmsft")
    finally:
        logged.server.refuses_key = False


def test_no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"wandb: found no login to W&B.*WANDB_API_KEY or type `wandb login`"):
        online_runs("team/vlmsft")


def test_rows_of_other_loggers():
    """Lightning's own calls the step otherwise; a table or a word is no number; NaN is a word at W&B."""
    history = [
        {"trainer/global_step": 0, "_step": 0, "loss": 2, "answers": {"_type": "table-file"}, "ok": True},
        {"_step": 1, "evaluation/heron/judge": 0.5},
        {"trainer/global_step": 1, "_step": 2, "loss": "NaN", "note": "x"},
    ]
    rows = merged(history)
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0] == {"step": 0, "trainer/global_step": 0, "loss": 2}
    assert rows[1]["loss"] != rows[1]["loss"]
