"""NeMo's data sampler with our order of samples."""

from __future__ import annotations

from typing import Any

import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from vlmsft.data.blend import Blend
from vlmsft.data.order import BlendOrder, EvaluationOrder, Share, TrainOrder
from vlmsft.errors import Problem, UserError


class VlmDataSampler(MegatronDataSampler):
    """MegatronDataSampler whose loaders follow vlmsft.data.order.

    Only the loader's batch sampler is ours: NeMo's add_megatron_sampler refuses unknown types, shards the file by rank
    before it shuffles, drops the tail of every epoch and lets training's position leak into validation.
    """

    def __init__(self, *, seed: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.seed = seed

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """A loader of the same class, dataset, workers and mode with our batch sampler. `consumed_samples` is NeMo's
        signature; like NeMo's own sampler this one reads init_consumed_samples, and for training only."""
        if not isinstance(dataloader, DataLoader):  # no validation: a list; Energon: a stream with an order
            return dataloader
        from megatron.core import parallel_state

        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        share = Share(self.micro_batch_size, self.global_batch_size, rank, size)
        return with_order(dataloader, self.seed, self.init_consumed_samples, share)


def with_order(dataloader: Any, seed: int, consumed_samples: int, share: Share) -> DataLoader:
    """`dataloader` (it has a mode) with the batch sampler of its mode; `consumed_samples` counts for training only."""
    order = (
        _train_order(dataloader.dataset, seed, consumed_samples, share)
        if dataloader.mode == "train"
        else EvaluationOrder(len(dataloader.dataset), share)
    )
    return type(dataloader)(
        dataset=dataloader.dataset,
        mode=dataloader.mode,
        batch_sampler=order,
        num_workers=dataloader.num_workers,
        collate_fn=dataloader.collate_fn,
        pin_memory=dataloader.pin_memory,
        timeout=dataloader.timeout,
        worker_init_fn=dataloader.worker_init_fn,
        multiprocessing_context=dataloader.multiprocessing_context,
        prefetch_factor=dataloader.prefetch_factor,
        persistent_workers=dataloader.persistent_workers,
        # An iterator draws a seed for its workers when it is made. From torch's own generator that would happen inside
        # the first step, after a resume too, and shift that step's dropout.
        generator=torch.Generator().manual_seed(seed),
    )


def _train_order(dataset: Any, seed: int, consumed_samples: int, share: Share) -> TrainOrder | BlendOrder:
    if isinstance(dataset, Blend) and dataset.weights is not None:
        return BlendOrder(dataset.sizes, dataset.weights, seed, consumed_samples, share, dataset.text_sizes)
    return TrainOrder(len(dataset), seed, consumed_samples, share, dataset.text_sizes)


def raise_changes(old: dict[str, Any], new: dict[str, Any], names: dict[str, str] | None = None) -> None:
    """Raises UserError where what a stream of samples depends on isn't as it was when its place in it was saved.

    old: from the checkpoint; what it lacks (checkpoints of earlier versions) is not compared
    names: what a key is called in messages, where it isn't the data node's
    """
    names = names or {}
    remedy = "Resume with the same data and seed, or start a new run from the checkpoint's weights"
    problems = [
        Problem(names.get(key, f"data.{key}"), f"{value}", f"{old[key]} as in the checkpoint", remedy)
        for key, value in new.items()
        if key in old and old[key] != value
    ]
    if problems:
        raise UserError(problems)


def raise_without_place(trainer: Any, module: Any, place: Any) -> None:
    """Raises UserError where training goes on but no place in the stream of samples was restored (`place` None), as
    when the checkpoint was written with another data module: Lightning would start the stream over without a word."""
    step = trainer.global_step if trainer else 0
    if step and place is None:
        found = f"a checkpoint of step {step} that holds no place in the stream of {type(module).__name__}"
        remedy = "Resume with the data module that the run began with, or start a new run from the checkpoint's weights"
        raise UserError(Problem("data", found, "one that it saved", remedy))


def resume_sampler(sampler: MegatronDataSampler, consumed_samples: int) -> None:
    """Sets NeMo's counters to a checkpoint's."""
    sampler.init_consumed_samples = consumed_samples
    sampler.prev_consumed_samples = consumed_samples
    sampler.if_first_step = 1
