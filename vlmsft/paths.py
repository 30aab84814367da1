"""Paths of a config as seen from the folder the command was typed in.

A run may go on in another folder (a Slurm job's, NeMo-Run's, a later continuation's), so what is translated and
recorded names files absolutely. The composed config stays as it was typed. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import copy
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmsft.config_files import absolute_path

PATHS = ("restore_from", "processor", "data.processor", "data.train_path", "data.validation_path", "data.image_folder")
"""Keys of the files and folders that a user names. An interpolation to one of them follows it."""


def with_absolute_paths(cfg: DictConfig) -> DictConfig:
    """A copy of the config with PATHS absolute and `~` expanded; null, URLs and hub ids stay as they are."""
    cfg = copy.deepcopy(cfg)
    for key in PATHS:
        try:
            value = OmegaConf.select(cfg, key, throw_on_missing=True)
        except OmegaConfBaseException:
            continue  # not set: named where it is needed
        is_hub_id = key.endswith("processor") and isinstance(value, str) and not is_local(value)
        if isinstance(value, str) and value and "://" not in value and not is_hub_id:
            absolute = absolute_path(value)
            if absolute != value:
                OmegaConf.update(cfg, key, absolute)
    return cfg


def is_local(processor: str) -> bool:
    """Whether a processor's name is a folder's rather than a hub id (`name` or `owner/name`)."""
    return processor.startswith(("/", "./", "../", "~")) or processor.count("/") > 1 or Path(processor).is_dir()
