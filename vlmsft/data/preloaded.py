"""Fine-tuning data from a JSON or JSONL file and a folder of images, as a NeMo data module."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from nemo.lightning import io

from vlmsft.data.dataset import ConversationDataset, UserErrorLoader
from vlmsft.data.encode import SampleEncoder
from vlmsft.data.records import capped, find_problems
from vlmsft.data.sampler import VlmDataSampler
from vlmsft.data.skips import not_skippable
from vlmsft.errors import Problem, UserError


class PreloadedDataModule(pl.LightningDataModule, io.IOMixin):
    """Training and validation records, each in a file of their own (formats: vlmsft.data.records).

    validation_path: None for a run without validation
    image_folder: image names in records start here; None if they are absolute or no record has an image
    processor: folder or hub id of the transformers processor
    seq_length: vision tokens of an image (NeMo's name); decoder_seq_length: most text tokens of a sample
    seed: of the order of the samples
    check_files: look through both files for problems before training (seconds for 150k records)
    verify_images: that look decodes the images of a file that names at most so many
    on_error: what becomes of a sample that can't be read: "raise" stops the run, "skip" names it and goes on
    max_skipped_share: share of a file's samples that may be skipped; more stop the run
    tokenizer: NeMo's tokenizer, which travels with checkpoints; the processor's if None
    """

    def __init__(
        self,
        train_path: str,
        validation_path: str | None,
        image_folder: str | None,
        processor: str,
        seq_length: int,
        decoder_seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int,
        seed: int,
        pin_memory: bool = True,
        persistent_workers: bool = True,
        check_files: bool = True,
        verify_images: int = 1000,
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped_share: float = 0.001,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.train_path = train_path
        self.validation_path = validation_path
        self.image_folder = image_folder
        self.processor = processor
        self.seq_length = seq_length
        self.decoder_seq_length = decoder_seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.check_files = check_files
        self.verify_images = verify_images
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
        self._train: ConversationDataset | None = None
        self._validation: ConversationDataset | None = None

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

    def prepare_data(self) -> None:
        """Raises UserError with the problems of both files (on one rank of each node)."""
        if not self.check_files:
            return
        encoder = SampleEncoder(self.processor, self.decoder_seq_length)
        paths = [path for path in (self.train_path, self.validation_path) if path is not None]
        problems: list[Problem] = []
        for path in paths:
            found = find_problems(path, self.image_folder, verify_images=self.verify_images, encoder=encoder)
            if self.on_error == "skip":
                found = not_skippable(found, path, self.max_skipped_share)
            problems += [problem for problem in found if problem not in problems]
        if problems:
            raise UserError(capped(problems))

    def setup(self, stage: str = "") -> None:
        if self._train is None:
            self._train = self._dataset(self.train_path)
        if self._validation is None and self.validation_path is not None:
            self._validation = self._dataset(self.validation_path)

    @property
    def num_train_samples(self) -> int:
        """Samples of an epoch."""
        self.setup()
        assert self._train is not None
        return len(self._train)

    def train_dataloader(self) -> UserErrorLoader:
        # consumed samples = init_consumed_samples + steps since then; NeMo's modules count from here as well
        self.init_global_step = self.trainer.global_step if self.trainer else 0
        self.data_sampler.init_global_step = self.init_global_step
        return self._loader(self._train, "train")

    def val_dataloader(self) -> UserErrorLoader | list:
        return [] if self._validation is None else self._loader(self._validation, "validation")

    def test_dataloader(self) -> UserErrorLoader | list:
        return [] if self._validation is None else self._loader(self._validation, "test")

    def state_dict(self) -> dict[str, Any]:
        """What exact resume needs: how many samples were consumed, and of what."""
        steps = self.trainer.global_step - self.init_global_step if self.trainer else 0
        return {
            "consumed_samples": self.data_sampler.compute_consumed_samples(steps),
            **self._order_depends_on(),
        }

    def _order_depends_on(self) -> dict[str, Any]:
        self.setup()
        assert self._train is not None
        return {
            "num_train_samples": self.num_train_samples,
            "train_sha256": self._train.records.sha256,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues behind the consumed samples. Raises UserError when file or seed would give other samples."""
        remedy = "Resume with the same data and seed, or start a new run from the checkpoint's weights"
        problems = [
            Problem(f"data.{key}", f"{value}", f"{state_dict[key]} as in the checkpoint", remedy)
            for key, value in self._order_depends_on().items()
            if key in state_dict and state_dict[key] != value  # checkpoints of earlier versions have no train_sha256
        ]
        if problems:
            raise UserError(problems)
        self.data_sampler.init_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.prev_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.if_first_step = 1

    def _dataset(self, path: str) -> ConversationDataset:
        return ConversationDataset(path, self.image_folder, self.processor, self.decoder_seq_length, self.on_error)

    def _loader(self, dataset: ConversationDataset | None, mode: str) -> UserErrorLoader:
        assert dataset is not None, "setup() comes first"
        return UserErrorLoader(
            dataset,
            mode=mode,
            collate_fn=dataset.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.persistent_workers and self.num_workers > 0,
        )
