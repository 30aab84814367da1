"""Fine-tuning data from a JSON or JSONL file and a folder of images, as a NeMo data module."""

from __future__ import annotations

from typing import Any, Literal

from vlmsft.data.blend import Samples, joined
from vlmsft.data.dataset import ConversationDataset, UserErrorLoader
from vlmsft.data.encode import SampleEncoder
from vlmsft.data.module import FineTuningDataModule
from vlmsft.data.records import RecordFile, capped, find_problems
from vlmsft.data.sampler import raise_changes, resume_sampler
from vlmsft.data.skips import not_skippable
from vlmsft.data.sources import Source, label, sources
from vlmsft.errors import Problem, UserError


class PreloadedDataModule(FineTuningDataModule):
    """Training and validation records, each in files of their own (formats: vlmsft.data.records).

    train_path, validation_path: a file, a list of files or a mapping of names (vlmsft.data.sources); validation sets
        with names are logged one by one as well; validation_path None for a run without validation
    image_folder: image names in records start here; None if they are absolute or no record has an image
    check_files: look through both files for problems before training (seconds for 150k records)
    verify_images: that look decodes the images of a file that names at most so many
    the others: FineTuningDataModule
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
        super().__init__(
            processor=processor,
            seq_length=seq_length,
            decoder_seq_length=decoder_seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            seed=seed,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            on_error=on_error,
            max_skipped_share=max_skipped_share,
            tokenizer=tokenizer,
        )
        self.train_path = train_path
        self.validation_path = validation_path
        self.image_folder = image_folder
        self.check_files = check_files
        self.verify_images = verify_images
        self._train: Samples | None = None

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
        self._start_counting()
        assert self._train is not None, "setup() comes first"
        return self._loader(self._train, "train")

    def state_dict(self) -> dict[str, Any]:
        """What exact resume needs: how many samples were consumed, and of what."""
        return {"consumed_samples": self._consumed_samples(), **self._order_depends_on()}

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
