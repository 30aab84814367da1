"""One line that says how training goes: a bar in a terminal, a plain line now and then in a log file.

Replaces NeMo's ProgressPrinter, which asks Megatron's timers on rank 0 only: that is a collective, after which gloo
pairs all later ones wrongly. Values are read when the line is drawn, not at each step: reading the loss waits for the
GPU.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from vlmsft.runtime import logging as run_logging
from vlmsft.runtime.skipped import num_skipped

SET_PREFIX = "val_loss_"
"""Of the metrics of validation sets with names."""
TRUNCATED_KEY = "num_truncated_tokens"
WINDOW_SECONDS = 60.0


class TrainProgress(ProgressBar):
    """Step, loss, LR, samples/s, time left, last validation loss, truncated and skipped samples, on global rank 0.

    A truncated sample counts at each visit: once an epoch in training, once a validation; a resumed run starts at 0.
    A step that fp16's loss scaling skipped counts as a step.

    refresh_seconds: how often the bar in a terminal takes new values
    line_seconds: how often a line is written where stdout is no terminal; the first and the last step always are
    """

    def __init__(self, refresh_seconds: float = 0.5, line_seconds: float = 30.0):
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.line_seconds = line_seconds
        self.rate = StepRate()
        self.num_truncated_samples = 0
        self.num_truncated_in_validation = 0
        self._enabled = True
        self._console: Console | None = None
        self._bar: _Bar | None = None
        self._last_shown = -math.inf
        self._last_shown_step = -1
        self._last_val_loss: float | None = None
        self._validation_started = 0.0
        self._pause = Pause()
        self._sees_microbatches = False
        self._lr: float | None = None

    # Lightning calls these two for ranks other than 0, and round its own searches
    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            (self._console or run_logging.console()).print(*args, **{"markup": False, "highlight": False, **kwargs})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate = StepRate()
        if not self._enabled:
            return
        self._console = console = run_logging.console()
        if console.is_terminal:
            self._bar = bar = _make_bar(console)
            bar.add_task("training", total=total_steps(trainer), completed=trainer.global_step)
            bar.add_task("validation", total=None, visible=False)
            bar.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._lr = learning_rate(trainer)  # at the step's end the scheduler has already set the next one's
        self.rate.pause(self._pause.end(time.monotonic()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ):
        if not self._sees_microbatches:
            self.num_truncated_samples += count_truncated(batch)
        if not self._enabled:
            return
        now, step = time.monotonic(), trainer.global_step
        self.rate.add(step, now)
        interval = self.refresh_seconds if self._bar else self.line_seconds
        if now - self._last_shown >= interval or step == total_steps(trainer):
            self._show(trainer, now)

    def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
        """NeMo hands Lightning's hooks only the last micro batch of a step; this hook sees each of them."""
        self._sees_microbatches = True
        if step.trainer is not None and step.trainer.training:
            self.num_truncated_samples += count_truncated(batch)
        if step.trainer is not None and step.trainer.validating:  # not while it is sanity checking
            self.num_truncated_in_validation += count_truncated(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = time.monotonic()
        self._pause.begin(self._validation_started)
        if self._bar:
            total = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
            self._bar.reset(_VALIDATION, total=total if math.isfinite(total) else None, visible=True)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        if not self._sees_microbatches and trainer.validating:
            self.num_truncated_in_validation += count_truncated(batch)
        if self._bar:
            self._bar.advance(_VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = time.monotonic() - self._validation_started
        if trainer.sanity_checking or not self._enabled:
            return
        self._last_val_loss = read_metric(trainer, "val_loss")
        if self._bar:
            self._bar.update(_VALIDATION, visible=False)
        loss = "none logged" if self._last_val_loss is None else f"{self._last_val_loss:.4f}"
        sets = [
            f"{name.removeprefix(SET_PREFIX)} {float(value):.4f}"
            for name, value in trainer.callback_metrics.items()
            if name.startswith(SET_PREFIX)
        ]
        details = ", ".join([*sets, format_seconds(seconds)])
        self.print(f"validation at step {trainer.global_step}: val_loss {loss} ({details})")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause.begin(time.monotonic())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and self._last_shown_step != trainer.global_step:
            self._show(trainer, time.monotonic())
        self._stop()
        # every rank takes part: each saw its own samples
        in_training = sum_over_data_parallel_ranks(self.num_truncated_samples)
        in_validation = sum_over_data_parallel_ranks(self.num_truncated_in_validation)
        if (in_training or in_validation) and self._enabled:
            visits = f"{in_training} sample visits in training and {in_validation} in validation"
            self.print(f"{visits} were longer than the text limit and lost their end")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _show(self, trainer: Trainer, now: float) -> None:
        self._last_shown, self._last_shown_step = now, trainer.global_step
        total = total_steps(trainer)
        details = self._details(trainer, total)
        if self._bar:
            self._bar.details = "  ".join(details)
            self._bar.update(_TRAINING, total=total, completed=trainer.global_step)
            return
        step = f"step {trainer.global_step}" + (f"/{total}" if total is not None else "")
        self.print(" | ".join([step, *details]))

    def _details(self, trainer: Trainer, total: int | None) -> list[str]:
        details = []
        loss = read_metric(trainer, "reduced_train_loss")
        if loss is not None:
            details.append(f"loss {loss:.4f}")
        if self._lr is not None:
            details.append(f"lr {self._lr:.2e}")
        seconds = self.rate.seconds_per_step()
        if seconds:
            batch = global_batch_size(trainer)
            details.append(f"{batch / seconds:.2f} samples/s" if batch else f"{1 / seconds:.2f} steps/s")
            left = None if total is None else self.rate.seconds_left(total - trainer.global_step)
            if left is not None:
                details.append(f"{format_seconds(left)} left")
        if self._last_val_loss is not None:
            details.append(f"val_loss {self._last_val_loss:.4f}")
        if self.num_truncated_samples:
            details.append(f"{self.num_truncated_samples} truncated")
        if skipped := num_skipped(trainer):
            details.append(f"{skipped} skipped")
        return details


_TRAINING, _VALIDATION = TaskID(0), TaskID(1)  # rich numbers a bar's tasks in the order in which they are added


class _Bar(Progress):
    """rich's bars with one more line for the numbers: beside the bar they would not fit into 80 columns."""

    details = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.details)


def _make_bar(console: Console) -> _Bar:
    # While NeMo's output goes to its log, rich must not catch sys.stdout and bring it back to the console.
    catch = not run_logging.is_quiet()
    return _Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        console=console,
        redirect_stdout=catch,
        redirect_stderr=catch,
    )


