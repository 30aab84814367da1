"""What checkpoint= stands for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vlmsft.checkpoints.find import resolve_checkpoint
from vlmsft.errors import UserError


def save(run: Path, name: str) -> Path:
    """A checkpoint folder as NeMo names it."""
    folder = run / "checkpoints" / name
    for part in ("weights", "context"):
        (folder / part).mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run():
    return Path("runs/demo/a")


@pytest.fixture
def saved(run):
    """{"1", "3", "5", "last": checkpoint}; the best is the second of three."""
    losses = {"1": "0.9000", "3": "0.4000", "5": "0.5000"}
    folders = {
        step: save(run, f"val_loss={loss}-step={step}-consumed_samples={16.0 * int(step)}")
        for step, loss in losses.items()
    }
    folders["last"] = save(run, "val_loss=0.5000-step=5-consumed_samples=80.0-last")
    return folders


@pytest.mark.parametrize(
    "text", ["runs/demo/a", "demo/a", "demo", "runs/demo", "runs/demo/a/checkpoints", "runs/demo/a/"]
)
def test_a_run_stands_for_its_best_checkpoint(saved, text):
    assert resolve_checkpoint(text) == saved["3"]


def test_the_last_one_when_asked_for(saved):
    assert resolve_checkpoint("demo", "last") == saved["last"]


def test_the_run_says_whether_large_is_good(run, saved):
    (run / "config.yaml").write_text("log: {ckpt: {mode: max}}")
    assert resolve_checkpoint("demo") == saved["1"]


def test_a_checkpoint_stands_for_itself(saved):
    assert resolve_checkpoint(str(saved["1"])) == saved["1"]
    assert resolve_checkpoint(str(saved["1"] / "weights")) == saved["1"]


def test_of_two_equal_values_the_later(run):
    save(run, "val_loss=0.5000-step=1-consumed_samples=16.0")
    later = save(run, "val_loss=0.5000-step=9-consumed_samples=160.0")
    save(run, "val_loss=0.5000-step=9-consumed_samples=160.0-last")
    assert resolve_checkpoint("demo") == later


def test_without_a_monitored_value_the_last(run):
    save(run, "step=1-consumed_samples=16.0")
    last = save(run, "step=3-consumed_samples=48.0-last")
    assert resolve_checkpoint("demo") == last


def test_the_newest_run_of_a_name_that_has_saved(saved):
    Path("runs/demo/z/checkpoints").mkdir(parents=True)  # newer, nothing saved
    newest = save(Path("runs/demo/b"), "val_loss=0.7000-step=1-consumed_samples=16.0")
    ahead = time.time() + 60
    os.utime(newest, (ahead, ahead))
    assert resolve_checkpoint("demo") == newest


def test_an_unfinished_one_is_passed_over(run, saved):
    (run / "checkpoints" / f"{saved['3'].name}-unfinished").touch()
    assert resolve_checkpoint("demo") == saved["5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dmeo", ["'dmeo'", "runs/ has demo", "Did you mean 'demo'?"]),
        ("hf", ["config.json", "import_ckpt"]),
        ("runs/killed/a", ["without a complete checkpoint", "killed while it saved"]),
    ],
)
def test_what_was_found_instead(saved, text, words):
    Path("hf").mkdir()
    Path("hf/config.json").touch()
    killed = save(Path("runs/killed/a"), "val_loss=0.1000-step=1-consumed_samples=16.0")
    killed.with_name(f"{killed.name}-unfinished").touch()
    with pytest.raises(UserError) as error:
        resolve_checkpoint(text)
    for word in ["checkpoint:", *words]:
        assert word in str(error.value)
