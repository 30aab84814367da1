"""What is known of a run, wherever it was read: what tables, plots and the HTML report are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Metric:
    """A number that sums up a run.

    title: of its column, with the unit
    better: which way is better; None where neither is
    """

    title: str
    better: Literal["lower", "higher"] | None


METRICS: Mapping[str, Metric] = {
    "final_val_loss": Metric("val loss", "lower"),
    "best_val_loss": Metric("best val loss", "lower"),
    "final_train_loss": Metric("train loss", "lower"),
    "best_train_loss": Metric("best train loss", "lower"),
    "step": Metric("steps", None),
    "max_lr": Metric("highest LR", None),
    "samples_per_second": Metric("samples/s", "higher"),
    "tokens_per_second": Metric("tokens/s", "higher"),
    "tflops_per_second_per_gpu": Metric("TFLOP/s per GPU", "higher"),
    "mfu": Metric("MFU", "higher"),
    "data_wait_fraction": Metric("waiting for data", "lower"),
    "peak_memory_gib": Metric("peak memory, GiB", "lower"),
    "gpu_hours": Metric("GPU hours", "lower"),
}
"""Those of RunRecord.metrics, in the order of the columns. An evaluation's scores come after them as "<task>/<metric>",
higher is better."""


@dataclass(frozen=True)
class SampleAnswer:
    """An answer to a validation question.

    step: optimizer steps done when it was asked
    number: the question's; the same question has the same number in each run of the same data
    pictures: absolute paths; a missing file is shown as missing
    """

    step: int
    number: int
    question: str
    reference: str
    answer: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What vlmsft.evaluate left in a run's folder.

    manifest: what the scores depend on, as vlmsft.evaluation.manifest.of_model gives it
    scores: {task: {metric: score}}; None = all answers are without one
    """

    id: str
    manifest: dict[str, Any]
    scores: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class RunRecord:
    """A run, as a local folder, a W&B offline folder or the W&B API gives it.

    location: the run folder, absolute, or W&B's path entity/project/id
    state: running, done, failed, cancelled, infeasible, pending or unknown
    command: what to type to do this run again, shell-quoted; "" where it isn't known
    working_directory: where `command` was typed; "" where it isn't known
    commit: of the code; "" where it isn't known
    config: flat, {"optim.max_lr": 1e-3}
    metrics: METRICS' names, and "<task>/<metric>" of evaluations; None or no key = not measured. NaN is kept
    curves: reads all rows, columns as vlmsft.runtime.metrics.COLUMNS whatever the source; empty where there are none
    answers: of the last validation
    evaluations: oldest first; which of their scores are among `metrics` says vlmsft.report.scores
    notes: what could not be read, e.g. "metrics.csv: last row cut off"
    """

    name: str
    id: str
    location: str
    state: str
    config: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    curves: Callable[[], pandas.DataFrame]
    command: str = ""
    working_directory: str = ""
    commit: str = ""
    sweep_id: str | None = None
    answers: tuple[SampleAnswer, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Short and different for each run."""
        return f"{self.name}/{self.id}"


def metric(name: str) -> Metric:
    """Of a RunRecord.metrics key."""
    return METRICS[name] if name in METRICS else Metric(name, "higher")
