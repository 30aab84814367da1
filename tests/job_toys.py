"""What the jobs of test_job.py run in other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from vlmsft.errors import Problem, UserError
from vlmsft.runtime.logging import console


def write_rank(folder: str, text: str = "") -> None:
    Path(folder, f"rank{os.environ.get('RANK', '')}").write_text(text or sys.executable, encoding="utf-8")
    if os.environ.get("RANK", "0") == "0":
        console().print("progress of rank 0")


def fail(folder: str) -> None:
    if os.environ.get("RANK", "1") == "1":
        raise ValueError("a bug in rank 1")
    time.sleep(60)


def refuse(folder: str) -> None:
    raise UserError(Problem("train.jsonl:3", "an unreadable image", "a JPEG"), "the run stopped")


def die(folder: str) -> None:
    """Rank 1 is killed and leaves a process behind; rank 0 fails of it, as in a collective."""
    killed = Path(folder, "killed")
    if os.environ.get("RANK", "1") == "1":
        left = subprocess.Popen(["sleep", "300"], start_new_session=True)
        Path(folder, f"{left.pid}.pid").touch()
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not killed.exists():
        time.sleep(0.1)
    time.sleep(0.2)
    raise RuntimeError("connection reset by peer")


def sleep(folder: str) -> None:
    """Says who sleeps, for as long as a test can take."""
    Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(300)


def train_slowly(folder: str) -> None:
    """Lightning's own loop: 0.1 s a step, for ever, each completed step written down."""
    import lightning.pytorch as pl
    import torch

    class Steps(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, index):
            Path(folder, f"{os.getpid()}.pid").touch()
            time.sleep(0.1)
            Path(folder, "started").write_text(str(index))
            time.sleep(0.1)
            Path(folder, "ended").write_text(str(index))
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(100000, 2))

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Steps())


def train_together(folder: str) -> None:
    """Two ranks in step, of which the second gets SIGTERM in step 2, counted from 0."""
    import lightning.pytorch as pl
    import torch

    from vlmsft.runtime.preemption import Preemption

    rank = int(os.environ["RANK"])

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, index):
            if rank == 1 and index == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(1000, 2))

    class Steps(pl.Callback):
        def on_exception(self, trainer, module, error):
            Path(folder, f"step{rank}").write_text(str(trainer.global_step))

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=50,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Preemption(), Steps()],
    )
    trainer.fit(Model())


def start(function: str, run_dir: str, how: str) -> None:
    """`python job_toys.py FUNCTION RUN_DIR here|torchrun`: what the train command does with a recipe."""
    import nemo_run as run

    from vlmsft.runtime import job

    recipe = run.Partial(globals()[function], folder=run_dir)
    made = job.Job(recipe, run_dir, "toys", Path(run_dir).name)
    if how == "here":
        job.run_here(made)
    else:
        sys.exit(job.launch(made, job.torchrun_executor(2)))


if __name__ == "__main__":
    import job_toys

    job_toys.start(*sys.argv[1:])
