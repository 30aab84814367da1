"""Composing the jobs of a multirun without reading and merging all YAML again for each.

Hydra composes each job twice: to see that it can be composed, and to launch it. What a job's overrides change is nearly
always values, so this composes once for each choice of groups, and puts the values into a copy.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import omegaconf.base
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf


@contextmanager
def interpolations_parsed_once() -> Iterator[None]:
    """Keeps the parse trees of interpolations, which OmegaConf makes anew each time that it resolves one: a fifth of
    what a large sweep's start would cost.
    """
    parse = omegaconf.base.parse  # type: ignore[attr-defined]
    omegaconf.base.parse = functools.cache(parse)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        omegaconf.base.parse = parse  # type: ignore[attr-defined]


class SweepComposer:
    """Stands for the `load_sweep_config` of a Hydra config loader, with the same results.

    loader: of one run of Hydra: its YAML is taken to stay as it is while the jobs are composed
    """

    def __init__(self, loader: ConfigLoaderImpl):
        self._loader = loader
        self._compose = loader.load_sweep_config
        self._is_group = functools.cache(self._find_group)
        self._parser = OverridesParser.create(config_loader=loader)
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self._checked: dict[tuple[str, ...], DictConfig] = {}

    @classmethod
    def install(cls, loader: Any) -> SweepComposer:
        """Makes `loader.load_sweep_config` this."""
        if not isinstance(loader.load_sweep_config, cls):
            loader.load_sweep_config = cls(loader)
        return loader.load_sweep_config

    def __call__(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Composes, and keeps the result for `take`: called by the sweeper, which only looks whether it composes."""
        cfg = self._composed(master_config, sweep_overrides)
        self._checked[tuple(sweep_overrides)] = cfg
        return cfg

    def take(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of a job, for the caller to keep."""
        checked = self._checked.pop(tuple(sweep_overrides), None)
        return self._composed(master_config, sweep_overrides) if checked is None else checked

    def _composed(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        parsed = self._parser.parse_overrides(sweep_overrides)
        values = [override for override in parsed if self._is_value(override)]
        choices = [str(override.input_line) for override in parsed if override not in values]
        if tuple(choices) not in self._bases:
            self._bases[tuple(choices)] = self._compose(master_config, choices)
        cfg = copy.deepcopy(self._bases[tuple(choices)])
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        cfg.hydra.overrides.task = [override.input_line for override in parsed if not override.is_hydra_override()]
        OmegaConf.copy_cache(from_config=master_config, to_config=cfg)
        return cfg

    def _is_value(self, override: Override) -> bool:
        """Whether it changes a value only: no choice of a group, nothing of Hydra's own."""
        if override.is_hydra_override() or override.package is not None or override.is_sweep_override():
            return False
        return not self._is_group(override.key_or_group)

    def _find_group(self, key: str) -> bool:
        return bool(self._loader.get_group_options(key, results_filter=None))
