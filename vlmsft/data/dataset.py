"""Records, images and encoder as a torch dataset, and the loader that carries a worker's UserError to the user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from vlmsft.data.collate import collate
from vlmsft.data.encode import EncodedSample, SampleEncoder, load_image
from vlmsft.data.records import RecordFile, image_path, named, parse
from vlmsft.data.skips import skip_of
from vlmsft.errors import Problem, UserError


class ConversationDataset(Dataset):
    """Encoded samples of one file, by index. ~index (negative) is the same sample without loss.

    Items are EncodedSample, or the UserError that names file, line and what is wrong: raised in a worker process it
    would reach the user as a RuntimeError around a traceback. With on_error="skip" a stand-in without loss comes
    instead, which says what it stands for (vlmsft.data.skips). Pickles as its five arguments.
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None,
        processor: str,
        decoder_seq_length: int,
        on_error: Literal["raise", "skip"] = "raise",
    ):
        self.records = RecordFile(path)
        self.image_folder = image_folder
        self.encoder = SampleEncoder(processor, decoder_seq_length)
        self.on_error: Literal["raise", "skip"] = on_error

    def __reduce__(self):
        encoder = self.encoder
        limits = (encoder.processor_path, encoder.decoder_seq_length)
        return (ConversationDataset, (str(self.records.path), self.image_folder, *limits, self.on_error))

    def __len__(self) -> int:
        return len(self.records)

    def text_sizes(self, indices: np.ndarray) -> np.ndarray:
        """(N,) how long the records' texts are, roughly: see RecordFile.sizes."""
        return self.records.sizes(indices)

    def __getitem__(self, index: int) -> EncodedSample | UserError:
        number = index if index >= 0 else ~index
        try:
            sample = self.sample(number)
        except UserError as error:
            return error if self.on_error == "raise" else self._stand_in(number, error)
        return sample if index >= 0 else sample.without_loss()

    def sample(self, index: int) -> EncodedSample:
        """The sample; raises UserError that names file and line."""
        record = self.records[index]
        try:
            conversation = parse(record)
            images = [load_image(image_path(name, self.image_folder)) for name in conversation.images]
            return self.encoder.encode(conversation.turns, images)
        except UserError as error:
            raise UserError(named(error.problems, self.records.where(index))) from None

    def _stand_in(self, index: int, error: UserError) -> EncodedSample | UserError:
        skip = skip_of(self.records.where(index), error, str(self.records.path), len(self.records))
        try:
            return self.encoder.stand_in(skip)
        except UserError as broken:  # the processor, without which no sample can be read
            return broken

    def collate(self, items: list[EncodedSample | UserError]) -> dict | FailedBatch:
        problems = [problem for item in items if isinstance(item, UserError) for problem in item.problems]
        if problems:
            return FailedBatch(problems)
        return collate([item for item in items if isinstance(item, EncodedSample)], self.encoder.pad_token_id)


@dataclass(frozen=True)
class FailedBatch:
    """Stands for a micro batch in which samples couldn't be read."""

    problems: list[Problem]


class UserErrorLoader(DataLoader):
    """DataLoader with a mode (train, validation, test); raises the UserError of a FailedBatch in the main process."""

    def __init__(self, *args, mode: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.mode = mode

    def __iter__(self) -> Iterator[dict]:
        for batch in super().__iter__():
            if isinstance(batch, FailedBatch):
                raise UserError(batch.problems, "the run stopped")
            yield batch
