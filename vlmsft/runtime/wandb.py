"""Weights & Biases beside the run folder: the rows of metrics.csv, each once also after a resume; offline without a
key, no key in any file."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vlmsft.runtime.metrics_rows import read_metrics
from vlmsft.runtime.provenance import Scrubber
from vlmsft.runtime.wandb_files import WandbLog, has_key, log_files, read_log, sync_command, unsynced_folders

logger = logging.getLogger(__name__)
MOST_CHARACTERS = 128
"""Of a run's id, name and group, and of an artifact's name, at W&B."""
SETTLED_SECONDS = 20.0
"""A file without an end that is older has none to come: W&B's writer writes every 15 s."""
CONFIG_FILES = ("config.yaml", "overrides.yaml", "provenance.json", "diff.patch")


@runtime_checkable
class RowLogger(Protocol):
    """A logger that takes the rows of metrics.csv instead of what Lightning hands it."""

    def expect_rows(self) -> None: ...

    def log_row(self, row: Mapping[str, float]) -> None: ...


class RunLogger(WandbLogger):
    """Lightning's W&B logger with what a vlmsft run needs; `log.wandb` of the config names it.

    project: W&B project
    run_id: unique in the project and the same after a resume, so that a resumed run goes on in its own curve
    run_dir: the run folder; W&B's files lie in run_dir/wandb, the resolved config is read from its config.yaml
    offline: None = offline where neither WANDB_API_KEY nor a login exists; W&B never asks for a key then.
        `wandb sync` uploads such a run later; its command is shown at the end
    checkpoints: what to upload when the training has come to its end, as an artifact of type "model"

    What W&B gets is what metrics.csv gets: the same names, numbers and steps. The optimizer step is a metric, "step",
    and the x axis of all others: W&B's own step counts rows, so that none is refused for coming late. A run that goes
    on from step k sends what metrics.csv has and W&B's files on this machine don't (the last rows before a kill), and
    does not send again what they have: steps after k keep the numbers of their first time.

    The run's config is the resolved config plus "provenance" (code, packages, machine, data, overrides). W&B's own
    record of command line, git diff and console is off: it would hold what the run folder's files leave out.
    """

    def __init__(
        self,
        project: str,
        run_id: str,
        run_dir: str | os.PathLike[str],
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        entity: str | None = None,
        notes: str | None = None,
        offline: bool | None = None,
        checkpoints: Literal["best", "last"] | None = None,
    ):
        import wandb

        self._run_dir, self._run_id = Path(run_dir), shortened(allowed(run_id))
        self._checkpoints = checkpoints
        self._held: dict[int, set[str]] = {}
        self._row_names: set[str] = set()
        self._others: dict[str, float] = {}
        self._expects_rows = self._is_caught_up = False
        # not Lightning's `offline`: it sets WANDB_MODE for the whole process and its children
        mode = "offline" if (not has_key() if offline is None else offline) else "online"
        # pyright takes this module for the package where it doesn't see the environment
        settings = wandb.Settings(  # pyright: ignore[reportAttributeAccessIssue]
            console="off", disable_git=True, save_code=False, x_disable_meta=True
        )
        super().__init__(
            name=shortened(name or run_id),
            save_dir=self._run_dir,
            project=project,
            id=self._run_id,
            group=None if group is None else shortened(group),
            job_type=job_type,
            tags=list(tags),
            entity=entity,
            notes=notes,
            mode=os.environ.get("WANDB_MODE", mode),  # W&B's own switch, e.g. "disabled"
            settings=settings,
        )

    # NeMoLogger overwrites the logger's id and folder with those of its own log folder
    @property
    def version(self) -> str:
        return self._run_id

    @property
    def save_dir(self) -> str:
        return str(self._run_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run; the first use starts it and uploads the config.

        Not Lightning's own: it would make "trainer/global_step", which counts from 0, the x axis.
        """
        if self._experiment is not None:
            return self._experiment
        import wandb

        self._run_dir.mkdir(parents=True, exist_ok=True)
        logs = earlier_logs(self._run_dir, self._run_id)
        self._held = held_names(logs)
        self._wandb_init.update(dir=str(self._run_dir), id=self._run_id, config=run_config(self._run_dir))
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always, wandb warns about it always
        run: Any = wandb.init(**self._wandb_init)  # pyright: ignore[reportAttributeAccessIssue]
        self._experiment = run
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step", step_sync=False)
        rows = [row.get("_step", -1) for log in logs for row in log.rows]
        self._next = max([run.step, *(row + 1 for row in rows)])
        self._log_config()
        # W&B's own lines go to nemo.log with the rest
        logger.info("W&B: %s", run.url or f"offline, in {Path(run.dir).parent}")
        return run

    # --- numbers ------------------------------------------------------------------------------------------------------

    def expect_rows(self) -> None:
        """From now on numbers come with rows."""
        self._expects_rows = True

    @rank_zero_only
    def log_row(self, row: Mapping[str, float]) -> None:
        """A row that was written to metrics.csv, or what was filled into its last one; "step" is among it."""
        _ = self.experiment  # knows what is held
        if not self._is_caught_up:
            self._catch_up(int(row["step"]))
        self._row_names |= row.keys()
        others = {name: value for name, value in self._others.items() if not self._is_of_rows(name)}
        self._others = {}
        self._send({**others, **row})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """What Lightning, a callback or log_table logs.

        Numbers that no row of metrics.csv has go with the next row; tables and pictures go at once.
        """
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        rest = {name: value for name, value in metrics.items() if name not in numbers}
        if self._expects_rows:
            self._others.update(numbers)
        else:  # no MetricsFile among the callbacks; Lightning counts from 0
            rest.update(numbers)
            step = None if step is None else step + 1
        if rest:
            self._send({"step": step, **rest} if step is not None else rest)

    def _is_of_rows(self, name: str) -> bool:
        """Lightning logs a metric of steps and epochs as three."""
        base = name.removesuffix("_step").removesuffix("_epoch")
        return name in self._row_names or base in self._row_names or name in ("global_step", "global_batch_size")

    def _catch_up(self, before: int) -> None:
        """Send what metrics.csv has before this step and W&B's files lack."""
        self._is_caught_up = True
        for row in read_metrics(self._run_dir / "metrics.csv")[0]:
            if row.get("step", before) < before:
                self._row_names |= row.keys()
                self._send(row)

    def _send(self, values: Mapping[str, Any]) -> None:
        run = self.experiment
        held = self._held.get(int(values["step"]), set()) if "step" in values else set()
        new = {name: value for name, value in values.items() if name not in held or name == "step"}
        if new.keys() <= {"step"}:
            return
        self._next = max(self._next, run.step)
        # commit: else the row would wait for the next, and be lost with a kill
        run.log(new, step=self._next, commit=True)
        self._next += 1

    # --- artifacts and the end ----------------------------------------------------------------------------------------

    def _log_config(self) -> None:
        import wandb

        files = [path for name in CONFIG_FILES for path in sorted(self._run_dir.glob(f"resume-*/{name}"))]
        files += [self._run_dir / name for name in CONFIG_FILES if (self._run_dir / name).exists()]
        if files:
            artifact = wandb.Artifact(artifact_name("config", self._run_id), type="config")  # pyright: ignore[reportAttributeAccessIssue]
            for path in files:
                artifact.add_file(str(path), str(path.relative_to(self._run_dir)), policy="immutable")
            self.experiment.log_artifact(artifact)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        self._checkpoint_callback = checkpoint_callback

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is None:
            return
        left = {name: value for name, value in self._others.items() if not self._is_of_rows(name)}
        self._others = {}
        if left:
            self._send(left)
        if status == "success" and self._checkpoints is not None and self._checkpoint_callback is not None:
            self._log_checkpoint(self._checkpoint_callback)
        folders = unsynced_folders(self._run_dir)
        if folders:
            logger.info("W&B: offline; to upload: %s", sync_command(folders))

    def _log_checkpoint(self, callback: ModelCheckpoint) -> None:
        import wandb

        path = callback.best_model_path if self._checkpoints == "best" else callback.last_model_path
        path = path.removesuffix(".ckpt")  # NeMo's callback adds it to the names of its folders
        if not path or not Path(path).is_dir():
            logger.warning("W&B: no %s checkpoint to upload", self._checkpoints)
            return
        artifact = wandb.Artifact(  # pyright: ignore[reportAttributeAccessIssue]
            artifact_name("model", self._run_id), type="model", metadata={"checkpoint": Path(path).name}
        )
        # immutable: else W&B copies a checkpoint of some hundred GB into its own folder first
        artifact.add_dir(path, policy="immutable", skip_cache=True)
        self.experiment.log_artifact(artifact, aliases=[str(self._checkpoints), "latest"])


def allowed(run_id: str) -> str:
    """W&B refuses an id with one of these, and a run's name may hold a slash."""
    return re.sub(r"[/\\#?%:]", "-", run_id)


def artifact_name(kind: str, run_id: str) -> str:
    return shortened(re.sub(r"[^\w.-]", "-", f"{kind}-{run_id}"))


def shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def earlier_logs(run_dir: Path, run_id: str) -> list[WandbLog]:
    """What W&B's files in a run folder hold of earlier starts, in their order."""
    logs = []
    for path in log_files(run_dir / "wandb"):
        try:
            logs.append(settled_log(path))
        except (OSError, ValueError) as error:
            logger.warning("W&B: %s can't be read, and what it holds may be sent again (%s)", path, error)
    return [log for log in logs if log.run_id == run_id]


def settled_log(path: Path) -> WandbLog:
    """What a file holds when nobody writes it any more: W&B's writer outlives a training that was killed."""
    log = read_log(path)
    while log.exit_code is None and time.time() - path.stat().st_mtime < SETTLED_SECONDS:
        time.sleep(0.5)
        log = read_log(path)
    return log


def held_names(logs: Sequence[WandbLog]) -> dict[int, set[str]]:
    """{optimizer step: names that were logged for it}"""
    held: dict[int, set[str]] = {}
    for row in (row for log in logs for row in log.rows):
        if "step" in row:
            held.setdefault(int(row["step"]), set()).update(row)
    return held


def run_config(run_dir: Path) -> dict[str, Any]:
    """The resolved config of a run folder's newest start, with its provenance; {} where neither was written."""
    resumes = [path for path in run_dir.glob("resume-*") if (path / "provenance.json").exists()]
    start = max(resumes, key=lambda path: int(path.name.removeprefix("resume-")), default=run_dir)
    config: dict[str, Any] = {}
    if (start / "config.yaml").exists():
        config = dict(yaml.safe_load((start / "config.yaml").read_text(encoding="utf-8")) or {})
    if (start / "provenance.json").exists():
        config["provenance"] = json.loads((start / "provenance.json").read_text(encoding="utf-8"))
        if (start / "overrides.yaml").exists():
            config["provenance"]["overrides"] = yaml.safe_load((start / "overrides.yaml").read_text(encoding="utf-8"))
    return Scrubber.from_environment().tree(config)
