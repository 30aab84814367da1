"""An optimising sweeper: tries two learning rates, then the better one's neighbours. Reads what the jobs returned."""

from __future__ import annotations

import json
from pathlib import Path

from hydra.plugins.sweeper import Sweeper


class ToySweeper(Sweeper):
    def __init__(self, **keys_of_the_basic_one) -> None: ...

    def setup(self, *, hydra_context, task_function, config) -> None:
        from hydra.core.plugins import Plugins

        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        tried: dict[str, float] = {}
        self._try(["1.0", "4.0"], arguments, tried)
        best = float(min(tried, key=lambda rate: tried[rate]))
        self._try([str(best - 0.5), str(best + 0.5)], arguments, tried)
        Path("tried.json").write_text(json.dumps(tried))

    def _try(self, rates: list[str], arguments: list[str], tried: dict[str, float]) -> None:
        words = [[*arguments, f"optim.max_lr={rate}"] for rate in rates]
        returns = self.launcher.launch(words, initial_job_idx=len(tried))
        tried.update((rate, job.return_value) for rate, job in zip(rates, returns, strict=True))
