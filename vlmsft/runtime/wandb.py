"""Weights & Biases beside the run folder: same run after a resume, offline without a key, no key in any file."""

from __future__ import annotations

import json
import logging
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from vlmsft.runtime.provenance import Scrubber

logger = logging.getLogger(__name__)
DEFAULT_HOST = "api.wandb.ai"


class RunLogger(WandbLogger):
    """Lightning's W&B logger with what a vlmsft run needs; `log.wandb` of the config names it.

    project: W&B project
    run_id: unique in the project and the same after a resume, so that a resumed run goes on in its own curve
    run_dir: the run folder; W&B's files lie in run_dir/wandb, the resolved config is read from its config.yaml
    offline: None = offline where neither WANDB_API_KEY nor a login exists; W&B never asks for a key then.
        `wandb sync <run_dir>/wandb/offline-run-*` uploads such a run later.

    The run's config is the resolved config plus "provenance" (code, packages, machine, data). W&B's own record of
    command line, git diff and console is off: it would hold what the run folder's files leave out.
    """

    def __init__(
        self,
        project: str,
        run_id: str,
        run_dir: str | os.PathLike[str],
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        entity: str | None = None,
        notes: str | None = None,
        offline: bool | None = None,
    ):
        import wandb

        self._run_dir, self._run_id = Path(run_dir), run_id
        # not Lightning's `offline`: it sets WANDB_MODE for the whole process and its children
        mode = "offline" if (not has_key() if offline is None else offline) else "online"
        # pyright takes this module for the package where it doesn't see the environment
        settings = wandb.Settings(  # pyright: ignore[reportAttributeAccessIssue]
            console="off", disable_git=True, save_code=False, x_disable_meta=True
        )
        super().__init__(
            name=name or run_id,
            save_dir=self._run_dir,
            project=project,
            id=run_id,
            group=group,
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
        """The wandb run; the first use starts it and uploads the config."""
        if self._experiment is not None:
            return super().experiment
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._wandb_init.update(dir=str(self._run_dir), id=self._run_id, config=run_config(self._run_dir))
        self._wandb_init.pop("anonymous")  # Lightning passes it always, wandb warns about it always
        run = super().experiment
        # W&B's own lines go to nemo.log with the rest
        logger.info("W&B: %s", run.url or f"offline; wandb sync {Path(run.dir).parent} uploads it")
        return run


def run_config(run_dir: Path) -> dict[str, Any]:
    """The resolved config of a run folder, with its provenance; {} where neither was written."""
    config: dict[str, Any] = {}
    if (run_dir / "config.yaml").exists():
        config = dict(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")) or {})
    if (run_dir / "provenance.json").exists():
        config["provenance"] = json.loads((run_dir / "provenance.json").read_text(encoding="utf-8"))
    return Scrubber.from_environment().tree(config)


def has_key() -> bool:
    """Whether W&B can log in without asking: WANDB_API_KEY, an identity token, or `wandb login`'s netrc entry."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", f"https://{DEFAULT_HOST}")).netloc
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            if netrc.netrc(os.path.expanduser(candidate)).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
