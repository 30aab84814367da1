"""Small models whose every part shows in the logits, as a trained model's does."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoint_cases import write_hf_folder
from transformers import MllamaConfig

from vlmsft.checkpoints.hf_folder import HFFolder, write_weights


def write_lively_folder(folder: Path, config: MllamaConfig, dtype: torch.dtype = torch.float32) -> Path:
    """checkpoint_cases.write_hf_folder with norms round 1 and matrices that keep their input's size.

    Where activations are small, silu(gate) * up is about gate * up / 2, and swapping the two changes next to nothing.
    """
    plain = HFFolder(write_hf_folder(folder, config, torch.float32))
    tensors = {}
    for name, tensor in plain.items():
        if "norm" in name and name.endswith("weight"):
            tensor = 1 + 2 * tensor
        elif tensor.ndim > 1 and "embed" not in name:
            tensor = tensor / 0.05 / tensor[0].numel() ** 0.5
        elif "embed_tokens" in name:
            tensor = tensor / 0.05
        tensors[name] = tensor.to(dtype)
    for path in folder.glob("model*"):
        path.unlink()
    write_weights(folder, tensors.items(), 10**9)
    return folder


def swap_gate_and_up(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One layer's two in each other's place; names are HF's in memory."""
    changed = dict(tensors)
    gate, up = (f"model.language_model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    changed[gate], changed[up] = changed[up], changed[gate]
    return changed
