"""The progress line, with Lightning's real trainer."""

from __future__ import annotations

import csv
import io
import re
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from runtime_toys import ToyData, ToyModel

from vlmsft.runtime import logging as run_logging
from vlmsft.runtime.metrics import MetricsFile
from vlmsft.runtime.progress import StepRate, TrainProgress, count_truncated, format_seconds, total_steps
from vlmsft.runtime.throughput import Throughput


def test_plain_lines_without_a_terminal(toy_trainer, capsys):
    toy_trainer(TrainProgress(line_seconds=1000), max_steps=8, val_check_interval=4).fit(ToyModel(), ToyData())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/8 | loss ")
    assert "lr 1.00e-01" in lines[0]
    assert re.fullmatch(r"validation at step 4: val_loss \d\.\d{4} \(0 s\)", lines[1])
    assert re.match(r"step 8/8 \| loss [\d.]+ \| lr 7\.81e-04 \| [\d.]+ samples/s \| 0 s left \| val_loss", lines[2])
    assert lines[-1] == (
        "16 sample visits in training and 6 in validation were longer than the text limit and lost their end"
    )
    assert len(lines) == 5, lines  # first and last step, two validations, the truncation


def test_line_seconds_zero_shows_every_step(toy_trainer, capsys):
    toy_trainer(TrainProgress(line_seconds=0), max_steps=5, limit_val_batches=0).fit(ToyModel(), ToyData())
    steps = re.findall(r"^step (\d+)/5", capsys.readouterr().out, re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5"]


def test_bar_in_a_terminal(toy_trainer, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(run_logging, "console", lambda: console)
    model = ToyModel()
    model.on_validation_batch_start = lambda *args: time.sleep(0.15)  # the bar is drawn ten times a second
    toy_trainer(TrainProgress(refresh_seconds=0), max_steps=8, val_check_interval=4).fit(model, ToyData())
    text = screen.getvalue()
    assert "training" in text and "8/8" in text
    assert "validation" in text and "1/2" in text
    assert "16 truncated" in text and "samples/s" in text


def test_nan_stays_visible(toy_trainer, capsys):
    toy_trainer(TrainProgress(line_seconds=0), max_steps=3, limit_val_batches=0).fit(ToyModel(bad_step=1), ToyData())
    lines = capsys.readouterr().out.splitlines()
    assert ["nan" in line for line in lines[:3]] == [False, True, False]


def test_other_ranks_say_nothing(toy_trainer, capsys):
    progress = TrainProgress(line_seconds=0)
    trainer = toy_trainer(progress, max_steps=2, limit_val_batches=0)
    setup = progress.setup

    def setup_as_rank_1(*args, **kwargs):
        setup(*args, **kwargs)
        progress.disable()  # what Lightning does where the rank isn't 0

    progress.setup = setup_as_rank_1
    trainer.fit(ToyModel(), ToyData())
    assert capsys.readouterr().out == ""
    assert progress.num_truncated_samples == 4, "a silent rank still counts its samples for the sum"


def test_loss_is_read_only_when_shown(toy_trainer, monkeypatch):
    reads = []
    monkeypatch.setattr("vlmsft.runtime.progress.read_metric", lambda trainer, name: reads.append(name))
    toy_trainer(TrainProgress(line_seconds=1000), max_steps=8, limit_val_batches=0).fit(ToyModel(), ToyData())
    assert reads.count("reduced_train_loss") == 2, "first and last step: each read waits for the GPU"


def test_terminal_is_released_after_an_error(toy_trainer, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(run_logging, "console", lambda: console)
    progress, model = TrainProgress(), ToyModel()
    model.validation_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        toy_trainer(progress, max_steps=8, val_check_interval=2).fit(model, ToyData())
    assert progress._bar is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 20}, 20),
        ({"max_epochs": 2}, 16),
        ({"max_epochs": 2, "max_steps": 5}, 5),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9),  # 8 batches an epoch, the last step takes two
        ({"max_epochs": -1}, None),
    ],
)
def test_total_steps(toy_trainer, options, expected):
    trainer = toy_trainer(limit_val_batches=0, **options)
    seen = []

    class Look(TrainProgress):
        def on_train_batch_start(self, trainer, *args):
            seen.append(total_steps(trainer))
            trainer.should_stop = True

    trainer.callbacks.append(Look(line_seconds=1000))
    trainer.fit(ToyModel(), ToyData())
    assert seen[0] == expected


def test_rate_leaves_out_the_first_step_and_validation():
    rate = StepRate()
    rate.add(101, 1000.0)  # a resumed run; the first step took long
    assert rate.seconds_per_step() is None and rate.seconds_left(5) is None
    rate.add(102, 1002.0)
    rate.pause(30.0)
    rate.add(103, 1034.0)
    assert rate.seconds_per_step() == pytest.approx(2.0)
    # 30 s of validation came with 2 steps
    assert rate.seconds_left(10) == pytest.approx(10 * (2.0 + 15.0))


def test_pause_spans_validation_and_the_save_after_it(toy_trainer, tmp_path):
    class Slow(ModelCheckpoint):
        def on_validation_end(self, *args):
            time.sleep(1.0)
            super().on_validation_end(*args)

    progress, callbacks = TrainProgress(line_seconds=1000), [Throughput(), MetricsFile(tmp_path / "m.csv")]
    options = {"max_steps": 8, "val_check_interval": 4, "enable_checkpointing": True}
    toy_trainer(progress, *callbacks, Slow(tmp_path, monitor="val_loss"), **options).fit(ToyModel(), ToyData())
    assert progress.rate.seconds_per_step() < 0.12, "7 steps, one of which was followed by a second of saving"
    assert progress.rate._paused > 1.0
    with open(tmp_path / "m.csv", newline="") as file:
        assert min(float(row["samples_per_second"]) for row in list(csv.DictReader(file))[1:]) > 4 / 0.9


def test_rate_forgets_what_is_older_than_a_minute():
    rate = StepRate()
    for step in range(10):
        rate.add(step, step * 30.0)
    for step in range(10, 200):
        rate.add(step, 270.0 + (step - 9) * 1.0)
    assert rate.seconds_per_step() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"num_truncated_tokens": torch.tensor([0, 3, 1])}, 2),
        ({"num_truncated_tokens": 0}, 0),
        ({"tokens": torch.zeros(1)}, 0),
        (None, 0),
    ],
)
def test_count_truncated(batch, expected):
    assert count_truncated(batch) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (18120, "5 h 02 min"), (-1, "0 s")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_validation_sets_with_names_are_shown(toy_trainer, capsys):
    model = ToyModel()

    def validation_step(batch, batch_idx):
        for name, value in (("val_loss", 2.0), ("val_loss_chat", 1.0), ("val_loss_ocr", 3.0)):
            model.log(name, value, batch_size=4)

    model.validation_step = validation_step
    toy_trainer(TrainProgress(line_seconds=1000), max_steps=2, val_check_interval=2).fit(model, ToyData())
    assert "validation at step 2: val_loss 2.0000 (chat 1.0000, ocr 3.0000, 0 s)" in capsys.readouterr().out
