"""SIGTERM ends a training after a step, on all ranks, with a checkpoint."""

from __future__ import annotations

import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from runtime_toys import ToyData, ToyModel

from vlmsft.runtime.preemption import Preemption


class TermAt(pl.Callback):
    """Sends this process SIGTERM in a step, counted from 0."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def noted():
    """The signals that the handler of the time before the training gets."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_of_the_step_that_was_done(toy_trainer, tmp_path, noted):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, monitor=None, every_n_train_steps=100)
    trainer = toy_trainer(TermAt(2), Preemption(), checkpoint, enable_checkpointing=True, max_steps=8)
    ours = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer.fit(ToyModel(), ToyData())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert trainer.global_step == saved["global_step"] == 3
    assert noted == [signal.SIGTERM], "who started the training hears of it, too"
    assert signal.getsignal(signal.SIGTERM) is ours


class Validations(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.steps.append(trainer.global_step)


def test_a_resume_validates_where_the_uninterrupted_run_would(toy_trainer, tmp_path, noted):
    seen = Validations()
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, monitor=None, every_n_train_steps=100)
    options = {"enable_checkpointing": True, "max_steps": 8, "val_check_interval": 4}
    with pytest.raises(SystemExit):
        toy_trainer(TermAt(1), Preemption(), checkpoint, **options).fit(ToyModel(), ToyData())
    resumed = toy_trainer(Preemption(), seen, **options)
    resumed.fit(ToyModel(), ToyData(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 8 and seen.steps == [4, 8]


@pytest.mark.parametrize("every_n_epochs", [1, None])  # None is NeMo's: validations count steps over epochs
@pytest.mark.parametrize(("interval", "saved_at", "validated_at"), [(4, 3, [4, 8]), (4, 6, [8]), (3, 3, [3, 6])])
def test_a_resume_from_a_checkpoint_between_validations(
    toy_trainer, tmp_path, every_n_epochs, interval, saved_at, validated_at
):
    """A checkpoint each 3 steps, saved before a validation of the same step: that one is made up for."""
    options = {"enable_checkpointing": True, "val_check_interval": interval, "check_val_every_n_epoch": every_n_epochs}
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", monitor=None, save_top_k=-1, every_n_train_steps=3)
    toy_trainer(Preemption(), checkpoint, max_steps=7, **options).fit(ToyModel(), ToyData())
    seen = Validations()
    resumed = toy_trainer(Preemption(), seen, max_steps=8, **options)
    resumed.fit(ToyModel(), ToyData(), ckpt_path=tmp_path / f"step={saved_at}.ckpt")
    assert resumed.global_step == 8 and seen.steps == validated_at


def test_without_a_signal_nothing_changes(toy_trainer, noted):
    trainer = toy_trainer(Preemption(), max_steps=8)
    ours = signal.getsignal(signal.SIGTERM)
    trainer.fit(ToyModel(), ToyData())
    assert trainer.global_step == 8 and noted == [] and signal.getsignal(signal.SIGTERM) is ours


@pytest.mark.nemo  # no NeMo, but torch and nemo_run in three processes
def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path):
    import job_toys
    from nemo_forks import Forked, environment

    run_dir = tmp_path / "runs" / "toys" / "one"
    run_dir.mkdir(parents=True)
    toys = (job_toys.start, "train_together", str(run_dir), "torchrun")
    launcher = Forked(*toys, folder=tmp_path, environment=environment())
    assert launcher.wait(300) == 143, launcher.output()
    assert [(run_dir / f"step{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert "Traceback" not in launcher.output()
