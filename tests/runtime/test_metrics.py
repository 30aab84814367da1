"""metrics.csv, with Lightning's real trainer: one row per step, also across a resume."""

from __future__ import annotations

import csv
import math

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from runtime_toys import ToyData, ToyModel

from vlmsft.runtime.metrics import COLUMNS, MetricsFile, MetricsTable


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_step_with_validation_in_it(toy_trainer, tmp_path):
    path = tmp_path / "runs" / "metrics.csv"
    toy_trainer(MetricsFile(path), max_steps=8, val_check_interval=4).fit(ToyModel(), ToyData())
    rows = read(path)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert [bool(row["val_loss"]) for row in rows] == [step in (4, 8) for step in range(1, 9)]
    assert [row["consumed_samples"] for row in rows[:2]] == ["4", "8"]
    # the LR that the step was taken with, not the next one
    assert [float(row["lr"]) for row in rows[:3]] == pytest.approx([0.1, 0.05, 0.025])
    losses = [float(row["reduced_train_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert all(row["peak_memory_gib"] == "" for row in rows), "not measured, so empty and not 0"


def test_log_every_n_steps_and_the_last_step(toy_trainer, tmp_path):
    trainer = toy_trainer(MetricsFile(tmp_path / "m.csv"), max_steps=8, limit_val_batches=0, log_every_n_steps=3)
    trainer.fit(ToyModel(), ToyData())
    assert [row["step"] for row in read(tmp_path / "m.csv")] == ["3", "6", "8"]


def test_last_step_of_max_epochs(toy_trainer, tmp_path):
    trainer = toy_trainer(MetricsFile(tmp_path / "m.csv"), max_epochs=1, limit_val_batches=0, log_every_n_steps=5)
    trainer.fit(ToyModel(), ToyData())
    assert [row["step"] for row in read(tmp_path / "m.csv")] == ["5", "8"]


def test_nan_is_written(toy_trainer, tmp_path):
    trainer = toy_trainer(MetricsFile(tmp_path / "m.csv"), max_steps=3, limit_val_batches=0)
    trainer.fit(ToyModel(bad_step=1), ToyData())
    rows = read(tmp_path / "m.csv")
    assert rows[1]["reduced_train_loss"] == "nan"
    assert math.isfinite(float(rows[2]["reduced_train_loss"]))


def test_any_other_metric_gets_a_column(toy_trainer, tmp_path):
    class Late(Callback):
        def on_train_batch_start(self, trainer, module, *args):
            if trainer.global_step >= 2:
                module.log("model_flops_utilization", 0.25)

    toy_trainer(Late(), MetricsFile(tmp_path / "m.csv"), max_steps=4, limit_val_batches=0).fit(ToyModel(), ToyData())
    rows = read(tmp_path / "m.csv")
    assert [row["model_flops_utilization"] for row in rows] == ["", "", "0.25", "0.25"]
    assert list(rows[0]) == [*COLUMNS, "model_flops_utilization"]


def test_resume_has_each_step_once(toy_trainer, tmp_path):
    path, folder = tmp_path / "metrics.csv", tmp_path / "checkpoints"
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    toy_trainer(checkpoint, MetricsFile(path), max_steps=6, **options).fit(ToyModel(), ToyData())
    before = read(path)
    trainer = toy_trainer(MetricsFile(path), max_steps=8, **options)
    trainer.fit(ToyModel(), ToyData(), ckpt_path=folder / "step=4.ckpt")

    rows = read(path)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert rows[:4] == before[:4]
    assert read(tmp_path / "metrics-dropped.csv") == before[4:]
    # the two steps that were done again gave the same losses
    assert [r["reduced_train_loss"] for r in rows[4:6]] == [r["reduced_train_loss"] for r in before[4:]]


def test_a_row_torn_by_a_crash_is_dropped(tmp_path):
    table = MetricsTable(tmp_path / "m.csv")
    table.write({"step": 1, "lr": 0.5})
    table.write({"step": 2, "lr": 0.25})
    data = table.path.read_bytes()
    table.path.write_bytes(data[:-4])
    again = MetricsTable(tmp_path / "m.csv")
    assert again.drop_after(2) == 1
    again.write({"step": 2, "lr": 0.25})
    assert [(row["step"], row["lr"]) for row in read(table.path)] == [("1", "0.5"), ("2", "0.25")]


def test_same_step_completes_the_last_row_only(tmp_path):
    table = MetricsTable(tmp_path / "m.csv")
    for step in (1, 2):
        table.write({"step": step, "lr": step / 8})
    table.write({"step": 2, "val_loss": 0.5})
    table.write({"step": 2, "val_accuracy": 1 / 3})  # a new column and the same row
    table.write({"step": 3, "lr": 0.375})
    rows = read(table.path)
    assert [(r["step"], r["lr"], r["val_loss"], r["val_accuracy"]) for r in rows] == [
        ("1", "0.125", "", ""),
        ("2", "0.25", "0.5", "0.3333333"),
        ("3", "0.375", "", ""),
    ]


def test_rank_1_writes_nothing(toy_trainer, tmp_path, monkeypatch):
    trainer = toy_trainer(MetricsFile(tmp_path / "m.csv"), max_steps=2, val_check_interval=2)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    trainer.fit(ToyModel(), ToyData())
    assert not (tmp_path / "m.csv").exists()
