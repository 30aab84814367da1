"""Which samples each step, rank and micro batch gets. Integers only: no NeMo, no process group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def epoch_order(num_samples: int, seed: int, epoch: int, dataset: int | None = None) -> np.ndarray:
    """(num_samples,) int64: the records in the order of this epoch, from (seed, epoch) alone.

    dataset: number of a dataset among several with weights, so that two of one size differ
    """
    key = [seed, epoch] if dataset is None else [seed, epoch, dataset]
    return np.random.Generator(np.random.PCG64(key)).permutation(num_samples)


TextSizes = Callable[[np.ndarray], np.ndarray]
"""(N,) sample indices -> (N,) how long their texts are, in any unit."""


def longest_first(global_batch: np.ndarray, text_sizes: TextSizes | None) -> np.ndarray:
    """The same samples with similar lengths side by side: a micro batch is padded to its longest text.

    What a step learns stays the same, since it sums over its answer tokens (calculate_per_token_loss; where it takes
    the mean of its micro batches' means, tokens of short samples weigh more). The longest ones come first, so that a
    step that doesn't fit the GPU fails at its beginning and the allocator's first blocks hold what comes later.
    """
    return global_batch if text_sizes is None else global_batch[np.argsort(-text_sizes(global_batch), kind="stable")]


@dataclass(frozen=True)
class Share:
    """One data-parallel rank's share of each global batch.

    Global batch k is the same set of samples for every micro batch size and number of ranks; micro batch m of rank r
    takes samples m * micro * size + r * micro and on, so that all ranks work through a global batch side by side. Where
    lengths share a micro batch, every other round goes through the ranks from the last to the first.
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

    def micro_batches(self, global_batch: np.ndarray, is_sorted: bool = False) -> Iterator[list[int]]:
        """This rank's micro batches of the (global_batch_size,) sample indices.

        is_sorted: ranks take turns back and forth. Always in the same direction rank 0 would have the longest of each
            round (longest_first), and the others wait for it at the step's end: of 8 ranks with 2 micro batches of 8
            each 6 % of the time rather than 3 (benchmarks/input_pipeline.py's texts, computed)
        """
        for number in range(self.num_microbatches):
            turn = self.size - 1 - self.rank if is_sorted and number % 2 else self.rank
            start = (number * self.size + turn) * self.micro_batch_size
            yield global_batch[start : start + self.micro_batch_size].tolist()


class TrainOrder:
    """Batch sampler of training: an endless stream of micro batches, starting behind `consumed_samples`.

    The stream is one epoch's permutation after the other; global batches are cut from it without regard to epochs, so
    the last batch of an epoch is filled up from the next one and every sample comes exactly once in each epoch. It has
    no length on purpose: Lightning would end an "epoch" in the middle of a step, drop it and forget its validation.
    text_sizes: for longest_first
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        consumed_samples: int,
        share: Share,
        text_sizes: TextSizes | None = None,
    ):
        if num_samples < 1:
            raise ValueError("no sample to train on")
        self.num_samples, self.seed = num_samples, seed
        self.consumed_samples, self.share, self.text_sizes = consumed_samples, share, text_sizes

    def __iter__(self) -> Iterator[list[int]]:
        epoch, offset = divmod(self.consumed_samples, self.num_samples)
        pending = epoch_order(self.num_samples, self.seed, epoch)[offset:]
        while True:
            while len(pending) < self.share.global_batch_size:
                epoch += 1
                pending = np.concatenate([pending, epoch_order(self.num_samples, self.seed, epoch)])
            global_batch = pending[: self.share.global_batch_size]
            yield from self.share.micro_batches(
                longest_first(global_batch, self.text_sizes), self.text_sizes is not None
            )
            pending = pending[self.share.global_batch_size :]


class BlendOrder:
    """Batch sampler of training on several datasets with weights; otherwise as TrainOrder.

    sizes: samples of each dataset; indices run over all of them, one dataset behind the other
    weights: whole numbers, each dataset's share of the stream (blend_counts)
    text_sizes: for longest_first

    Each dataset is an endless stream of its own, one permutation after the other. Which datasets the samples of a
    global batch come from follows from `weights` and how many samples were before it; inside a global batch they are
    shuffled, or a regular pattern would give a rank always the same dataset.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[int],
        seed: int,
        consumed_samples: int,
        share: Share,
        text_sizes: TextSizes | None = None,
    ):
        if min(sizes) < 1:
            raise ValueError("no sample to train on")
        self.sizes, self.weights, self.seed = list(sizes), list(weights), seed
        self.consumed_samples, self.share, self.text_sizes = consumed_samples, share, text_sizes

    def __iter__(self) -> Iterator[list[int]]:
        counts = blend_counts(self.weights, self.consumed_samples)
        starts = np.cumsum([0, *self.sizes[:-1]])
        orders: dict[int, tuple[int, np.ndarray]] = {}
        position = self.consumed_samples
        while True:
            batch = []
            for _ in range(self.share.global_batch_size):
                dataset = next_dataset(self.weights, counts)
                epoch, offset = divmod(counts[dataset], self.sizes[dataset])
                if orders.get(dataset, (None,))[0] != epoch:
                    orders[dataset] = epoch, epoch_order(self.sizes[dataset], self.seed, epoch, dataset)
                batch.append(starts[dataset] + orders[dataset][1][offset])
                counts[dataset] += 1
            shuffle = np.random.Generator(np.random.PCG64([self.seed, position, len(self.sizes)]))
            global_batch = longest_first(shuffle.permutation(np.array(batch)), self.text_sizes)
            yield from self.share.micro_batches(global_batch, self.text_sizes is not None)
            position += self.share.global_batch_size


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


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the same proportion, for arithmetic that is exact: (0.7, 0.3) is (7, 3)."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    return tuple(number // math.gcd(*whole) for number in whole)


def blend_counts(weights: Sequence[int], num_samples: int) -> list[int]:
    """How many of the first `num_samples` of a blended stream come from each dataset.

    The k-th sample (from 0) of a dataset with weight w stands at position (k + 1/2) / w, and the stream takes samples
    by position (Webster's method): a dataset stays within a sample or so of its share, and a longer stream begins with
    the shorter one, so that it can be cut and continued anywhere.
    """
    counts = [(2 * num_samples * weight + sum(weights)) // (2 * sum(weights)) for weight in weights]
    while sum(counts) > num_samples:
        last = max(range(len(weights)), key=lambda i: (Fraction(2 * counts[i] - 1, weights[i]), i))
        counts[last] -= 1
    while sum(counts) < num_samples:
        counts[next_dataset(weights, counts)] += 1
    return counts


def next_dataset(weights: Sequence[int], counts: Sequence[int]) -> int:
    """The dataset that a blended stream takes its next sample from, when it took `counts` so far."""
    return min(range(len(weights)), key=lambda i: (Fraction(2 * counts[i] + 1, weights[i]), i))
