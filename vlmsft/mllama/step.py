"""One micro batch: from the loader to the device, and into the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Tensors that steer control flow; on the device each read would wait for the GPU
HOST_TENSORS = ("image_sample", "num_tiles", "aspect_ratio_ids", "visible_from", "visible_until")
DEVICE_TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "tiles")
_MODEL_INPUTS = ("tokens", "position_ids", "labels", "tiles", *HOST_TENSORS)


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, Any]:
    """The next batch with its DEVICE_TENSORS on this process' GPU (or left where they are without one).

    Takes NeMo's (batch, batch index, loader index) as well as the bare batch. Copies don't wait if the loader pins.
    """
    item = next(dataloader_iter)
    batch = item[0] if isinstance(item, tuple) else item
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        key: value.to(device, non_blocking=True) if key in DEVICE_TENSORS and isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def forward_step(model, batch: dict[str, Any]) -> Tensor:
    """Losses (B, S), or logits for a batch without labels."""
    return model(**{name: batch[name] for name in _MODEL_INPUTS if name in batch})
