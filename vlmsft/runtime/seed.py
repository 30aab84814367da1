"""One seed for weights and dropout (data.seed, the data order's, is the same key)."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import torch


def step_seed(seed: int, step: int, data_parallel_rank: int) -> int:
    """A seed of its own for each step and data-parallel rank."""
    return int(np.random.SeedSequence((seed, step, data_parallel_rank)).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Python, NumPy, torch and Megatron's tracker (the tensor-parallel ranks get a stream each); on a CPU too.

    As nemo.lightning.megatron_init._set_random_seed, which leaves the tracker out where it counts no GPU.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


class Seed(pl.Callback):
    """Seeds before the weights are drawn and again before every step.

    NeMo's strategy seeds with 1234 whatever the user asks, and its checkpoints don't hold the generators' state. A seed
    drawn from (seed, step) makes dropout after a resume the same as without the interruption, and gives data-parallel
    ranks different masks.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        seed_all(self.seed)  # before configure_model draws the weights

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        from megatron.core import parallel_state

        seed_all(step_seed(self.seed, trainer.global_step, parallel_state.get_data_parallel_rank()))
