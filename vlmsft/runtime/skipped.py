"""Names the samples that training left out, and stops it when they are too many."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl

from vlmsft.data.skips import SKIPPED_KEY, SkippedFile, raise_above
from vlmsft.runtime.logging import console


class SkippedSamples(pl.Callback):
    """Writes down each skipped sample that comes by, in training and validation, on every rank; a run without any has
    no such file.

    path: the file, e.g. runs/<name>/<id>/skipped_samples.jsonl; a resumed run goes on in it

    Raises UserError when more than the data module's max_skipped_share of a dataset's samples were skipped so far.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.file = SkippedFile(path)

    @property
    def count(self) -> int:
        """Distinct samples, of all ranks and of the run so far."""
        return self.file.counts().total()

    def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
        """NeMo hands Lightning's hooks only the last micro batch of a step; this hook sees each of them."""
        skips = batch.get(SKIPPED_KEY) if isinstance(batch, dict) else None
        if not skips:
            return
        self.file.add(skips)
        counts = self.file.counts()
        for skip in skips:
            raise_above(step.trainer.datamodule.max_skipped_share, skip, counts[skip.dataset], self.file.path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for dataset, count in self.file.counts().items():
            text = f"{count} unreadable sample{'s' if count > 1 else ''} of {dataset} skipped: see {self.file.path}"
            console().print(text, markup=False, highlight=False, soft_wrap=True)


def num_skipped(trainer: pl.Trainer) -> int:
    """Samples that the run skipped so far; 0 where nothing counts them."""
    counters = [callback for callback in trainer.callbacks if isinstance(callback, SkippedSamples)]  # pyright: ignore
    return counters[0].count if counters else 0
