"""Ends a training between two steps with a checkpoint when SIGTERM comes: Slurm's --signal and preemption, Ctrl-C."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)


class Preemption(pl.Callback):
    """Saves the `-last` checkpoint after the step in which any rank got SIGTERM, and ends all ranks there.

    Lightning itself ends each rank where its signal found it: ranks that are one step further wait for it in a
    collective until they are killed, and nothing is saved. NeMo's PreemptionCallback needs a GPU and ends with exit
    code 0, which Slurm takes for a finished job. Here the ranks agree after each step (one all-reduce of a flag), and
    SIGTERMException leaves through vlmsft.runtime.job, which makes 143 of it.

    A signal that comes during a validation is answered after the step that follows it.

    Checkpoints count the step after which they are saved, so that a resume validates where the run would have.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Callable[[int, FrameType | None], Any] | int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._received = False
        self._previous = signal.getsignal(signal.SIGTERM)

        def handle(number: int, frame: FrameType | None) -> None:
            self._received = True
            if callable(self._previous):
                self._previous(number, frame)
            # else Lightning would end this rank alone
            trainer._signal_connector.received_sigterm = False

        signal.signal(signal.SIGTERM, handle)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not self._any_rank_received(trainer):
            return
        logger.info("SIGTERM: saving a checkpoint after step %d, then stopping", trainer.global_step)
        checkpoint: Any = trainer.checkpoint_callback
        if checkpoint is not None:
            checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
        finalize = getattr(trainer.strategy.checkpoint_io, "maybe_finalize_save_checkpoint", None)
        if finalize is not None:  # NeMo's asynchronous saves
            finalize(blocking=True)
        trainer.strategy.barrier("preemption")  # srun kills the others as soon as one has ended
        raise SIGTERMException

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        """In each checkpoint that is saved after a step, whoever saves it (log.ckpt.every_n_train_steps too): Lightning
        counts the batch as completed only after on_train_batch_end, and a resume would validate one step late."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts["completed"] = counts["processed"]

    def _any_rank_received(self, trainer: pl.Trainer) -> bool:
        if not torch.distributed.is_initialized():
            return self._received
        flag = torch.tensor(int(self._received), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
