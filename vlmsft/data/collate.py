"""Encoded samples to one micro batch, as the model's forward takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vlmsft.data.encode import IGNORE, EncodedSample
from vlmsft.data.skips import SKIPPED_KEY

LENGTH_MULTIPLE = 64  # tensor cores and sequence parallelism want round lengths; few shapes, little padding


def padded_length(length: int) -> int:
    """`length` rounded up to a multiple of 64."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def collate(samples: Sequence[EncodedSample], pad_token_id: int) -> dict[str, Any]:
    """The micro batch of B samples with I images and T tiles in all (I and T may be 0).

    tokens, labels, position_ids (B, S) int64 and loss_mask (B, S) float32: S is the longest sample's length rounded up
    to a multiple of 64, so it never exceeds decoder_seq_length rounded up likewise. tiles (T, 3, tile, tile) uint8.
    For the host (they steer control flow, and reading them from a GPU would stall it): image_sample, num_tiles,
    aspect_ratio_ids, visible_from, visible_until (I,) int64, num_text_tokens (without padding) and num_truncated_tokens
    (B,) int64.
    Where samples were skipped, `skipped` lists them (vlmsft.data.skips); elsewhere the key is absent.
    """
    size = padded_length(max(len(sample.tokens) for sample in samples))
    labels = torch.stack([F.pad(s.labels, (0, size - len(s.labels)), value=IGNORE) for s in samples])
    counts = torch.tensor([len(sample.num_tiles) for sample in samples])
    skipped = [sample.skipped for sample in samples if sample.skipped is not None]
    return {
        "tokens": torch.stack([F.pad(s.tokens, (0, size - len(s.tokens)), value=pad_token_id) for s in samples]),
        "labels": labels,
        "loss_mask": (labels != IGNORE).float(),
        "position_ids": torch.arange(size).repeat(len(samples), 1),
        "tiles": torch.cat([sample.tiles for sample in samples]),
        "image_sample": torch.repeat_interleave(torch.arange(len(samples)), counts),
        "num_tiles": torch.cat([sample.num_tiles for sample in samples]),
        "aspect_ratio_ids": torch.cat([sample.aspect_ratio_ids for sample in samples]),
        "visible_from": torch.cat([sample.visible_from for sample in samples]),
        "visible_until": torch.cat([sample.visible_until for sample in samples]),
        "num_text_tokens": torch.tensor([len(sample.tokens) for sample in samples]),
        "num_truncated_tokens": torch.tensor([sample.num_truncated_tokens for sample in samples]),
        **({SKIPPED_KEY: skipped} if skipped else {}),
    }
