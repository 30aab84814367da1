"""What a config composed from conf/train.yaml says, where it says it: for checks, estimates and plans.

Imports neither torch nor NeMo.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmsft.data.sources import Source, sources
from vlmsft.errors import UserError
from vlmsft.mllama import sizes
from vlmsft.paths import DATASETS
from vlmsft.runtime.logging import rank_from_environment

TEXT, VISION = "model.config.language_model_config", "model.config.vision_model_config"
TENSOR_PARALLEL = "strategy.tensor_model_parallel_size"
CPU_STRATEGY = "vlmsft.runtime.cpu.CpuMegatronStrategy"
LOCAL_EXECUTOR = "nemo_run.LocalExecutor"


class Facts:
    """Values of the config by key; None where a value is absent, `???` or an interpolation that can't be resolved.

    A value is looked up once, for a lookup takes OmegaConf 0.1 ms: a config that changes needs new facts.
    world_size: number of processes that torchrun or srun started; None = trainer.num_nodes x trainer.devices
    """

    def __init__(self, cfg: DictConfig, world_size: int | None = None):
        self.cfg, self.started = cfg, world_size
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            self._values[key] = self._select(key)
        return self._values[key]

    def _select(self, key: str) -> Any:
        try:
            value = OmegaConf.select(self.cfg, key, throw_on_missing=True)
        except OmegaConfBaseException:
            return None  # recipe.py names it
        return list(value) if isinstance(value, ListConfig) else value

    def whole(self, *keys: str) -> list[int] | None:
        """The values as integers, or None if any of them isn't one."""
        values = [self[key] for key in keys]
        return values if all(type(value) is int for value in values) else None

    @property
    def world_size(self) -> int | None:
        """Processes of the run; None where only the machine it runs on will tell (devices: auto)."""
        if self.started is not None:
            return self.started
        devices = self["trainer.devices"]
        num_devices = len(devices) if isinstance(devices, list) else devices
        num_nodes = self["trainer.num_nodes"]
        if type(num_devices) is not int or type(num_nodes) is not int or num_devices < 1:
            return None
        return num_devices * num_nodes

    @property
    def data_parallel_size(self) -> int | None:
        """Copies of the model; None where unknown, or where tensor parallelism doesn't fit the processes."""
        sizes = self.whole(TENSOR_PARALLEL)
        if sizes is None or self.world_size is None or sizes[0] < 1 or self.world_size % sizes[0]:
            return None
        return self.world_size // sizes[0]

    @property
    def num_microbatches(self) -> int | None:
        """Micro batches of a rank in an optimizer step."""
        sizes = self.whole("data.global_batch_size", "data.micro_batch_size")
        if sizes is None or self.data_parallel_size is None:
            return None
        share = sizes[1] * self.data_parallel_size
        return None if share < 1 or sizes[0] % share else sizes[0] // share

    @property
    def validates(self) -> bool:
        return self["data.validation_path"] is not None and self["trainer.limit_val_batches"] not in (0, 0.0)

    @property
    def names_training_data(self) -> bool:
        return self["data.train_path"] is not None or self["data.path"] is not None

    @property
    def reads_shards(self) -> bool:
        """Whether the data are folders of shards (`data.path`) and not files of records."""
        return "path" in (self["data"] or {})

    def sources(self, *keys: str) -> list[Source]:
        """The datasets that are named under `keys`. Raises UserError where one can't be understood."""
        folder = self["data.image_folder"]
        folder = folder if isinstance(folder, str) else None  # image_folder_is_text says what else it is
        values = {key: self[key] for key in keys}
        plain = {key: OmegaConf.to_object(v) if isinstance(v, DictConfig) else v for key, v in values.items()}
        images = not self.reads_shards
        return [s for key, v in plain.items() for s in sources(v, key, folder, has_image_folders=images)]

    @property
    def datasets(self) -> list[Source]:
        """All that are named in a form that can be understood; datasets_are_named has the others."""
        found = []
        for key in DATASETS:
            with suppress(UserError):
                found += self.sources(key)
        return found

    @property
    def reads_files(self) -> bool:
        """Whether this process looks into files: one of a run does."""
        return self.runs_here and rank_from_environment() == 0

    @property
    def runs_here(self) -> bool:
        """Whether the files that the config names are those of this machine."""
        return self["launch.executor"] is None or self["launch.executor._target_"] == LOCAL_EXECUTOR


def shapes(facts: Facts) -> tuple[sizes.TextShape, sizes.VisionShape] | None:
    """The sizes of an MLlama's two halves; None where one isn't a positive number."""
    text_names = [field.name for field in fields(sizes.TextShape) if field.name != "kv_channels"]
    vision_names = [field.name for field in fields(sizes.VisionShape) if field.name != "num_intermediate_layers"]
    text = facts.whole(*(f"{TEXT}.{name}" for name in text_names))
    vision = facts.whole(*(f"{VISION}.{name}" for name in vision_names))
    indices = facts[f"{VISION}.intermediate_layers_indices"]
    if text is None or vision is None or not isinstance(indices, list) or min(*text, *vision) < 1:
        return None
    kv_channels = facts[f"{TEXT}.kv_channels"]
    return (
        sizes.TextShape(**dict(zip(text_names, text, strict=True)), kv_channels=kv_channels),
        sizes.VisionShape(**dict(zip(vision_names, vision, strict=True)), num_intermediate_layers=len(indices)),
    )
