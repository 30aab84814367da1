"""Runs for a page: two learning rates by two tensor-parallel sizes with curves from a formula, and names that no page
may take as HTML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vlmsft.report.record import RunRecord, SampleAnswer

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
STEPS = 40


def grid(folder: Path, num_steps: int = STEPS) -> list[RunRecord]:
    """val_loss: 1.0 to 1.3; samples/s: 100 with TP 1, 60 with TP 2. The Pareto front is runs 0 and 2 (see SPEEDS)."""
    Image.new("RGB", (400, 200), (200, 80, 30)).save(folder / "0-0.png")
    rates, sizes = (1e-5, 1e-3), (1, 2)
    return [
        run(folder, number, rate, size, num_steps)
        for number, (rate, size) in enumerate((rate, size) for rate in rates for size in sizes)
    ]


LOSSES = (1.3, 1.2, 1.0, 1.1)
SPEEDS = (100.0, 60.0, 80.0, 50.0)


def run(folder: Path, number: int, rate: float, size: int, num_steps: int) -> RunRecord:
    note = EVIL if number == 3 else "plain"
    config = {
        "optim.max_lr": rate,
        "strategy.tensor_model_parallel_size": size,
        "trainer.max_steps": num_steps,
        "run_dir": f"/runs/grid/{number}",
        "z.note": note,
    }
    answer = EVIL if number == 3 else ("orange", "red", "orange", "")[number]
    pictures = (str(folder / "0-0.png"), str(folder / "gone.png"))
    return RunRecord(
        name="grid",
        id=f"{EVIL if number == 3 else number}",
        location=f"/runs/grid/{number}",
        state="failed" if number == 1 else "done",
        config=config,
        metrics={"best_val_loss": LOSSES[number], "samples_per_second": SPEEDS[number], "max_lr": rate, "mfu": None},
        curves=lambda: frame(number, num_steps),
        command=f"python -m vlmsft.train optim.max_lr={rate} 'note={note}'",
        commit="0123abc",
        answers=(SampleAnswer(num_steps, 0, f"Which colour? {EVIL}", "orange", answer, pictures),),
        notes=(f"metrics.csv: {EVIL}",) if number == 3 else (),
    )


def frame(number: int, num_steps: int) -> pd.DataFrame:
    """A loss that falls, with one spike of 9 at step 7; samples/s; validations every 10 steps; no tokens."""
    steps = np.arange(1, num_steps + 1)
    loss = LOSSES[number] + 3 / steps
    loss[6] = 9.0
    return pd.DataFrame(
        {
            "step": steps,
            "consumed_samples": steps * 16,
            "reduced_train_loss": loss,
            "val_loss": np.where(steps % 10 == 0, loss, np.nan),
            "lr": 1e-3 / steps,
            "samples_per_second": np.full(num_steps, SPEEDS[number]),
            "elapsed_seconds": steps * 36.0,
        }
    )
