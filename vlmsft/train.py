"""python -m vlmsft.train key=value ...: fine-tune a model.

-m optim.max_lr=1e-5,2e-5       one run for each value, one after the other; nothing starts before all are checked
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from vlmsft.cli import command, multirun_job
from vlmsft.errors import USER_ERROR_EXIT_CODE, Problem, UserError
from vlmsft.runtime.logging import console, quiet, rank_from_environment

if TYPE_CHECKING:
    import nemo_run as run

    from vlmsft.runtime.job import Job

INTERRUPTED = (130, 143)
"""Exit codes of a job that Ctrl-C or SIGTERM ended: the jobs after it are not started."""


@dataclass(frozen=True)
class Start:
    """A job and all that starting it needs, with nothing left to compose.

    executor: None = this machine, without NeMo-Run's launchers where one process is enough
    is_submitted: the executor hands the job over and doesn't wait for its end
    num_processes: on each node
    image_folders: of each file or folder of data
    """

    job: Job
    executor: run.Config | None
    is_submitted: bool
    dry_run: bool
    num_processes: int
    config_yaml: str
    overrides: list[str]
    image_folders: dict[str, str | None]


_multirun: list[Start] = []


def start_all() -> None:
    """The jobs of a multirun, one after the other; a failed one doesn't keep the others from running."""
    starts = _multirun.copy()
    _multirun.clear()
    raise_shared_run_folders(starts)
    codes: dict[int, int] = {}
    for number, start in enumerate(starts):
        text = f"\njob {number} ({number + 1} of {len(starts)}): {' '.join(start.overrides)}"
        console().print(text, style="bold", markup=False, highlight=False)
        codes[number] = start_one(start, in_child=True)
        if codes[number] in INTERRUPTED:
            break
    if len(starts) > 1:
        console().print()
        for number, start in enumerate(starts):
            console().print(f"{outcome(start, codes.get(number))}: {start.job.run_dir}", markup=False, highlight=False)
    failed = [code for code in codes.values() if code]
    if failed:
        sys.exit(failed[-1] if failed[-1] in INTERRUPTED else 1)


def raise_shared_run_folders(starts: Sequence[Start]) -> None:
    """Raises UserError where jobs have the same run folder: the later one would go on from the earlier's checkpoint."""
    jobs: dict[str, list[int]] = {}
    for number, start in enumerate(starts):
        jobs.setdefault(start.job.run_dir, []).append(number)
    remedy = "Leave id out, or let id or name differ from job to job, e.g. 'id=a-${hydra:job.num}'"
    problems = [
        Problem("run_dir", f"{run_dir} in jobs {', '.join(map(str, numbers))}", "a run folder for each job", remedy)
        for run_dir, numbers in jobs.items()
        if len(numbers) > 1
    ]
    if problems:
        raise UserError(problems)


def outcome(start: Start, code: int | None) -> str:
    """What became of a job, in a word or two.

    code: its exit code; None = never started
    """
    if code is None:
        return "not started"
    if code in INTERRUPTED:
        return "interrupted"
    if code != 0:
        return f"failed with exit code {code}"
    if start.dry_run:
        return "dry run"
    return "submitted" if start.is_submitted else "done"


@command("train", after_all=start_all)
def main(cfg: DictConfig) -> None:
    recipe, executor, problems = check(cfg)
    problems += environment_problems(cfg)
    if problems and rank_from_environment() != 0:
        sys.exit(USER_ERROR_EXIT_CODE)  # rank 0 says it
    if problems:
        raise UserError(problems)
    assert recipe is not None
    job = multirun_job()
    start = prepare(cfg, recipe, executor, overrides_of_this_run())
    if job is None:
        sys.exit(start_one(start, in_child=False))
    _multirun.append(start)


def check(cfg: DictConfig) -> tuple[run.Partial | None, run.Config | None, list[Problem]]:
    """The recipe and the executor (None: this process), and everything that is wrong with the config and its data."""
    from vlmsft import checks

    if rank_from_environment() == 0:
        console().print("checking configuration and data, importing NeMo ...", style="dim", highlight=False)
    made = {}
    with tempfile.TemporaryDirectory() as scratch, quiet(scratch):
        problems = checks.find_problems(cfg, started_world_size())
        # NeMo-Run reads it once, at import: without it, files would go to ~/.nemo_run
        os.environ["NEMORUN_HOME"] = os.path.join(cfg.run_dir, "nemo_run")
        from vlmsft.recipe import finetune_recipe, translate

        for name, translate_part in (("recipe", finetune_recipe), ("launch", lambda cfg: translate(cfg.launch))):
            try:
                made[name] = translate_part(cfg)
            except UserError as error:
                problems += [problem for problem in error.problems if problem not in problems]
    return made.get("recipe"), made.get("launch", {}).get("executor"), problems


