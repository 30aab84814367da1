"""Runs a recipe: in this process, or through NeMo-Run's executors in others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import nemo_run as run

from vlmsft.runtime.logging import console, quiet


def run_here(recipe: run.Partial, run_dir: str) -> None:
    """Train in this process; NeMo's own output goes to the run folder."""
    with quiet(run_dir):
        run.run(recipe, direct=True)


def work(finetune: Callable[[], Any], run_dir: str) -> None:
    """What a worker started by an executor runs."""
    with quiet(run_dir):
        finetune()


def launch(recipe: run.Partial, run_dir: str, name: str, executor: run.Executor) -> None:
    """Start the recipe through the executor, follow it, and exit with 1 unless it succeeds.

    NeMo-Run reports a failed job as if all were well (its issue 289): the state is asked for here.
    """
    # torchx starts plain `python` and `torchrun`: those of this environment, wherever it is
    executor.env_vars = {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", **executor.env_vars}
    with run.Experiment(name) as experiment:
        experiment.add(run.Partial(work, finetune=recipe, run_dir=run_dir), executor=executor, name="train")
        experiment.run(tail_logs=True)
        states = {task: status["status"] for task, status in experiment.status(return_dict=True).items()}
    failed = {task: state for task, state in states.items() if str(state) != "SUCCEEDED"}
    if failed:
        console().print(f"{failed} in {run_dir}; the experiment's own logs: {experiment._exp_dir}", highlight=False)
        sys.exit(1)
