"""One micro batch: from the loader to the device, and into the model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlmsft.data.encode import IGNORE

# Tensors that steer control flow; on the device each read would wait for the GPU
HOST_TENSORS = ("image_sample", "num_tiles", "aspect_ratio_ids", "visible_from", "visible_until")
DEVICE_TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "tiles", "answer_rows")
WAIT_KEY = "data_wait_seconds"
_MODEL_INPUTS = ("tokens", "position_ids", "labels", "tiles", "answer_rows", *HOST_TENSORS)


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, Any]:
    """The next batch with its DEVICE_TENSORS on this process' GPU (or left where they are without one).

    Takes NeMo's (batch, batch index, loader index) as well as the bare batch. Copies don't wait if the loader pins.
    WAIT_KEY tells how long the loader let this process wait.
    """
    started = time.monotonic()
    item = next(dataloader_iter)
    waited = time.monotonic() - started
    batch = {**(item[0] if isinstance(item, tuple) else item), WAIT_KEY: waited}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {**batch, "answer_rows": answer_rows(batch["labels"])} if "labels" in batch else batch
    return {
        key: value.to(device, non_blocking=True) if key in DEVICE_TENSORS and isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def answer_rows(labels: Tensor) -> Tensor:
    """(N,) positions in the flattened labels that have one. Found on the host: on a GPU, how many there are is only
    known when its queue has come this far."""
    rows = (labels.flatten() != IGNORE).nonzero().flatten()
    return rows.pin_memory() if torch.cuda.is_available() else rows


def forward_step(model, batch: dict[str, Any]) -> Tensor:
    """Losses (B, S), or logits for a batch without labels."""
    return model(**{name: batch[name] for name in _MODEL_INPUTS if name in batch})
