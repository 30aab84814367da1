"""Did the model learn its validation answers, and did it look at the images to do so? Asked at the end of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl
import torch

from vlmsft.data.collate import collate
from vlmsft.data.encode import IGNORE
from vlmsft.errors import Problem, UserError
from vlmsft.runtime.logging import console
from vlmsft.runtime.progress import read_metric

if TYPE_CHECKING:
    from vlmsft.data.blend import Samples
    from vlmsft.data.encode import EncodedSample
    from vlmsft.data.energon import EnergonDataModule
    from vlmsft.data.preloaded import PreloadedDataModule
    from vlmsft.mllama.model import MLlamaModel


class OverfitCheck(pl.Callback):
    """Fails the run unless it overfitted: for a validation set that is part of the training samples.

    max_train_loss: reduced_train_loss of the last step
    min_answers: share of validation answers whose every token is the argmax, given the tokens before it
    max_answers_permuted: the same share when each sample gets another one's images: a model that reproduces answers
        without looking passes every other test
    """

    def __init__(self, max_train_loss: float, min_answers: float, max_answers_permuted: float):
        self.max_train_loss = max_train_loss
        self.min_answers = min_answers
        self.max_answers_permuted = max_answers_permuted
        self._problems: list[Problem] = []

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: PreloadedDataModule | EnergonDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue] # set by fit()
        model, loader = cast("MLlamaModel", pl_module), data.val_dataloader()
        if isinstance(loader, list):
            found, remedy = "no validation set", "Set data.validation_path, or trainer.callbacks.overfit=null"
            expected = "one that is part of the training samples"
            self._problems = [Problem(type(self).__name__, found, expected, remedy)]
            return
        dataset = cast("Samples", loader.dataset)
        samples = [dataset.sample(index) for index in range(len(dataset))]
        pad, size = dataset.encoder.pad_token_id, data.micro_batch_size
        model.eval()
        answers = share_reproduced(model, samples, pad, size)
        permuted = share_reproduced(model, permute_images(samples), pad, size)
        model.train()
        loss = read_metric(trainer, "reduced_train_loss")
        assert loss is not None  # NeMo logs it at every step
        if trainer.is_global_zero:
            console().print(
                f"training loss {loss:.4f}; validation answers reproduced: {answers:.1%}, with the images permuted: "
                f"{permuted:.1%}",
                highlight=False,
            )
        self._problems = [
            Problem(f"{type(self).__name__}: {what}", f"{found:.4g}", expected)
            for what, found, expected, passed in (
                ("training loss", loss, f"under {self.max_train_loss}", loss < self.max_train_loss),
                ("share of answers reproduced", answers, f"at least {self.min_answers}", answers >= self.min_answers),
                (
                    "share of answers reproduced with the images permuted",
                    permuted,
                    f"under {self.max_answers_permuted}",
                    permuted < self.max_answers_permuted,
                ),
            )
            if not passed
        ]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._problems:  # only now: the last checkpoint is written after on_train_end
            raise UserError(self._problems, "training ended, and its checkpoint is written")


def permute_images(samples: Sequence[EncodedSample]) -> list[EncodedSample]:
    """Each sample with the images of the next one that shows something else and has as many."""
    return [_with_images_of(sample, _next_other(samples, index)) for index, sample in enumerate(samples)]


def _next_other(samples: Sequence[EncodedSample], index: int) -> EncodedSample:
    sample = samples[index]
    for step in range(1, len(samples)):
        other = samples[(index + step) % len(samples)]
        if len(other.num_tiles) == len(sample.num_tiles) and not torch.equal(other.tiles, sample.tiles):
            return other
    raise ValueError(f"no other validation sample has {len(sample.num_tiles)} images that differ from sample {index}'s")


def _with_images_of(sample: EncodedSample, other: EncodedSample) -> EncodedSample:
    return replace(sample, tiles=other.tiles, num_tiles=other.num_tiles, aspect_ratio_ids=other.aspect_ratio_ids)


def share_reproduced(
    model: MLlamaModel, samples: Sequence[EncodedSample], pad_token_id: int, micro_batch_size: int
) -> float:
    """The share of samples whose labels are all the argmax of the logits before them (teacher forcing)."""
    hits = [hit for batch in _batches(samples, pad_token_id, micro_batch_size) for hit in reproduced(model, batch)]
    return sum(hits) / len(hits)


def _batches(samples: Sequence[EncodedSample], pad_token_id: int, size: int) -> Iterator[dict]:
    for start in range(0, len(samples), size):
        yield collate(samples[start : start + size], pad_token_id)


def reproduced(model: MLlamaModel, batch: dict) -> list[bool]:
    """For each sample of the micro batch, whether every label is the argmax."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    batch = model.data_step(iter([batch]))
    labels = batch.pop("labels")
    logits = gather_from_tensor_model_parallel_region(model.forward_step(batch))  # (B, S, vocab_size)
    return ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(dim=1).tolist()
