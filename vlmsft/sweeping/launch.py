"""A Hydra multirun as a sweep: composed, checked and written into the ledger as a whole before the first job starts.

The command is called for each job, and gives back what to start (vlmsft.train.Start) instead of starting it; a command
that gives back nothing (vlmsft.plan) has done its work in this process, as with Hydra's own launcher.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from vlmsft import cli, yaml_text
from vlmsft.config_files import absolute_path
from vlmsft.errors import Problem, UserError
from vlmsft.sweeping.compose import SweepComposer, interpolations_parsed_once
from vlmsft.sweeping.identity import has_own_id, identity_of, sweep_id_of
from vlmsft.sweeping.ledger import FILE, JobRow, Ledger
from vlmsft.sweeping.objective import MODES
from vlmsft.sweeping.schedule import Interrupted, Options, write_options

if TYPE_CHECKING:
    from vlmsft.train import Start

SWEEPS_DIR = "runs/sweeps"
_exit_code = 0


def exit_code() -> int:
    """Of the multirun that has ended: 1 when a job has failed or could not be finished."""
    return _exit_code


@dataclass
class Composed:
    """A job of a multirun. num: its number in the ledger, given when all jobs of its batch are known"""

    index: int
    overrides: list[str]
    cfg: DictConfig
    hydra: DictConfig
    identity: str
    num: int = -1
    start: Start | None = None


class Multirun:
    """All batches of one multirun, which are one sweep.

    keys: of conf/hydra/launcher/nemo_run.yaml
    """

    def __init__(self, context: HydraContext, task: TaskFunction, config: DictConfig, keys: dict[str, Any]):
        global _exit_code
        _exit_code = self._worst = 0
        self._task, self._config, self._keys = task, config, keys
        self._composer = SweepComposer.install(context.config_loader)
        self._folder: Path | None = None
        raise_wrong_keys(keys)

    def launch(self, overrides: list[list[str]], first_index: int) -> list[JobReturn]:
        setup_globals()
        varying = self._varying(overrides)
        with interpolations_parsed_once():
            jobs = [self._compose(first_index + number, words) for number, words in enumerate(overrides)]
            ledger_jobs = self._number(jobs)
            for job, varies in zip(jobs, varying, strict=True):
                self._place(job, varies)
                with self._as_hydra_job(job):
                    job.start = self._task(job.cfg)  # vlmsft.cli keeps a UserError, to be said with the others'
        cli.raise_multirun_problems()
        firsts = first_of_each(jobs, varying)
        starts = {job.num: job.start for job, _ in firsts if job.start is not None}
        if not starts:
            return [_returned(job, None) for job in jobs]
        raise_shared_run_folders(starts)
        assert self._folder is not None
        ledger = Ledger(self._folder, create=True)
        self._keep_multirun_yaml(ledger)
        self._write(ledger, firsts, ledger_jobs)
        rows = self._run(ledger, starts)
        return [self._outcome(job, rows.get(job.num)) for job in jobs]

    # -- composing

    def _compose(self, index: int, overrides: list[str]) -> Composed:
        cfg = self._composer.take(self._config, overrides)
        with open_dict(cfg):
            cfg.hydra.job.id = str(index)
            cfg.hydra.job.num = index
        with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.output_dir = os.path.abspath(cfg.hydra.sweep.dir)
        hydra = OmegaConf.masked_copy(cfg, ["hydra"])
        HydraConfig.instance().set_config(cfg)
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        job = Composed(index, overrides, cfg, hydra, "")
        with self._as_hydra_job(job):
            job.identity = identity_of(cfg)
        return job

    @contextmanager
    def _as_hydra_job(self, job: Composed) -> Iterator[None]:
        """${hydra:...} is this job's."""
        before = HydraConfig.instance().cfg
        HydraConfig.instance().cfg = job.hydra  # type: ignore[assignment]
        try:
            yield
        finally:
            HydraConfig.instance().cfg = before

    def _varying(self, overrides: list[list[str]]) -> list[list[str]]:
        """The overrides of each job that not all have; of a lone one, those that weren't typed as they are."""
        typed = set(self._config.hydra.overrides.task)
        common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else typed
        return [[word for word in words if word not in common | typed] for words in overrides]

    def _number(self, jobs: list[Composed]) -> dict[int, JobRow]:
        """Gives each job its number: the one that it has in the ledger, if it is there. Returns what the ledger has."""
        if self._folder is None:
            chosen = jobs[0].cfg.sweep.id
            if chosen is not None and not re.fullmatch(r"[\w.-]+", str(chosen)):
                raise UserError(
                    Problem("sweep.id", repr(chosen), "letters, digits, '_', '-' and '.': it names a folder")
                )
            id = str(chosen) if chosen is not None else sweep_id_of((job.identity, str(job.cfg.name)) for job in jobs)
            self._folder = Path(absolute_path(SWEEPS_DIR), id)
        known = Ledger(self._folder).jobs() if (self._folder / FILE).is_file() else []
        numbers = {row.identity: row.num for row in known}
        for job in jobs:
            job.num = numbers.setdefault(job.identity, len(numbers))
        return {row.num: row for row in known}

    def _place(self, job: Composed, varies: list[str]) -> None:
        assert self._folder is not None
        with read_write(job.cfg), open_dict(job.cfg):
            job.cfg.sweep.id, job.cfg.sweep.num = self._folder.name, job.num
            job.cfg.sweep.varies = " ".join(varies)
            if not has_own_id(job.cfg):
                job.cfg.id = f"{self._folder.name}-{job.num}"

    # -- writing

    def _write(self, ledger: Ledger, jobs: list[tuple[Composed, list[str]]], known: dict[int, JobRow]) -> None:
        """jobs: each with what varies"""
        from vlmsft.runtime.provenance import Scrubber

        scrubber = Scrubber.from_environment()
        rows = []
        for job, varies in jobs:
            row = known.get(job.num)
            if job.start is not None and (row is None or row.state not in ("done", "running", "failed")):
                shown = [scrubber.override(word) for word in varies]
                rows.append(row_of(job.num, job.identity, shown, job.start, self._keys["gpus_per_job"]))
                if not job.start.infeasible:
                    freeze(job.start)
        ledger.add(rows)
        names = ("max_parallel", "on_failure", "objective", "objective_mode")
        write_options(ledger, Options(**{name: self._keys[name] for name in names}))
        command = [scrubber.override(word) for word in sys.argv]
        ledger.note(command=command, directory=os.getcwd(), launched=time.time())

    def _keep_multirun_yaml(self, ledger: Ledger) -> None:
        """Hydra's sweeper has written the config, with whatever was typed, into a folder of its own."""
        from vlmsft.runtime.provenance import Scrubber

        folder = Path(self._config.hydra.sweep.dir)
        written = folder / "multirun.yaml"
        if written.is_file():
            tree = Scrubber.from_environment().tree(yaml_text.load(written.read_text(encoding="utf-8")))
            (ledger.folder / "multirun.yaml").write_text(yaml_text.dump(tree), encoding="utf-8")
            written.unlink()
            with suppress(OSError):  # not empty
                folder.rmdir()
                folder.parent.rmdir()

    # -- running

    def _run(self, ledger: Ledger, starts: dict[int, Start]) -> dict[int, JobRow]:
        from vlmsft.sweeping import show

        global _exit_code
        if all(start.infeasible for start in starts.values()):
            show.say_end(ledger, sorted(starts))
        elif self._keys["dryrun"] or any(start.dry_run for start in starts.values()):
            show.dry_run(ledger, sorted(starts))
        elif self._keys["detach"]:
            show.detach(ledger)
        else:
            try:
                self._worst = max(self._worst, show.run_and_show(ledger, sorted(starts)))
            except Interrupted as interrupted:
                sys.exit(128 + interrupted.number)
        rows = ledger.jobs()
        _exit_code = 1 if all(row.state == "infeasible" for row in rows) else self._worst
        return {row.num: row for row in rows}

    def _outcome(self, job: Composed, row: JobRow | None) -> JobReturn:
        returned = _returned(job, row.objective if row is not None else None)
        if row is not None and row.state == "failed" and self._keys["on_failure"] == "stop":
            returned.status, returned.return_value = JobStatus.FAILED, SystemExit(1)
        elif row is not None and row.state in ("failed", "infeasible"):
            returned.return_value = float("nan")  # an optimising sweeper takes it for a failed trial
        return returned


