"""The context/ folder of a checkpoint that no training wrote. The only file here that imports NeMo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import torch
from nemo import lightning as nl
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning.io.pl import TrainerContext

from vlmsft.errors import Problem
from vlmsft.mllama.config import MLlamaConfig, TextConfig, VisionConfig
from vlmsft.mllama.model import MLlamaModel

PARTS = ("language_model_config", "vision_model_config")
CHOSEN_BY_TRAINING = ("language_model_config.seq_length",)
"""Not what the weights are, but how they are used: a config may say otherwise than the model that it takes."""


def model_of_values(values: Mapping[str, Any]) -> run.Config:
    """The model that hf_config.model_values describes."""
    config = run.Config(
        MLlamaConfig,
        language_model_config=run.Config(TextConfig, **values["language_model_config"]),
        vision_model_config=run.Config(VisionConfig, **values["vision_model_config"]),
    )
    return run.Config(MLlamaModel, config=config)


def differences(model: run.Config, values: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Each value of a model (conf/model/*.yaml, translated) that differs from hf_config.model_values.

    where: the config.json that `values` are from
    """
    config: Any = fdl.build(model.config)
    for part in PARTS:
        for name, expected in values[part].items():
            found = getattr(getattr(config, part), name)
            if f"{part}.{name}" not in CHOSEN_BY_TRAINING and _as_list(found) != _as_list(expected):
                yield Problem(f"model.config.{part}.{name}", repr(found), f"{expected!r} as in {where}")


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_context(folder: Path, model: run.Config, processor: Path, dtype: torch.dtype) -> None:
    """Write what NeMo needs to build the model again, without building it: no weights are allocated.

    processor: folder of the tokenizer; its files are copied into `folder`
    dtype: of the weights
    """
    model.config.params_dtype = dtype
    model.config.bf16, model.config.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    model.tokenizer = run.Config(AutoTokenizer, str(processor))
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy())
    TrainerContext(model=fdl.build(model), trainer=trainer, extra={}).io_dump(folder, yaml_attrs=["model"])
