"""Energon's training stream of shards, with our encoder and batches, and its place in plain values.

The order is Energon's: each worker of each data-parallel rank owns a fixed slice of the samples, reads it shard by
shard (shards shuffled, several open at once) through a shuffle buffer, and starts over when it is through. So the order
depends on the number of ranks and workers, and its place is the state of all of them.

Imports megatron.energon, which takes seconds, but not NeMo.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import gc
import importlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from megatron.energon import Cooker, CrudeWebdataset, TaskEncoder, WorkerConfig, get_savable_loader, stateless
from megatron.energon.epathlib import EPath
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors.webdataset.single_shard_reader import SingleShardReader
from megatron.energon.rng import SystemRng
from megatron.energon.wrappers.base import BaseSingleWrapperDataset

from vlmsft.data.dataset import FailedBatch
from vlmsft.data.encode import EncodedSample, SampleEncoder
from vlmsft.data.energon_shards import ShardFolder, collate_items, encode_item
from vlmsft.errors import Problem, UserError


class StreamOptions(NamedTuple):
    """What a stream depends on beside its shards, rank and size.

    shuffle_buffer_size: samples (as bytes) that a worker holds to choose the next one from; 0 or 1 = none
    max_samples_per_sequence: longest run of neighbours that is read in one go; None = a whole slice of a shard
    parallel_shard_iters: runs that a worker reads at once, taking from one or the other at random
    """

    micro_batch_size: int
    num_workers: int
    seed: int
    shuffle_buffer_size: int
    max_samples_per_sequence: int | None
    parallel_shard_iters: int


class TrainStream:
    """Endless micro batches of one data-parallel rank; the same place in the stream gives the same batches.

    folders, weights: datasets to blend; a weight is the probability that a sample comes from its dataset
    state: where to go on (what `state` gave for this rank and the same options), None = the beginning
    Raises UserError while it is iterated when a sample can't be read and on_error is "raise", or a shard is damaged.
    It has no length: see vlmsft.data.order.TrainOrder.
    """

    mode = "train"

    def __init__(
        self,
        folders: Sequence[ShardFolder],
        weights: Sequence[float],
        encoder: SampleEncoder,
        options: StreamOptions,
        *,
        rank: int,
        size: int,
        on_error: Literal["raise", "skip"] = "raise",
        pin_memory: bool = False,
        state: str | None = None,
    ):
        config = WorkerConfig(rank=rank, world_size=size, num_workers=options.num_workers, seed_offset=options.seed)
        tasks = _Tasks(folders, encoder, on_error)
        dataset = tasks.build_train_datasets(
            datasets=[
                (_factory(number, folder, config, options), weight)
                for number, (folder, weight) in enumerate(zip(folders, weights, strict=True))
            ],
            worker_config=config,
            batch_size=options.micro_batch_size,
            shuffle_buffer_size=options.shuffle_buffer_size,
        )
        guarded = _Guarded(dataset, worker_config=config)
        self._loader = get_savable_loader(guarded, worker_config=config, gc_collect_every_n_steps=0)
        seeds = [config.worker_seed(worker) for worker in range(options.num_workers)]
        self._loader.worker_init_fn = functools.partial(_start_worker, seeds)
        self._loader.pin_memory = pin_memory  # Energon always pins, which warns where there is no GPU
        self._loader.generator = torch.Generator().manual_seed(options.seed)  # see vlmsft.data.sampler.with_order
        if state is not None:
            self._loader.restore_state_rank(from_plain(json.loads(state)))

    def __iter__(self) -> Iterator[dict]:
        for batch in self._loader:
            if isinstance(batch, FailedBatch):
                raise UserError(batch.problems, "the run stopped")
            yield batch

    def state(self) -> str:
        """The place behind the last batch, as JSON; a few 10 KB for each worker."""
        return json.dumps(to_plain(self._loader.save_state_rank()))


def _start_worker(seeds: Sequence[int], worker: int) -> None:
    """As Energon's, which also asks every living object whether it is a tensor: NeMo's stand-ins for a missing
    TransformerEngine answer that with an ImportError. Frozen objects, tensors of a GPU among them, are never collected
    in a worker, which is what it is for."""
    gc.freeze()
    SystemRng.seed(seeds[worker])
    EPath.prepare_forked_process()


def _factory(number: int, folder: ShardFolder, config: WorkerConfig, options: StreamOptions) -> CrudeWebdataset:
    """Energon's reader of a folder's shards. Our own arguments stand in for dataset.yaml."""

    def stop(error: Exception, key: str | None) -> None:
        raise _unreadable(folder.path / (key or ""), error) from error

    return CrudeWebdataset(
        EPath(folder.path),
        split_part=folder.split,
        training=True,
        worker_config=config,
        shuffle_over_epochs=1,
        parallel_shard_iters=options.parallel_shard_iters,
        max_samples_per_sequence=options.max_samples_per_sequence,
        auto_decode=False,
        subflavors={"dataset": number},
        handler=stop,
    )


def _unreadable(shard: Path, error: Exception) -> UserError:
    found = f"unreadable ({type(error).__name__}: {error})"
    return UserError(Problem(str(shard), found, "a whole shard", "Restore the file or prepare the dataset again"))


class _Tasks(TaskEncoder):
    """From a shard's bytes to a micro batch. Energon logs an exception and goes on without the sample: none leaves here
    but FatalSampleError, which ends the run; what is wrong with a sample becomes an item or a FailedBatch."""

    def __init__(self, folders: Sequence[ShardFolder], encoder: SampleEncoder, on_error: Literal["raise", "skip"]):
        self.folders, self.encoder = folders, encoder
        self.on_error: Literal["raise", "skip"] = on_error
        self.cookers = [Cooker(self.encode)]  # pyright: ignore[reportArgumentType] # declares Energon's Sample only

    @stateless
    def encode(self, sample: dict) -> EncodedSample | UserError:
        folder = self.folders[sample["__subflavors__"]["dataset"]]
        shard, key = _origin(sample)
        parts = {name: data for name, data in sample.items() if not name.startswith("__")}
        try:
            return encode_item(parts, self.encoder, f"{folder.path / shard}:{key}", self.on_error, folder)
        except Exception as error:
            raise FatalSampleError(f"{folder.path / shard}:{key}: {error!r}") from error

    @stateless
    def batch(self, samples: list) -> dict | FailedBatch:
        try:
            return collate_items(samples, self.encoder)
        except Exception as error:
            raise FatalSampleError(repr(error)) from error


def _origin(sample: dict) -> tuple[str, str]:
    """Shard and key. Energon's key is both of them, and CrudeSample drops __shard__; the restore key has it."""
    restore_key = sample["__restore_key__"]
    shard = restore_key[restore_key.index("Webdataset") + 1]
    return shard, sample["__key__"].removeprefix(f"{shard}/")