def _returned(job: Composed, value: float | None) -> JobReturn:
    returned = JobReturn(overrides=job.overrides, cfg=job.cfg, hydra_cfg=job.hydra, working_dir=os.getcwd())
    returned.status, returned.return_value = JobStatus.COMPLETED, value
    return returned


def raise_wrong_keys(keys: dict[str, Any]) -> None:
    """Raises UserError with each of the launcher's keys whose value isn't one."""
    problems = []
    for name, least in (("max_parallel", 1), ("gpus_per_job", 0)):
        value = keys[name]
        if value is not None and (type(value) is not int or value < least):
            problems.append((name, value, f"null or a whole number from {least} on"))
    for name, allowed in (("on_failure", ("continue", "stop")), ("objective_mode", tuple(MODES))):
        if keys[name] not in allowed:
            problems.append((name, keys[name], f"one of {', '.join(allowed)}"))
    for name in ("detach", "dryrun"):
        if not isinstance(keys[name], bool):
            problems.append((name, keys[name], "true or false"))
    if not isinstance(keys["objective"], str):
        problems.append(("objective", keys["objective"], "a column of metrics.csv"))
    if problems:
        raise UserError(Problem(f"hydra.launcher.{name}", repr(value), expected) for name, value, expected in problems)


def first_of_each(jobs: Sequence[Composed], varying: Sequence[list[str]]) -> list[tuple[Composed, list[str]]]:
    """Jobs with what varies, without those that train what an earlier one of the same batch does, which are named: an
    optimising sweeper may well suggest a point twice, a user may have varied only what changes no result."""
    from vlmsft.sweeping.show import say

    firsts: dict[int, tuple[Composed, list[str]]] = {}
    for job, varies in zip(jobs, varying, strict=True):
        first, its = firsts.setdefault(job.num, (job, varies))
        if first is not job:
            say(
                f"{' '.join(varies) or 'a job'} trains what {' '.join(its) or 'another job'} does, and isn't run "
                "beside it: they differ at most in keys that change no result. To run both, give each an id"
            )
    return list(firsts.values())


