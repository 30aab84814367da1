"""Which samples each step, rank and micro batch gets. Integers only: no NeMo, no process group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """(num_samples,) int64: the file's records in the order of this epoch, from (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


@dataclass(frozen=True)
class Share:
    """One data-parallel rank's share of each global batch.

    Global batch k is the same set of samples for every micro batch size and number of ranks; micro batch m of rank r
    takes samples m * micro * size + r * micro and on, so that all ranks work through a global batch side by side.
    """

    micro_batch_size: int
    global_batch_size: int
    rank: int
    size: int

    def __post_init__(self):
        step = self.micro_batch_size * self.size
        if self.global_batch_size % step:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} isn't a multiple of micro_batch_size "
                f"{self.micro_batch_size} x data-parallel size {self.size}"
            )

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.size)

    def micro_batches(self, global_batch: np.ndarray) -> Iterator[list[int]]:
        """This rank's micro batches of the (global_batch_size,) sample indices."""
        for number in range(self.num_microbatches):
            start = (number * self.size + self.rank) * self.micro_batch_size
            yield global_batch[start : start + self.micro_batch_size].tolist()


class TrainOrder:
    """Batch sampler of training: an endless stream of micro batches, starting behind `consumed_samples`.

    The stream is one epoch's permutation after the other; global batches are cut from it without regard to epochs, so
    the last batch of an epoch is filled up from the next one and every sample comes exactly once in each epoch. It has
    no length on purpose: Lightning would end an "epoch" in the middle of a step, drop it and forget its validation.
    """

    def __init__(self, num_samples: int, seed: int, consumed_samples: int, share: Share):
        if num_samples < 1:
            raise ValueError("no sample to train on")
        self.num_samples, self.seed, self.consumed_samples, self.share = num_samples, seed, consumed_samples, share

    def __iter__(self) -> Iterator[list[int]]:
        epoch, offset = divmod(self.consumed_samples, self.num_samples)
        pending = epoch_order(self.num_samples, self.seed, epoch)[offset:]
        while True:
            while len(pending) < self.share.global_batch_size:
                epoch += 1
                pending = np.concatenate([pending, epoch_order(self.num_samples, self.seed, epoch)])
            yield from self.share.micro_batches(pending[: self.share.global_batch_size])
            pending = pending[self.share.global_batch_size :]


class EvaluationOrder:
    """Batch sampler of validation and test: every sample once, in the file's order, the same each time.

    All ranks get the same number of micro batches, a multiple of a step's: the last global batch is filled up with
    samples that carry no loss, written as ~index (negative), spread behind the real ones.
    """

    def __init__(self, num_samples: int, share: Share):
        if num_samples < 1:
            raise ValueError("no sample to evaluate")
        self.num_samples, self.share = num_samples, share

    def __len__(self) -> int:
        """In micro batches of this rank, as NeMo and Lightning count."""
        return -(-self.num_samples // self.share.global_batch_size) * self.share.num_microbatches

    def __iter__(self) -> Iterator[list[int]]:
        size = self.share.global_batch_size
        for start in range(0, self.num_samples, size):
            real = np.arange(start, min(start + size, self.num_samples))
            fill = ~np.resize(real, size - len(real))
            yield from self.share.micro_batches(np.concatenate([real, fill]))
