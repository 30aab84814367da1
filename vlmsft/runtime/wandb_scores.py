"""An evaluation's scores, added to the W&B run of the training that made the model. Imports neither torch nor NeMo."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmsft.runtime.wandb_files import SCORES, has_key, log_files, read_log


def log_scores(run_dir: str | os.PathLike[str], scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bool:
    """Logs "evaluation/<task>/<metric>" for each score; whether the run folder has a W&B run to log to.

    scores: {task: {metric: {"score": ..., ...}}}, as runs/<name>/<id>/evaluation/*.json has them; None is left out

    Goes where has_key says, as the training did; offline it makes one more folder for `wandb sync`.
    """
    logs = [log for path in log_files(Path(run_dir) / "wandb") if (log := read_log(path)).run_id]
    numbers = {
        f"{SCORES}{task}/{metric}": entry["score"]
        for task, metrics in scores.items()
        for metric, entry in metrics.items()
        if entry["score"] is not None
    }
    if not logs or not numbers:
        return bool(logs)
    import wandb

    last = logs[-1]
    rows = [row.get("_step", -1) for log in logs for row in log.rows]
    mode: Any = os.environ.get("WANDB_MODE", "online" if has_key() else "offline")
    # pyright takes this folder's wandb.py for the package where it doesn't see the environment
    run: Any = wandb.init(  # pyright: ignore[reportAttributeAccessIssue]
        project=last.project,
        entity=last.entity or None,
        id=last.run_id,
        resume="allow",
        dir=str(run_dir),
        name=last.name,
        group=last.group,
        job_type=last.job_type,
        tags=last.tags,
        config={key: value for key, value in last.config.items() if key != "_wandb"},
        mode=mode,
        settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True),  # pyright: ignore[reportAttributeAccessIssue]
    )
    run.log(numbers, step=max([run.step, *(row + 1 for row in rows)]), commit=True)
    run.finish()
    return True