def raise_shared_run_folders(starts: dict[int, Start]) -> None:
    """Raises UserError where jobs have the same run folder: the later one would go on from the earlier's checkpoint."""
    jobs: dict[str, list[int]] = {}
    for num, start in starts.items():
        jobs.setdefault(start.job.run_dir, []).append(num)
    remedy = "Leave id out, or let id or name differ from job to job, e.g. 'id=a-${hydra:job.num}'"
    problems = [
        Problem("run_dir", f"{run_dir} in jobs {', '.join(map(str, nums))}", "a run folder for each job", remedy)
        for run_dir, nums in jobs.items()
        if len(nums) > 1
    ]
    if problems:
        raise UserError(problems)


def row_of(num: int, identity: str, overrides: list[str], start: Start, gpus_per_job: int | None) -> JobRow:
    """A job of the ledger, frozen: nothing of it is composed again.

    overrides: what varies, without secrets
    """
    from vlmsft.runtime.job import torchrun_executor
    from vlmsft.runtime.provenance import Scrubber
    from vlmsft.sweeping.experiment import frozen, is_here

    scrubber = Scrubber.from_environment()
    executor = start.executor
    if executor is None and start.num_processes > 1:
        executor = torchrun_executor(start.num_processes)
    record = {
        "config_yaml": yaml_text.dump(scrubber.tree(yaml_text.load(start.config_yaml))),
        "overrides": [scrubber.override(word) for word in start.overrides],
        "image_folders": start.image_folders,
    }
    return JobRow(
        num=num,
        identity=identity,
        overrides=overrides,
        run_dir=start.job.run_dir,
        state="infeasible" if start.infeasible else "pending",
        reason="; ".join(map(str, start.infeasible)),
        command=["python", "-m", "vlmsft.sweeping.worker", start.job.run_dir],
        executor=frozen(executor),
        is_local=is_here(executor),
        num_gpus=start.num_gpus if gpus_per_job is None or start.num_gpus == 0 else gpus_per_job,
        max_steps=start.max_steps,
        record=record,
    )


def freeze(start: Start) -> None:
    """Writes the recipe into the run folder, where the worker reads it."""
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from vlmsft.runtime.job import RECIPE_FILE

    path = Path(start.job.run_dir, RECIPE_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(ZlibJSONSerializer().serialize(start.job.recipe), encoding="utf-8")
    partial.replace(path)
