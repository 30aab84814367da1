"""NeMo's data sampler with our order of samples."""

from __future__ import annotations

from typing import Any

import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from vlmsft.data.order import EvaluationOrder, Share, TrainOrder


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
        if isinstance(dataloader, list):  # a run without validation has no loader
            return dataloader
        from megatron.core import parallel_state

        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        share = Share(self.micro_batch_size, self.global_batch_size, rank, size)
        return with_order(dataloader, self.seed, self.init_consumed_samples, share)


def with_order(dataloader: Any, seed: int, consumed_samples: int, share: Share) -> DataLoader:
    """`dataloader` (it has a mode) with the batch sampler of its mode; `consumed_samples` counts for training only."""
    num_samples = len(dataloader.dataset)
    order = (
        TrainOrder(num_samples, seed, consumed_samples, share)
        if dataloader.mode == "train"
        else EvaluationOrder(num_samples, share)
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
