"""python -m vlmsft.plan key=value ...: what vlmsft.train would run with the same overrides, without starting it.

-m optim.max_lr=1e-5,2e-5, or sweeps=...: the sweep as a table, each job with what varies, whether it can run, memory
and time. That looks at configs and data only: without NeMo, whose arguments' types are checked at the start.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vlmsft.cli import command, multirun_job
from vlmsft.errors import UserError
from vlmsft.mllama.sizes import GIB, tokens_per_step

if TYPE_CHECKING:
    from vlmsft.facts import Facts
    from vlmsft.planning import JobPlan


_jobs: list[JobPlan] = []


def main() -> None:
    """The command. Nothing of a sweep is written down: Hydra's folder of a multirun is a passing one."""
    _jobs.clear()
    arguments = sys.argv
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv = _with_override(arguments, f"hydra.sweep.dir={scratch}")
        try:
            plan()
        finally:
            sys.argv = arguments
            if _jobs:
                from vlmsft.planning import show
                from vlmsft.runtime.logging import console

                show(_jobs, console())


def _with_override(arguments: list[str], override: str) -> list[str]:
    """argparse takes overrides from one place only: the new one stands before the first."""
    first = next((place for place, word in enumerate(arguments) if place and "=" in word), len(arguments))
    return [*arguments[:first], override, *arguments[first:]]


@command("train")
def plan(cfg: DictConfig) -> None:
    if multirun_job() is None:
        plan_one(cfg)
    else:
        plan_of_sweep(cfg)


def plan_of_sweep(cfg: DictConfig) -> None:
    """Keeps the job for the table. Raises UserError with what is wrong whatever else varies."""
    from vlmsft.checks import malformed
    from vlmsft.planning import plan_job
    from vlmsft.runtime.logging import quiet

    job = plan_job(cfg, cfg.sweep.varies or "")
    with tempfile.TemporaryDirectory() as scratch, quiet(scratch):
        problems = malformed(cfg)
    _jobs.append(replace(job, problems=[*problems, *job.problems]))
    if problems:
        raise UserError(problems)


def plan_one(cfg: DictConfig) -> None:
    """Recipe and summary, and what is wrong."""
    from vlmsft.runtime.logging import console
    from vlmsft.train import check

    recipe, _, problems = check(cfg)  # imports NeMo and keeps it quiet: what imports torch comes after it
    if recipe is not None:
        console().print(f"{written_out(recipe)}\n", markup=False, highlight=False, soft_wrap=True)
    if can_be_counted(cfg):
        from vlmsft.runtime.summary import show

        show(facts(cfg), console())
    if problems:
        raise UserError(problems)


def written_out(recipe: Any) -> str:
    """Each class and value that the recipe sets, one a line; what it leaves to NeMo's defaults is left out."""
    import fiddle as fdl
    from fiddle import daglish

    lines, said = [], set()
    for value, path in daglish.iterate(recipe, memoized=False):
        name = daglish.path_str(path).lstrip(".")
        if any(name.startswith(f"{parent}[") for parent in said):
            continue
        if isinstance(value, fdl.Buildable):
            target = fdl.get_callable(value)
            lines.append(f"{name or 'run'}: {target.__module__}.{target.__qualname__}")
        elif not isinstance(value, (list, tuple)) or not any(isinstance(item, fdl.Buildable) for item in value):
            lines.append(f"{name} = {value!r}")
            said.add(name)
    return "\n".join(lines)


def can_be_counted(cfg: DictConfig) -> bool:
    """Whether all that the summary is computed from is there and fits, whatever else is wrong."""
    from vlmsft.facts import Facts
    from vlmsft.feasibility import sizes_are_known

    values = Facts(cfg)
    steps = values.whole("trainer.max_steps")
    return steps is not None and steps[0] >= 1 and bool(values.num_microbatches) and sizes_are_known(values)


def facts(cfg: DictConfig) -> Any:
    """The summary (RunFacts) of a config that `can_be_counted`."""
    from vlmsft import estimates
    from vlmsft.facts import Facts, shapes
    from vlmsft.runtime.summary import RunFacts

    values = Facts(cfg)
    known = shapes(values)
    assert known is not None and values.world_size is not None and values.data_parallel_size is not None
    on_cpu = values["trainer.accelerator"] == "cpu"
    return RunFacts(
        model=str(values["model_name"]),
        parameters=estimates.parameters(values),
        precision=str(values["precision"]),
        tensor_model_parallel_size=values["strategy.tensor_model_parallel_size"],
        data_parallel_size=values.data_parallel_size,
        device="the CPU" if on_cpu else f"{values.world_size} GPUs",
        micro_batch_size=values["data.micro_batch_size"],
        global_batch_size=values["data.global_batch_size"],
        tokens_per_step=tokens_per_step(
            known[1],
            global_batch_size=values["data.global_batch_size"],
            text_tokens=values["data.decoder_seq_length"],
        ),
        num_train_samples=num_samples(values),
        max_steps=values["trainer.max_steps"],
        val_check_interval=values["trainer.val_check_interval"],
        memory_gib_per_gpu=None if on_cpu else estimates.memory(values).peak / GIB,
        run_dir=values["run_dir"],
    )


def num_samples(facts: Facts) -> int | None:
    """Training samples of the datasets that the config names; None where one can't be read."""
    from vlmsft.data.energon_shards import ShardFolder
    from vlmsft.data.records import RecordFile

    try:
        if facts.reads_shards:
            sizes = [len(ShardFolder.open(source.path, "train")) for source in facts.sources("data.path")]
        else:
            sizes = [len(RecordFile(source.path)) for source in facts.sources("data.train_path")]
    except UserError:
        return None
    return sum(sizes) if sizes else None


if __name__ == "__main__":
    main()
