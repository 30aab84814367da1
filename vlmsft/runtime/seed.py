"""One seed for weights and dropout (data.seed, the data order's, is the same key)."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np


def step_seed(seed: int, step: int, data_parallel_rank: int) -> int:
    """A seed of its own for each step and data-parallel rank; never 0, which NeMo refuses."""
    return int(np.random.SeedSequence((seed, step, data_parallel_rank)).generate_state(1)[0]) // 2 + 1


class Seed(pl.Callback):
    """Seeds Megatron's generators before the weights are drawn and again before every step.

    NeMo's strategy seeds them with 1234 whatever the user asks, and its checkpoints don't hold their state. A seed drawn
    from (seed, step) makes dropout after a resume the same as without the interruption, and gives data-parallel
    ranks different masks.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from nemo.lightning.megatron_init import _set_random_seed

        _set_random_seed(self.seed)  # before configure_model draws the weights

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        from megatron.core import parallel_state
        from nemo.lightning.megatron_init import _set_random_seed

        _set_random_seed(step_seed(self.seed, trainer.global_step, parallel_state.get_data_parallel_rank()))
