"""Makes launch/ and sweeps/ Hydra groups from any working directory (Hydra reads hydra.searchpath in the primary config
only, and only literal paths). Imported by every Hydra program of the environment: keep it light.

There is no hydra_plugins/__init__.py, on purpose: hydra_plugins is a namespace package that several distributions fill.
"""

from __future__ import annotations

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin

from vlmsft.config_files import GROUPS_BESIDE_CONF, register_resolvers, root


class GroupsBesideConf(FileConfigSource):
    """The root as a config source that shows launch/ and sweeps/ and nothing else of the repository.

    Hydra's --help and shell completion list every folder of a source, recursively: with the plain root that is .venv,
    runs and tests too.
    """

    @staticmethod
    def scheme() -> str:
        return "vlmsft"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path == "" or (_is_ours(config_path) and super().is_group(config_path))

    def is_config(self, config_path: str) -> bool:
        return _is_ours(config_path) and super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else list(GROUPS_BESIDE_CONF)
        return super().list(config_path, results_filter) if _is_ours(config_path) else []


class VlmsftSearchPath(SearchPathPlugin):
    """Appends the root behind everything else, so that another program's own groups win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        register_resolvers()
        search_path.append(provider="vlmsft", path=f"vlmsft://{root()}")


def _is_ours(config_path: str) -> bool:
    return config_path.strip("/").split("/")[0] in GROUPS_BESIDE_CONF
