"""Which jobs are the same: a hash of all that changes a training's result. Imports neither torch nor NeMo."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vlmsft.paths import with_absolute_paths

NOT_IN_IDENTITY = (
    "id",  # unless the user gave it: see identity_of
    "name",
    "run_dir",
    "log",
    "launch",
    "sweep",
    "plan",
    "gpu_memory_gib",
    "experiment",  # a choice of other keys, which are all here
    "sweeps",
    "trainer.callbacks.progress",
    "trainer.callbacks.throughput",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
)
"""Keys whose values don't change what is learned; with all that is below them."""
PLACEHOLDER = "<of the run>"
ID_LENGTH = 8


def has_own_id(cfg: DictConfig) -> bool:
    """Whether the user gave the id, so that it isn't the launcher's to choose."""
    text = cfg._get_node("id")._value()  # type: ignore[union-attr]
    return not (isinstance(text, str) and text.startswith("${run_id:"))


def identity_of(cfg: DictConfig) -> str:
    """The SHA-256 of a job's resolved config without NOT_IN_IDENTITY, in hex.

    Relative paths count as the files that they name. An id that the user gave is part of it: two ids ask for two runs
    of the same config.
    """
    own_id = str(cfg.id) if has_own_id(cfg) else None
    cfg = with_absolute_paths(copy.deepcopy(cfg))
    with open_dict(cfg):
        cfg.id, cfg.run_dir = PLACEHOLDER, PLACEHOLDER  # else each would change whatever refers to it
        cfg.sweep = {"id": None, "num": None, "varies": None}
    tree = _plain(cfg)
    for key in NOT_IN_IDENTITY:
        _drop(tree, key.split("."))
    text = json.dumps({"config": tree, "id": own_id}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sweep_id_of(jobs: Iterable[tuple[str, str]]) -> str:
    """The id of a sweep, of its jobs' identities and names: the same multirun typed again is the same sweep."""
    digits = hashlib.sha256(json.dumps(list(jobs)).encode()).hexdigest()[:ID_LENGTH]
    # a letter first: YAML takes 12345678 and 3e211004 for numbers
    return chr(ord("a") + int(digits[0], 16)) + digits[1:]


def _plain(node: DictConfig | ListConfig) -> Any:
    """Plain Python of a config. What can't be resolved is no problem here, and stays as it is written."""
    try:
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException:
        keys = list(node) if isinstance(node, DictConfig) else range(len(node))
        items = {key: _plain_child(node, key) for key in keys}
        return items if isinstance(node, DictConfig) else list(items.values())


def _plain_child(node: DictConfig | ListConfig, key: Any) -> Any:
    try:
        child = node[key]
    except OmegaConfBaseException:
        return copy.copy(node._get_node(key)._value())  # type: ignore[union-attr]
    return _plain(child) if isinstance(child, (DictConfig, ListConfig)) else child


def _drop(tree: Any, keys: Sequence[str]) -> None:
    for key in keys[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree.pop(keys[-1], None)
