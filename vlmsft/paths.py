"""Paths of a config as seen from the folder the command was typed in.

A run may go on in another folder (a Slurm job's, NeMo-Run's, a later continuation's), so what is translated and
recorded names files absolutely. The composed config stays as it was typed. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmsft.config_files import absolute_path

DATASETS = ("data.train_path", "data.validation_path", "data.path")
"""Keys that name datasets, in one of the forms of vlmsft.data.sources."""
PATHS = ("restore_from", "processor", "data.processor", "data.image_folder", *DATASETS)
"""Keys of the files and folders that a user names. An interpolation to one of them follows it."""


def with_absolute_paths(cfg: DictConfig) -> DictConfig:
    """A copy of the config with PATHS absolute and `~` expanded; null, URLs and hub ids stay as they are.

    Where all are absolute already, it is the config itself.
    """
    given = cfg
    for key in PATHS:
        try:
            value = OmegaConf.select(cfg, key, throw_on_missing=True)
        except OmegaConfBaseException:
            continue  # not set: named where it is needed
        if key.endswith("processor") and isinstance(value, str) and not is_local(value):
            continue  # a hub id
        absolute = _absolute(value)
        if absolute != value:
            cfg = copy.deepcopy(cfg) if cfg is given else cfg
            OmegaConf.update(cfg, key, absolute, merge=False)
    return cfg


def _absolute(value: Any) -> Any:
    """A path, or a list or mapping that holds paths (and weights), with these absolute."""
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, str):
        return absolute_path(value) if value and "://" not in value else value
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    return {key: _absolute(item) for key, item in value.items()} if isinstance(value, dict) else value


def is_local(processor: str) -> bool:
    """Whether a processor's name is a folder's rather than a hub id (`name` or `owner/name`)."""
    return processor.startswith(("/", "./", "../", "~")) or processor.count("/") > 1 or Path(processor).is_dir()