class Pause:
    """Validation and the writing of checkpoints: from the first of them to the next training step.

    ModelCheckpoint runs after all other callbacks, so no hook of ours sees the end of a save.
    """

    def __init__(self) -> None:
        self._began: float | None = None

    def begin(self, now: float) -> None:
        if self._began is None:
            self._began = now

    def end(self, now: float) -> float:
        """Seconds since the beginning; 0 where there was none."""
        seconds = 0.0 if self._began is None else now - self._began
        self._began = None
        return seconds


class StepRate:
    """Seconds per optimizer step over the last minute, pauses left out, and the time left with them put back.

    The first step only starts the clock: it pays for compilation and allocation.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[int, float]] = deque()
        self._paused = 0.0
        self._first_step: int | None = None

    def add(self, step: int, now: float) -> None:
        """step: optimizer steps done; now: seconds on a monotonic clock."""
        if self._samples and self._samples[-1][0] == step:
            return  # gradient accumulation by Lightning: no new step yet
        if self._first_step is None:
            self._first_step, self._paused = step, 0.0
        self._samples.append((step, now - self._paused))
        while len(self._samples) > 2 and self._samples[-1][1] - self._samples[1][1] > WINDOW_SECONDS:
            self._samples.popleft()

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def seconds_per_step(self) -> float | None:
        """None before the second step."""
        if len(self._samples) < 2:
            return None
        (first_step, first), (last_step, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_step - first_step)

    def seconds_left(self, steps: int) -> float | None:
        """Time for `steps` more, with pauses taking the share that they took so far."""
        per_step = self.seconds_per_step()
        if per_step is None or self._first_step is None:
            return None
        return steps * (per_step + self._paused / (self._samples[-1][0] - self._first_step))


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps after which training ends; None where nothing says so."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(batches):
        limits.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return int(min(limits)) if limits else None


def read_metric(trainer: Trainer, name: str) -> float | None:
    """A logged value; waits for the GPU. NaN stays NaN."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def learning_rate(trainer: Trainer) -> float | None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if "lr" in group:
                return float(group["lr"])
    return None


def global_batch_size(trainer: Trainer) -> int | None:
    """The data module's samples per optimizer step, if it says so."""
    return getattr(getattr(trainer, "datamodule", None), "global_batch_size", None)


def count_truncated(batch: Any) -> int:
    """Samples of a micro batch whose text was cut, from the host tensor (B,) of tokens cut from each."""
    cut = batch.get(TRUNCATED_KEY) if isinstance(batch, dict) else None
    return 0 if cut is None else int(torch.count_nonzero(torch.as_tensor(cut)))


def sum_over_data_parallel_ranks(count: int) -> int:
    """A collective over the data-parallel ranks, whose samples differ; tensor-parallel ranks see the same ones."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    group = data_parallel_group()
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    total = torch.tensor(count, device=device)
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def data_parallel_group() -> Any:
    """Megatron's group where Megatron runs, else all ranks."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None or not parallel_state.model_parallel_is_initialized():
        return None
    return parallel_state.get_data_parallel_group()


def format_seconds(seconds: float) -> str:
    """As "42 s", "3 min 20 s" or "5 h 02 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
