"""python -m vlmsft.train key=value ...: fine-tune a model.

-m optim.max_lr=1e-5,2e-5       one run for each value; nothing starts before all are checked (vlmsft.sweeping.launch)
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from vlmsft.cli import command, multirun_job
from vlmsft.errors import USER_ERROR_EXIT_CODE, Problem, UserError
from vlmsft.paths import with_absolute_paths
from vlmsft.runtime.logging import console, quiet, rank_from_environment

if TYPE_CHECKING:
    import nemo_run as run

    from vlmsft.runtime.job import Job


@dataclass(frozen=True)
class Start:
    """A job and all that starting it needs, with nothing left to compose.

    executor: None = this machine, without NeMo-Run's launchers where one process is enough
    is_submitted: the executor hands the job over and doesn't wait for its end
    follow: wait for the end of a submitted job, and give its exit code
    num_processes: on each node
    num_gpus: of a node; 0 for a training on the CPU
    image_folders: of each file or folder of data
    infeasible: why this point of a sweep is not to be started
    """

    job: Job
    executor: run.Config | None
    is_submitted: bool
    follow: bool
    dry_run: bool
    num_processes: int
    num_gpus: int
    max_steps: int
    config_yaml: str
    overrides: list[str]
    image_folders: dict[str, str | None]
    infeasible: list[Problem] = field(default_factory=list)


def end_of_multirun() -> None:
    """The exit code of a multirun, when all its jobs are over."""
    from vlmsft.sweeping.launch import exit_code

    if exit_code():
        sys.exit(exit_code())


@command("train", after_all=end_of_multirun)
def main(cfg: DictConfig) -> Start | None:
    is_job = multirun_job() is not None
    if is_job:
        raise_other_launcher()
    cfg = with_counted_devices(with_absolute_paths(cfg))
    recipe, executor, problems = check(cfg, leave_out_infeasible=is_job)
    problems += environment_problems(cfg) + names_read_as_numbers()
    if problems and rank_from_environment() != 0:
        sys.exit(USER_ERROR_EXIT_CODE)  # rank 0 says it
    if problems:
        raise UserError(problems)
    assert recipe is not None
    start = prepare(cfg, recipe, executor, overrides_of_this_run())
    if not is_job:
        sys.exit(start_one(start))
    from vlmsft.feasibility import infeasible

    return replace(start, infeasible=infeasible(cfg))


def raise_other_launcher() -> None:
    from hydra.core.hydra_config import HydraConfig

    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    if launcher != "nemo_run":
        raise UserError(Problem("hydra/launcher", str(launcher), "nemo_run", "launch=... says where the jobs run"))


def check(
    cfg: DictConfig, leave_out_infeasible: bool = False
) -> tuple[run.Partial | None, run.Config | None, list[Problem]]:
    """The recipe and the executor (None: this process), and everything that is wrong with the config and its data.

    leave_out_infeasible: what vlmsft.feasibility finds is no problem here: a point of a sweep is marked with it
    """
    from vlmsft import checks

    say_checking()
    made = {}
    with tempfile.TemporaryDirectory() as scratch, quiet(scratch):
        find_problems = checks.malformed if leave_out_infeasible else checks.find_problems
        problems = find_problems(cfg, started_world_size())
        # NeMo-Run reads it once, at import: without it, files would go to ~/.nemo_run
        os.environ["NEMORUN_HOME"] = os.path.join(cfg.run_dir, "nemo-run")
        from vlmsft.recipe import finetune_recipe, translate

        for name, translate_part in (("recipe", finetune_recipe), ("launch", lambda cfg: translate(cfg.launch))):
            try:
                made[name] = translate_part(cfg)
            except UserError as error:
                problems += [problem for problem in error.problems if problem not in problems]
    return made.get("recipe"), made.get("launch", {}).get("executor"), problems


@functools.cache
def say_checking() -> None:
    """Once, whatever the number of jobs."""
    if rank_from_environment() == 0:
        console().print("checking configuration and data, importing NeMo ...", style="dim", highlight=False)


def started_world_size() -> int | None:
    """Processes that torchrun or srun started for this command; None where it runs alone."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if name in os.environ and (name == "WORLD_SIZE" or "SLURM_PROCID" in os.environ):
            return int(os.environ[name])
    return None


def with_counted_devices(cfg: DictConfig) -> DictConfig:
    """A config whose trainer.devices is a number where it was auto or -1 and the training runs on this machine.

    Of the processes that torchrun or srun started, since Lightning's auto is one process on a CPU and all GPUs
    otherwise; else of Lightning's own reading.
    """
    from vlmsft.facts import Facts

    facts, started = Facts(cfg), started_world_size()
    if facts["trainer.devices"] not in ("auto", -1, "-1") or not facts.runs_here:
        return cfg
    num_nodes = facts["trainer.num_nodes"]
    if started is None or type(num_nodes) is not int or num_nodes < 1:
        devices = num_processes("auto", facts["trainer.accelerator"])
    else:
        devices = max(started // num_nodes, 1)
    cfg = cfg.copy()
    OmegaConf.update(cfg, "trainer.devices", devices)
    return cfg


def environment_problems(cfg: DictConfig) -> list[Problem]:
    """What is wrong with the machine or with how the command was started."""
    import torch

    from vlmsft.checks import Facts

    facts, world_size = Facts(cfg), started_world_size()
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


def names_read_as_numbers() -> list[Problem]:
    """id=20261129_1, which Hydra reads as the number 202611291: its run would not be found under what was typed."""
    problems = []
    for override in overrides_of_this_run():
        key, _, text = override.partition("=")
        value = OverridesParser.create().parse_override(override).value() if key in ("id", "name") else text
        if type(value) in (int, float, bool) and str(value) != text:
            problems.append(Problem(key, text, f"text; Hydra reads {value!r}", f"Quote it: '{key}=\"{text}\"'"))
    return problems


def overrides_of_this_run() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def prepare(cfg: DictConfig, recipe: run.Partial, executor: run.Config | None, overrides: list[str]) -> Start:
    """Freezes the config: editing YAML afterwards changes nothing of this run."""
    from vlmsft import yaml_text
    from vlmsft.checks import Facts
    from vlmsft.runtime.job import Job, is_local

    cfg = with_absolute_paths(cfg)
    is_submitted = executor is not None and not is_local(executor)
    return Start(
        job=Job(recipe, cfg.run_dir, cfg.name, cfg.id),
        executor=executor,
        is_submitted=is_submitted,
        follow=is_submitted and cfg.launch.follow,
        dry_run=executor is not None and cfg.launch.dry_run,
        num_processes=num_processes(cfg.trainer.devices, cfg.trainer.accelerator),
        num_gpus=num_processes(cfg.trainer.devices, "gpu") if cfg.trainer.accelerator == "gpu" else 0,
        max_steps=cfg.trainer.max_steps,
        config_yaml=yaml_text.dump(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)),
        overrides=overrides,
        image_folders={source.path: source.image_folder for source in Facts(cfg).datasets},
    )


def start_one(start: Start) -> int:
    """Runs the job and gives its exit code."""
    from vlmsft.runtime import job

    if rank_from_environment() == 0:
        keep_record(start)
    executor = start.executor
    if executor is None and start.num_processes > 1 and started_world_size() is None:
        executor = job.torchrun_executor(start.num_processes)
    if executor is not None:
        return job.launch(start.job, executor, dry_run=start.dry_run, follow=start.follow)
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