class _Guarded(BaseSingleWrapperDataset):
    """What was raised while a shard was read, as a FailedBatch: DataLoader would make text of it."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict | FailedBatch]:
        try:
            yield from self.dataset
        except UserError as error:
            yield FailedBatch(error.problems)
        except (OSError, tarfile.TarError) as error:  # Energon's handler isn't asked where a shard is opened
            yield FailedBatch(_unreadable(_shard_being_read(error), error).problems)

    def config(self) -> dict[str, Any]:
        return self.dataset.config()


def _shard_being_read(error: BaseException) -> Path:
    """From the reader in the traceback: the exception doesn't say."""
    traceback = error.__traceback__
    while traceback is not None:
        reader = traceback.tb_frame.f_locals.get("self")
        if isinstance(reader, SingleShardReader):
            return Path(str(reader.shard_state.shard.path))
        traceback = traceback.tb_next
    return Path("a shard")


# --- state ------------------------------------------------------------------------------------------------------------

_KIND, _VALUE = "kind", "value"


def to_plain(value: Any) -> Any:
    """Energon's state as dicts, lists, strings and numbers: torch loads a checkpoint's common.pt with weights_only, and
    nothing has to be unpickled."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {_KIND: "bytes", _VALUE: base64.b64encode(value).decode("ascii")}
    if isinstance(value, EPath):
        return {_KIND: "path", _VALUE: str(value)}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, tuple):
        return {_KIND: "tuple", _VALUE: [to_plain(item) for item in value]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {_KIND: f"{kind.__module__}:{kind.__qualname__}", _VALUE: fields}
    raise TypeError(f"no plain form of a {type(value).__name__} in Energon's state")


def from_plain(value: Any) -> Any:
    """What `to_plain` was given. Classes come from megatron.energon only, and only dataclasses."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = value[_KIND], value[_VALUE]
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "path":
        return EPath(content)
    if kind == "tuple":
        return tuple(from_plain(item) for item in content)
    module, _, name = kind.partition(":")
    if not module.startswith("megatron.energon."):
        raise ValueError(f"{kind} is not part of an Energon state")
    target = getattr(importlib.import_module(module), name)
    if not (isinstance(target, type) and dataclasses.is_dataclass(target)):
        raise ValueError(f"{kind} is not part of an Energon state")
    return target(**{field: from_plain(item) for field, item in content.items()})
