"""A toy model and data module with the names that NeMo logs, for Lightning's real trainer on a CPU."""

from __future__ import annotations

import lightning.pytorch as pl
import torch


class ToyModel(pl.LightningModule):
    """Fits y = 0; `bad_step` gives that step's loss (counted from 0) as NaN."""

    def __init__(self, bad_step: int | None = None):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.bad_step = bad_step

    def training_step(self, batch, batch_idx):
        loss = self.linear(batch["x"]).pow(2).mean()
        shown = loss.detach() * (float("nan") if self.global_step == self.bad_step else 1.0)
        self.log("reduced_train_loss", shown, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.linear(batch["x"]).pow(2).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        halve = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halve, "interval": "step"}}


class ToyData(pl.LightningDataModule):
    """32 samples, 4 a step: 8 steps an epoch. Every second sample lost 3 tokens."""

    micro_batch_size = 2
    global_batch_size = 4
    num_train_samples = 32

    def train_dataloader(self):
        samples = [{"x": torch.ones(2), "num_truncated_tokens": 3 * (i % 2)} for i in range(self.num_train_samples)]
        return torch.utils.data.DataLoader(samples, batch_size=self.global_batch_size)

    def val_dataloader(self):
        """8 samples, of which 3 lost a token."""
        samples = [{"x": torch.ones(2), "num_truncated_tokens": int(i < 3)} for i in range(8)]
        return torch.utils.data.DataLoader(samples, batch_size=4)
