"""What both data modules have in common: validation, resume, and the loaders' settings."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from nemo.lightning import io

from vlmsft.data.blend import Samples
from vlmsft.data.dataset import UserErrorLoader
from vlmsft.data.sampler import VlmDataSampler, raise_without_place


class FineTuningDataModule(pl.LightningDataModule, io.IOMixin):
    """NeMo's data module, less where the training samples come from.

    processor: folder or hub id of the transformers processor
    seq_length: vision tokens of an image (NeMo's name); decoder_seq_length: most text tokens of a sample
    num_workers: loader processes of each rank
    seed: of the order of the samples
    on_error: what becomes of a sample that can't be read: "raise" stops the run, "skip" names it and goes on
    max_skipped_share: share of a file's or folder's samples that may be skipped; more stop the run
    tokenizer: NeMo's tokenizer, which travels with checkpoints; the processor's if None
    """

    def __init__(
        self,
        *,
        processor: str,
        seq_length: int,
        decoder_seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int,
        seed: int,
        pin_memory: bool,
        persistent_workers: bool,
        on_error: Literal["raise", "skip"],
        max_skipped_share: float,
        tokenizer: Any,
    ):
        super().__init__()
        self.processor = processor
        self.seq_length = seq_length
        self.decoder_seq_length = decoder_seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.on_error: Literal["raise", "skip"] = on_error
        self.max_skipped_share = max_skipped_share
        self._tokenizer = tokenizer
        self.init_global_step = 0
        self.data_sampler = VlmDataSampler(
            seed=seed,
            seq_len=seq_length,
            decoder_seq_len=decoder_seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
        )
        self._validation: Samples | None = None
        self._resumed: dict[str, Any] | None = None

    @property
    def tokenizer(self) -> Any:
        """NeMo's AutoTokenizer of the processor."""
        if self._tokenizer is None:
            from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

            self._tokenizer = AutoTokenizer(self.processor)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:  # llm.finetune sets it
        self._tokenizer = tokenizer

    def val_dataloader(self) -> UserErrorLoader | list:
        return [] if self._validation is None else self._loader(self._validation, "validation")

    def test_dataloader(self) -> UserErrorLoader | list:
        return [] if self._validation is None else self._loader(self._validation, "test")

    def _loader(self, dataset: Samples, mode: str) -> UserErrorLoader:
        return UserErrorLoader(
            dataset,
            mode=mode,
            collate_fn=dataset.collate,
            num_workers=self.num_workers,
            pin_memory=self._pins_memory,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
        )

    @property
    def _pins_memory(self) -> bool:
        return self.pin_memory and torch.cuda.is_available()

    def _start_counting(self) -> None:
        """consumed samples = init_consumed_samples + steps since then; NeMo's modules count from here as well."""
        raise_without_place(self.trainer, self, self._resumed)
        self.init_global_step = self.trainer.global_step if self.trainer else 0
        self.data_sampler.init_global_step = self.init_global_step

    def _consumed_samples(self) -> int:
        steps = self.trainer.global_step - self.init_global_step if self.trainer else 0
        return self.data_sampler.compute_consumed_samples(steps)
