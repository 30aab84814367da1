"""The run folder's files stay where they are."""

from __future__ import annotations

import lightning.pytorch as pl


class KeepRunFiles(pl.Callback):
    """Stops NeMo's ModelCheckpoint from moving every file of the run folder into run_0, run_1, ... at the start.

    That would take config.yaml and metrics.csv away from each resumed run; they are made to be continued.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from nemo.utils import AppState

        AppState().files_to_move = []
