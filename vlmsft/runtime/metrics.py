"""metrics.csv in the run folder: one row per logged step.

Our own writer, because Lightning's CSVLogger deletes the file of the run that it resumes.

`step` counts optimizer steps done, so the row of step k holds the loss of the k-th step. A validation's `val_loss` is
in the row of the step that it followed. NaN is written as "nan"; what was not measured is empty. A resumed run goes on
in the same file: rows after the restored step, which the run is about to do again, move to metrics-dropped.csv.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vlmsft.runtime.metrics_rows import ENDED_FILE
from vlmsft.runtime.progress import global_batch_size, learning_rate
from vlmsft.runtime.wandb import RowLogger

logger = logging.getLogger(__name__)

COLUMNS = (
    "step",
    "epoch",
    "consumed_samples",
    "reduced_train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "step_seconds",
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_second_per_gpu",
    "mfu",
    "data_wait_fraction",
    "peak_memory_gib",
    "elapsed_seconds",
)
# what Lightning and NeMo log beside it and a column already holds
_NOT_COLUMNS = {"global_step", "global_batch_size"}


class MetricsFile(Callback):
    """Writes a row every `trainer.log_every_n_steps` steps, at the last step and after each validation, on rank 0.

    path: the file, e.g. runs/<name>/<id>/metrics.csv

    Any other metric that is logged gets a column of its own when it first appears. A logger that takes rows
    (log=wandb) gets each as it is written.
    Speed and memory are those of vlmsft.runtime.throughput.Throughput, which comes before this callback.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.table = MetricsTable(path)
        self._last_step = 0
        self._started = 0.0
        self._lr: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._ended_path.unlink(missing_ok=True)
            for logger_of_rows in _row_loggers(trainer):
                logger_of_rows.expect_rows()
            dropped = self.table.drop_after(trainer.global_step)
            if dropped:
                logger.info(
                    "metrics.csv: %d rows after step %d moved to %s",
                    dropped,
                    trainer.global_step,
                    self.table.dropped_path.name,
                )
        self._started = time.monotonic()
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._lr = learning_rate(trainer)  # at the step's end the scheduler has already set the next one's

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ):
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._last_step:
            return
        interval = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue] # set from outside the class
        if step % interval == 0 or step == trainer.max_steps:
            self._write(trainer, self._row(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = {name: value for name, value in _logged(trainer).items() if name.startswith("val")}
        self._write(trainer, {"step": trainer.global_step, "epoch": trainer.current_epoch, **values})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.global_step > self._last_step:
            self._write(trainer, self._row(trainer))
        self._ended_path.write_text(json.dumps({"step": trainer.global_step}), encoding="utf-8")

    @property
    def _ended_path(self) -> Path:
        return self.table.path.with_name(ENDED_FILE)

    def _write(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        written = self.table.write(row)
        for logger_of_rows in _row_loggers(trainer):
            logger_of_rows.log_row({name: float(text) for name, text in written.items()})

    def _row(self, trainer: Trainer) -> dict[str, Any]:
        step, batch = trainer.global_step, global_batch_size(trainer)
        row: dict[str, Any] = {name: value for name, value in _logged(trainer).items() if not name.startswith("val")}
        row.update(step=step, epoch=trainer.current_epoch, lr=self._lr)
        row["elapsed_seconds"] = time.monotonic() - self._started
        if batch:
            # NeMo logs none at the first step
            row["consumed_samples"] = int(row.get("consumed_samples", step * batch))
        self._last_step = step
        return row


def _row_loggers(trainer: Trainer) -> list[RowLogger]:
    return [of_trainer for of_trainer in trainer.loggers if isinstance(of_trainer, RowLogger)]


def _logged(trainer: Trainer) -> dict[str, float]:
    """All logged metrics as numbers; waits for the GPU. A metric logged per step and per epoch comes once."""
    metrics = trainer.callback_metrics
    return {
        name: float(value)
        for name, value in metrics.items()
        if name not in _NOT_COLUMNS and name.removesuffix("_step").removesuffix("_epoch") not in metrics.keys() - {name}
    }


class MetricsTable:
    """A CSV file that grows by a row or completes its last one; nothing is lost when the process dies in between."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.dropped_path = self.path.with_name(self.path.stem + "-dropped.csv")
        self._columns: list[str] | None = None
        self._last_row: dict[str, str] = {}
        self._last_offset = 0

    def write(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Append the row; where the last row is of the same step, fill in what it lacks instead. Gives its cells."""
        cells = {name: _format(value) for name, value in row.items() if value is not None}
        columns = self._open()
        if missing := [name for name in cells if name not in columns]:
            self._rewrite([*columns, *missing], self.read())
            columns = self._open()
        new = cells
        if self._last_row.get("step") == cells["step"]:
            new = {**self._last_row, **cells}
            offset = self._last_offset
        else:
            offset = self.path.stat().st_size
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(_lines(columns, [new]))
            file.truncate()
        self._last_row, self._last_offset = new, offset
        return cells

    def read(self) -> list[dict[str, str]]:
        """All rows as text, [] where there is no file."""
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def drop_after(self, step: int) -> int:
        """Move rows after `step` to metrics-dropped.csv; returns how many. Also drops a row torn by a crash."""
        rows = self.read()
        if rows and not self.path.read_bytes().endswith(b"\n"):
            rows[-1] = {**rows[-1], "step": "torn"}
        kept = [row for row in rows if _is_up_to(row, step)]
        dropped = [row for row in rows if not _is_up_to(row, step)]
        if dropped:
            columns = self._open()
            header = [] if self.dropped_path.exists() else [dict(zip(columns, columns, strict=True))]
            with open(self.dropped_path, "ab") as file:
                file.write(_lines(columns, [*header, *dropped]))
            self._rewrite(columns, kept)
        return len(dropped)

    def _open(self) -> list[str]:
        """The header; makes the file with the standard columns where there is none."""
        if self._columns is None:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._rewrite(list(COLUMNS), [])
            else:
                with open(self.path, encoding="utf-8", newline="") as file:
                    self._columns = next(csv.reader(file), list(COLUMNS))
        assert self._columns is not None
        return self._columns

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        header = dict(zip(columns, columns, strict=True))
        partial.write_bytes(_lines(columns, [header, *rows]))
        os.replace(partial, self.path)
        self._columns = columns
        self._last_row = dict(rows[-1]) if rows else {}
        self._last_offset = self.path.stat().st_size - (len(_lines(columns, rows[-1:])) if rows else 0)


def _is_up_to(row: Mapping[str, str], step: int) -> bool:
    try:
        return int(row["step"]) <= step
    except (KeyError, TypeError, ValueError):
        return False


def _format(value: Any) -> str:
    """Integers as such; floats with 7 digits, which is what fp32 holds; NaN as "nan"."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.7g}"
    return str(int(value)) if isinstance(value, (int, float)) else str(value)


def _lines(columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, list(columns), restval="", extrasaction="ignore", lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8")