def started_world_size() -> int | None:
    """Processes that torchrun or srun started for this command; None where it runs alone."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if name in os.environ and (name == "WORLD_SIZE" or "SLURM_PROCID" in os.environ):
            return int(os.environ[name])
    return None


def environment_problems(cfg: DictConfig) -> list[Problem]:
    """What is wrong with the machine or with how the command was started."""
    import torch

    from vlmsft.checks import Facts

    facts, world_size = Facts(cfg, None), started_world_size()
    problems = []
    if world_size is not None and world_size > 1 and multirun_job() is not None:
        remedy = "python -m vlmsft.train -m launch=torchrun ..."
        problems.append(Problem("-m", f"a multirun in each of {world_size} processes", "one process", remedy))
    if facts["launch.executor"] is not None:
        if world_size is not None and world_size > 1:
            expected = "launch=local below torchrun or srun, which started the processes already"
            problems.append(Problem("launch.executor", "an executor", expected))
        return problems
    if facts["launch.dry_run"]:
        remedy = "vlmsft plan shows what would run"
        problems.append(Problem("launch.dry_run", "true", "false with launch=local, which submits nothing", remedy))
    if world_size is None and (facts["trainer.num_nodes"] or 1) != 1:
        remedy = "launch=slurm, or start it below torchrun or srun on each node"
        problems.append(Problem("trainer.num_nodes", str(facts["trainer.num_nodes"]), "1 with launch=local", remedy))
    if facts["trainer.accelerator"] == "gpu":
        wanted, there = num_processes(facts["trainer.devices"], "gpu"), torch.cuda.device_count()
        if there == 0 or wanted > there:
            remedy = "vlmsft plan looks at a configuration without GPUs, experiment=demo trains on a CPU"
            problems.append(
                Problem("trainer.devices", f"{wanted} GPUs", f"at most the {there} of this machine", remedy)
            )
    return problems


def num_processes(devices: int | str | Sequence[int] | None, accelerator: str | None) -> int:
    """Processes of a node: trainer.devices as Lightning reads it."""
    if isinstance(devices, int) and devices >= 0:
        return devices
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    import torch

    return max(torch.cuda.device_count(), 1) if accelerator == "gpu" else 1


def overrides_of_this_run() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def prepare(cfg: DictConfig, recipe: run.Partial, executor: run.Config | None, overrides: list[str]) -> Start:
    """Freezes the config: editing YAML afterwards changes nothing of this run."""
    from vlmsft.checks import Facts
    from vlmsft.paths import with_absolute_paths
    from vlmsft.runtime.job import Job, is_local

    cfg = with_absolute_paths(cfg)
    return Start(
        job=Job(recipe, cfg.run_dir, cfg.name, cfg.id),
        executor=executor,
        is_submitted=executor is not None and not is_local(executor),
        dry_run=executor is not None and cfg.launch.dry_run,
        num_processes=num_processes(cfg.trainer.devices, cfg.trainer.accelerator),
        config_yaml=OmegaConf.to_yaml(cfg, resolve=True),
        overrides=overrides,
        image_folders={source.path: source.image_folder for source in Facts(cfg, None).datasets},
    )


def start_one(start: Start, in_child: bool) -> int:
    """Runs the job and gives its exit code.

    in_child: not in this process, so that another job can follow
    """
    from vlmsft.runtime import job

    if rank_from_environment() == 0:
        keep_record(start)
    executor = start.executor
    if executor is None and start.num_processes > 1 and started_world_size() is None:
        executor = job.torchrun_executor(start.num_processes)
    if executor is not None:
        return job.launch(start.job, executor, dry_run=start.dry_run)
    if in_child:
        return job.start_child(start.job)
    job.run_here(start.job)
    return 0


def keep_record(start: Start) -> None:
    """The run folder with the resolved config, the state of the code and the fingerprint of the data."""
    from vlmsft.runtime.provenance import write_run_folder

    folder = write_run_folder(
        start.job.run_dir,
        start.config_yaml,
        overrides=start.overrides,
        data_files=list(start.image_folders),
        image_folder=start.image_folders,
    )
    for key, (old, new) in folder.config_changes.items():
        console().print(f"continuing with {key}: {old} -> {new}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
