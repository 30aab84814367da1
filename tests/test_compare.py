"""The command: which runs, which form, what is said of what can't be shown."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from config_cases import compose
from score_cases import manifest

from vlmsft.compare import compare, find
from vlmsft.config_files import root
from vlmsft.errors import UserError

CONFIG = "name: demo\nid: {id}\ntrainer: {{max_steps: 2}}\noptim: {{max_lr: {lr}}}\n"
METRICS = "step,reduced_train_loss,val_loss\n1,2.5,\n"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(root())}


@pytest.fixture
def runs(tmp_path):
    """Two runs that have ended: demo/a (the better one) and demo/b."""
    for id, lr, loss in (("a", 0.5, "1.25"), ("b", 0.25, "1.5")):
        make(tmp_path / "demo" / id, lr, f"2,2.0,{loss}\n")
    return tmp_path


def make(folder: Path, lr: float, last: str = "") -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(id=folder.name, lr=lr))
    (folder / "overrides.yaml").write_text(f"- experiment=demo\n- optim.max_lr={lr}\n")
    (folder / "provenance.json").write_text("{}")
    (folder / "metrics.csv").write_text(METRICS + last)


def config(runs, *overrides):
    return compose(f"runs_dir={runs}", *overrides, config_name="compare")


CSV_LINES = ["demo/a,done,0.5,1.25,1.25,2,2,2", "demo/b,done,0.25,1.5,1.5,2,2,2"]


def test_all_runs(runs, capsys):
    compare(config(runs, "runs=all", "format=csv", "sort=-final_val_loss"))
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("run,state,optim.max_lr,final_val_loss,best_val_loss,")
    assert out.splitlines()[1:] == CSV_LINES[::-1]
    assert err == ""


def test_a_table_for_people(runs, capsys):
    compare(config(runs, "runs=[a,demo/b]"))
    out = capsys.readouterr().out
    assert "max_lr" in out and "val loss" in out and "0.25" in out
    assert "optim.max_lr" not in out and "config" not in out


def test_what_is_missing_is_named_and_the_rest_shown(runs, capsys):
    (runs / "demo" / "b" / "provenance.json").write_text("{")
    compare(config(runs, "runs=[a,c,b]", "format=csv"))
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == CSV_LINES
    assert "runs: found 'c', where no run is" in err
    assert "demo/b: provenance.json: can't be read" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "runs: found none of sweep, runs and wandb"),
        (["runs=all", "sweep=1"], "runs: found sweep and runs, expected one of"),
        (["runs=[x,y]"], "(?s)found 'x'.*found 'y'"),
        (["runs=all", "group=g"], "group: found 'g', expected null without wandb="),
        (["runs=all", "format=html"], "format: found 'html', expected one of table, csv, markdown"),
        (["runs=all", "watch=true", "watch_seconds=0"], "watch_seconds: found 0"),
        (["runs=all", "watch=often"], "watch: found 'often', expected true or false"),
        (["runs=3.5", "sort=[a]"], "(?s)sort: found .'a'., expected a text.*runs: found 3.5, expected all, or a list"),
        (["sweep=3e21"], """sweep: found 3e[+]21, expected an id. Quote it: sweep='"..."'"""),
        (["runs=all", "runs_dir=null"], "runs_dir: found None, expected a folder"),
        (["runs=all", "output=/proc/x.csv"], "output: found /proc/x.csv, where nothing can be written"),
        (["runs=all", "report=/proc/x.html"], "report: found /proc/x.html, where nothing can be written"),
        (["runs=all", "plots=/proc/x"], "plots: found /proc/x, where nothing can be written"),
        (["runs=all", "force=a bit"], "force: found 'a bit', expected true or false"),
        (["runs=all", "sort=loss"], "sort: found 'loss'"),
        (["sweep=1"], "sweep: found '1', expected a sweep below"),
    ],
)
def test_wrong_usage_is_a_user_error(runs, overrides, message):
    with pytest.raises(UserError, match=message):
        compare(config(runs, *overrides))


def test_no_runs_at_all(tmp_path):
    with pytest.raises(UserError, match=f"runs: found no run, expected runs in {tmp_path}"):
        find(config(tmp_path, "runs=all"))


@pytest.mark.parametrize(("name", "start"), [("t.csv", "run,state,"), ("t.md", "| run |"), ("t.txt", "\n run ")])
def test_a_file_by_its_suffix_and_never_over_another(runs, tmp_path, capsys, name, start):
    target = tmp_path / "new" / name
    compare(config(runs, "runs=all", f"output={target}"))
    assert target.read_text().startswith(start)
    assert capsys.readouterr().out == f"table: {target}\n"
    with pytest.raises(UserError, match=r"output: found .*, which exists"):
        compare(config(runs, "runs=all", f"output={target}"))
    assert [path.name for path in target.parent.iterdir()] == [name]


def test_a_report(runs, tmp_path, capsys):
    compare(config(runs, "runs=all", f"report={tmp_path}/report.html"))
    assert "<html" in (tmp_path / "report.html").read_text()
    assert f"report: {tmp_path}/report.html" in capsys.readouterr().out


def test_scores_that_were_made_otherwise_are_neither_in_the_table_nor_in_the_report(runs, tmp_path, capsys):
    for id, score, limit in (("a", 12.5, 4), ("b", 87.5, 5)):
        tree = {"manifest": manifest(limit=limit), "scores": {"sample": {"exact": {"score": score}}}}
        (runs / "demo" / id / "evaluation").mkdir()
        (runs / "demo" / id / "evaluation" / "1.json").write_text(json.dumps(tree))
    compare(config(runs, "runs=all", "format=csv", f"report={tmp_path}/one.html"))
    out, err = capsys.readouterr()
    assert "sample/exact" in out and "12.5" in out and "87.5" not in out
    assert "demo/b: scores of sample not shown: made otherwise than those of demo/a (limit: 5 / 4)" in err
    page = (tmp_path / "one.html").read_text()
    assert "12.5" in page and "87.5" not in page and "made otherwise than those of demo/a" in page
    compare(config(runs, "runs=all", "format=csv", "force=true", f"report={tmp_path}/two.html"))
    out, err = capsys.readouterr()
    assert "12.5" in out and "87.5" in out and "demo/b: scores of sample shown although" in err
    assert "87.5" in (tmp_path / "two.html").read_text()


def test_scores_of_wandb_are_shown_and_said_to_be_unchecked(runs, monkeypatch):
    from vlmsft.report import wandb_runs
    from vlmsft.report.record import RunRecord

    records = [RunRecord("demo", id, "", "done", {}, {"sample/exact": 1.0}, curves=lambda: None) for id in "ab"]
    monkeypatch.setattr(wandb_runs, "offline_runs", lambda folder, group: records)
    found = find(config(runs, f"wandb={runs}"))
    assert [run.metrics for run in found.runs] == [{"sample/exact": 1.0}] * 2
    assert found.notes[0].startswith("W&B doesn't say how evaluation scores were made")


def command(runs, *overrides):
    return [sys.executable, "-m", "vlmsft.compare", f"runs_dir={runs}", *overrides]


def test_exit_codes_and_imports(runs, tmp_path):
    code = (
        "import sys, runpy\n"
        "try: runpy.run_module('vlmsft.compare', run_name='__main__')\n"
        "except SystemExit as end: print('EXIT', end.code)\n"
        "print('HEAVY', [name for name in ('torch', 'nemo', 'pandas', 'wandb', 'plotly') if name in sys.modules])\n"
    )
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", code, f"runs_dir={runs}", "runs=[demo,x]"], **options)
    assert done.stdout.endswith("HEAVY []\n") and "EXIT" not in done.stdout
    assert "demo/a" in done.stdout and "found 'x'" in done.stderr
    done = subprocess.run(command(runs, "runs=[x]"), **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("1 problem; there is nothing to show:\n  runs: found 'x'")


def test_watching_ends_with_the_runs(runs, tmp_path):
    """Without a terminal: the table anew whenever it has changed."""
    make(runs / "demo" / "c", 0.125)
    watch = subprocess.Popen(
        command(runs, "runs=all", "watch=true", "watch_seconds=0.2", "format=csv"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watch.stdout is not None
    assert [watch.stdout.readline() for _ in range(4)][3] == "demo/c,running,0.125,,,2.5,2.5,1\n"
    with open(runs / "demo" / "c" / "metrics.csv", "a") as file:
        file.write("2,1.0,")  # half a row
        file.flush()
        time.sleep(1)
        file.write("0.75\n")
    rest, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0
    assert [line for line in rest.splitlines() if "demo/c" in line] == ["demo/c,done,0.125,0.75,0.75,1,1,2"]


def test_watching_in_a_terminal_until_ctrl_c(runs, tmp_path):
    make(runs / "demo" / "c", 0.125)
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    overrides = ("runs=all", "watch=true", "watch_seconds=0.2")
    watch = subprocess.Popen(
        command(runs, *overrides), cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        assert "2 done, 1 running" in read_until(ours, "Ctrl-C ends")
        (runs / "demo" / "c" / "failure.json").write_text("{}")
        make(runs / "demo" / "d", 0.1)
        assert "1 failed, 1 running" in read_until(ours, "1 failed")
        watch.send_signal(2)
        read_until(ours, "no longer watched; the runs go on")
        assert watch.wait(60) == 0
    finally:
        watch.kill()
        os.close(ours)


def read_until(descriptor: int, text: str) -> str:
    """What the terminal shows up to the end of the line with `text`."""
    shown, deadline = "", time.monotonic() + 60
    while text not in shown or not shown.partition(text)[2].strip():
        assert time.monotonic() < deadline, shown
        if select.select([descriptor], [], [], 1)[0]:
            try:
                shown += os.read(descriptor, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
    assert text in shown
    return shown
