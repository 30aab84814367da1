"""Lightning's real trainer on a CPU, for the toys of runtime_toys.py."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest

from vlmsft.runtime import logging as run_logging


@pytest.fixture
def toy_trainer(tmp_path):
    """Makes a quiet CPU trainer around the callbacks under test."""

    def make(*callbacks, **options) -> pl.Trainer:
        # Lightning hides a default bar behind enable_progress_bar, which must be on when a callback is one
        has_bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": has_bar,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})

    return make


@pytest.fixture(autouse=True)
def fresh_console(monkeypatch):
    """Each test's capture has a stdout of its own; a console of the test before would write into a closed one."""
    monkeypatch.setattr(run_logging, "_console", None)
