"""hydra/launcher=nemo_run: a multirun becomes one NeMo-Run Experiment (vlmsft.sweeping.launch).

Imported by every Hydra program of the environment: keep it light.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class NemoRunLauncher(Launcher):
    """Its keys stand in conf/hydra/launcher/nemo_run.yaml."""

    def __init__(self, **keys: Any):
        self._keys = keys
        self._sweep: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from vlmsft.sweeping.launch import Multirun

        self._sweep = Multirun(hydra_context, task_function, config, self._keys)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self._sweep.launch([list(overrides) for overrides in job_overrides], initial_job_idx)
