"""Fine-tuning data from WebDataset shards through Megatron-Energon, as a NeMo data module."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal

import torch

from vlmsft.data.blend import joined
from vlmsft.data.encode import SampleEncoder
from vlmsft.data.energon_shards import ShardDataset, ShardFolder
from vlmsft.data.energon_stream import StreamOptions, TrainStream
from vlmsft.data.module import FineTuningDataModule
from vlmsft.data.sampler import raise_changes, resume_sampler
from vlmsft.data.sources import Source, label, sources
from vlmsft.errors import Problem, UserError


class EnergonDataModule(FineTuningDataModule):
    """Training from the train split of shard folders, in Energon's order; validation on their val split, in the shards'
    order, complete and the same each time.

    path: a folder (vlmsft.data.energon_shards), a list of folders or a mapping of names (vlmsft.data.sources); a weight
        is the probability that a sample is of its dataset
    validation_path: the same for validation, usually the same folders; sets with names are logged one by one as well;
        None for a run without validation
    num_workers: loader processes of each rank; the order of the samples depends on it
    shuffle_buffer_size, max_samples_per_sequence, parallel_shard_iters: see StreamOptions
    the others: FineTuningDataModule
    """

    def __init__(
        self,
        path: str | list | dict,
        validation_path: str | list | dict | None,
        processor: str,
        seq_length: int,
        decoder_seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int,
        seed: int,
        shuffle_buffer_size: int,
        max_samples_per_sequence: int | None,
        parallel_shard_iters: int,
        pin_memory: bool = True,
        persistent_workers: bool = True,
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
        self.path = path
        self.validation_path = validation_path
        self.shuffle_buffer_size = shuffle_buffer_size
        self.max_samples_per_sequence = max_samples_per_sequence
        self.parallel_shard_iters = parallel_shard_iters
        self._encoder = SampleEncoder(processor, decoder_seq_length)
        self._folders: list[ShardFolder] = []
        self._stream: TrainStream | None = None

    @property
    def _sources(self) -> list[Source]:
        return sources(self.path, "data.path", has_image_folders=False)

    def setup(self, stage: str = "") -> None:
        if not self._folders:
            self._folders = [ShardFolder.open(source.path, "train", source.key) for source in self._sources]
        if self._validation is None and self.validation_path is not None:
            found = sources(self.validation_path, "data.validation_path", has_image_folders=False)
            folders = [ShardFolder.open(source.path, "val", source.key) for source in found]
            datasets = [ShardDataset(folder, self._encoder, self.on_error) for folder in folders]
            self._validation = joined(datasets, found, named=True)

    def teardown(self, stage: str) -> None:
        self._stream = None  # ends its workers

    @property
    def num_train_samples(self) -> int:
        """Samples of an epoch."""
        self.setup()
        return sum(len(folder) for folder in self._folders)

    def train_dataloader(self) -> TrainStream:
        self._start_counting()
        self.setup()
        rank, size = _rank_and_size()
        self._check_enough_samples(size)
        self._stream = TrainStream(
            self._folders,
            [weight for _, weight in self._weights()],
            self._encoder,
            self._options,
            rank=rank,
            size=size,
            on_error=self.on_error,
            pin_memory=self._pins_memory,
            state=None if self._resumed is None else self._resumed["ranks"][rank],
        )
        return self._stream

    def state_dict(self) -> dict[str, Any]:
        """What exact resume needs: the places of all data-parallel ranks, and what they depend on. A collective: the
        checkpoint keeps what rank 0 gives."""
        return {
            "consumed_samples": self._consumed_samples(),
            **self._order_depends_on(),
            "ranks": None if self._stream is None else _gathered(self._stream.state()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the checkpoint stopped. Raises UserError, with the values, when anything that the order
        depends on has changed: Energon can't find its place in another order."""
        names = {"data_parallel_size": "data-parallel size", "energon_version": "megatron-energon"}
        raise_changes(state_dict, self._order_depends_on(), names)
        self._resumed = None if state_dict["ranks"] is None else state_dict
        resume_sampler(self.data_sampler, state_dict["consumed_samples"])

    @property
    def _options(self) -> StreamOptions:
        return StreamOptions(**{name: getattr(self, name) for name in StreamOptions._fields})

    def _weights(self) -> list[tuple[str, float]]:
        """Names and probabilities; by the number of samples where none are given."""
        given = [source.weight for source in self._sources]
        sizes = [len(folder) for folder in self._folders]
        weights = [size if weight is None else weight for weight, size in zip(given, sizes, strict=True)]
        names = [label(source, number) for number, source in enumerate(self._sources)]
        return [(name, weight / sum(weights)) for name, weight in zip(names, weights, strict=True)]

    def _order_depends_on(self) -> dict[str, Any]:
        self.setup()
        names = [name for name, _ in self._weights()]
        return {
            "num_train_samples": self.num_train_samples,
            "train_sha256": dict(zip(names, (folder.fingerprint for folder in self._folders), strict=True)),
            "weights": dict(self._weights()),
            "data_parallel_size": _rank_and_size()[1],
            "energon_version": importlib.metadata.version("megatron-energon"),
            **self._options._asdict(),
        }

    def _check_enough_samples(self, size: int) -> None:
        """Raises UserError for a dataset that leaves a worker without a sample: Energon would change its share."""
        workers = max(1, self.num_workers) * size
        remedy = "Fewer data.num_workers, or more samples"
        expected = f"at least {workers}, one for each of {max(1, self.num_workers)} workers of {size} rank(s)"
        problems = [
            Problem(source.key, f"{len(folder)} training samples", expected, remedy)
            for source, folder in zip(self._sources, self._folders, strict=True)
            if len(folder) < workers
        ]
        if problems:
            raise UserError(problems)


def _rank_and_size() -> tuple[int, int]:
    """Data-parallel rank and size; (0, 1) outside of Megatron."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def _gathered(state: str) -> list[str]:
    """The states of all data-parallel ranks, in their order; on every rank."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return [state]
    size = parallel_state.get_data_parallel_world_size()
    states: list[Any] = [None] * size
    group = parallel_state.get_data_parallel_group()
    assert isinstance(group, torch.distributed.ProcessGroup)  # every rank is in a data-parallel group
    torch.distributed.all_gather_object(states, state, group=group)
    return states
