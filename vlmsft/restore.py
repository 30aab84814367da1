"""What a run starts from."""

from __future__ import annotations

from typing import Optional

import nemo_run as run
from nemo import lightning as nl


def restore_config(path: Optional[str]) -> Optional[run.Config[nl.RestoreConfig]]:  # noqa: UP045 (evaluated by recipe.py)
    """The weights of the NeMo checkpoint at `path`; None leaves the fresh random weights."""
    return None if path is None else run.Config(nl.RestoreConfig, path=path)
