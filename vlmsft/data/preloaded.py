"""Fine-tuning data from a JSON or JSONL file and a folder of images, as a NeMo data module."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from nemo.lightning import io

from vlmsft.data.blend import Samples, joined
from vlmsft.data.dataset import ConversationDataset, UserErrorLoader
from vlmsft.data.encode import SampleEncoder
from vlmsft.data.records import RecordFile, capped, find_problems
from vlmsft.data.sampler import VlmDataSampler, raise_changes, raise_without_place, resume_sampler
from vlmsft.data.skips import not_skippable
from vlmsft.data.sources import Source, label, sources
from vlmsft.errors import Problem, UserError


class PreloadedDataModule(pl.LightningDataModule, io.IOMixin):
    """Training and validation records, each in files of their own (formats: vlmsft.data.records).

    train_path, validation_path: a file, a list of files or a mapping of names (vlmsft.data.sources); validation sets
        with names are logged one by one as well; validation_path None for a run without validation
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
        train_path: str | list | dict,
        validation_path: str | list | dict | None,
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
        self._train: Samples | None = None
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

    def prepare_data(self) -> None:
        """Raises UserError with the problems of both files (on one rank of each node)."""
        if not self.check_files:
            return
        encoder = SampleEncoder(self.processor, self.decoder_seq_length)
        problems: list[Problem] = []
        for source in [*self._train_sources, *self._validation_sources]:
            path, folder = source.path, source.image_folder
            found = find_problems(path, folder, verify_images=self.verify_images, encoder=encoder)
            if self.on_error == "skip":
                found = not_skippable(found, path, self.max_skipped_share)
            problems += [problem for problem in found if problem not in problems]
        if problems:
            raise UserError(capped(problems))

    @property
    def _train_sources(self) -> list[Source]:
        return sources(self.train_path, "data.train_path", self.image_folder)

    @property
    def _validation_sources(self) -> list[Source]:
        return sources(self.validation_path, "data.validation_path", self.image_folder)

    def setup(self, stage: str = "") -> None:
        if self._train is None:
            self._train = self._joined(self._train_sources, named=False)
        if self._validation is None and self.validation_path is not None:
            self._validation = self._joined(self._validation_sources, named=True)

    @property
    def num_train_samples(self) -> int:
        """Samples of an epoch."""
        self.setup()
        assert self._train is not None
        return len(self._train)

    def train_dataloader(self) -> UserErrorLoader:
        # consumed samples = init_consumed_samples + steps since then; NeMo's modules count from here as well
        raise_without_place(self.trainer, self, self._resumed)
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
        found = self._train_sources
        hashes = [RecordFile(source.path).sha256 for source in found]
        names = [label(source, number) for number, source in enumerate(found)]
        weighted = found[0].weight is not None
        return {
            "num_train_samples": self.num_train_samples,
            "train_sha256": dict(zip(names, hashes, strict=True)) if len(found) > 1 else hashes[0],
            "weights": {name: source.weight for name, source in zip(names, found, strict=True)} if weighted else None,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues behind the consumed samples. Raises UserError when files, weights or seed would give others."""
        raise_changes(state_dict, self._order_depends_on())
        self._resumed = state_dict
        resume_sampler(self.data_sampler, state_dict["consumed_samples"])

    def _joined(self, found: list[Source], *, named: bool) -> Samples:
        limits = (self.processor, self.decoder_seq_length, self.on_error)
        return joined([ConversationDataset(s.path, s.image_folder, *limits) for s in found], found, named=named)

    def _loader(self, dataset: Samples | None, mode: str) -> UserErrorLoader:
        assert dataset is not None, "setup() comes first"
        return UserErrorLoader(
            dataset,
            mode=mode,
            collate_fn=dataset.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.persistent_workers and self.num_workers > 0,
        )
