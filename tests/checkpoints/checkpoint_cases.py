"""Hugging Face folders of small models, and NeMo checkpoints with a context that says just enough."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from hf_cases import ROPE_SCALING, mllama_config
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

from vlmsft.checkpoints.hf_config import model_values
from vlmsft.checkpoints.hf_folder import HFFolder
from vlmsft.checkpoints.nemo import write_weights
from vlmsft.config_files import sample_set
from vlmsft.mllama.hf_mapping import Sizes, to_ours

TEXT = {
    "vocab_size": 512,  # the sample processor's
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "cross_attention_layers": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500000,
    "max_position_embeddings": 512,
    "rope_scaling": ROPE_SCALING,
    "pad_token_id": 3,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_global_layers": 1,
    "attention_heads": 4,
    "image_size": 112,
    "patch_size": 28,
    "intermediate_layers_indices": [0, 1, 2],
    "vision_output_dim": 256,
}
"""conf/model/mllama_tiny.yaml."""
TEXT_OF_11B = {
    **TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 40,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}
VISION_OF_11B = {
    **VISION,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "vision_output_dim": 192,
}
"""The 11B model's layers in little widths."""


def hf_config(text: dict[str, Any] = TEXT, vision: dict[str, Any] = VISION) -> MllamaConfig:
    return mllama_config(text, vision)


def write_hf_folder(folder: Path, config: MllamaConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A random model with open gates and random tile embeddings, in two shards or more, with the sample processor."""
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        gate = "gate" in name.rpartition(".")[2]
        torch.nn.init.uniform_(parameter, 0.2, 0.8) if gate else torch.nn.init.normal_(parameter, std=0.05)
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    cast("torch.nn.Module", model).to(dtype)  # in place; transformers' own signature confuses type checkers
    model.save_pretrained(folder, max_shard_size=size // 2)
    for file in Path(sample_set(), "processor").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def expected_tensors(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint of the folder must hold."""
    hf = HFFolder(folder)
    return dict(to_ours(hf, Sizes.from_hf(MllamaConfig.from_dict(hf.config))))


def write_checkpoint(
    path: Path, config: MllamaConfig, tensors: Iterable[tuple[str, Tensor]], model: dict[str, Any] | None = None
) -> Path:
    """A checkpoint folder whose context/model.yaml has the values of `config`, and what `model` adds."""
    (path / "context").mkdir(parents=True)
    write_weights(path / "weights", tensors)
    content = {"_target_": "vlmsft.mllama.model.MLlamaModel", "config": model_values(config.to_dict()), **(model or {})}
    (path / "context" / "model.yaml").write_text(yaml.safe_dump(content))
    return path


def assert_same(found: Any, expected: dict[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
