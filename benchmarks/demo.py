"""How long the demo takes and how its loss falls: python benchmarks/demo.py [key=value ...]

Runs `python -m vlmsft.train experiment=demo` as `make demo` does, in a folder of its own, and prints a row for
benchmarks/RESULTS.md. Fails when the demo does. Without overrides it also draws docs/demo_loss.svg.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import matplotlib
import torch
from hardware import processor, versions

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("nemo_toolkit", "megatron-core", "torch")


def main() -> None:
    overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-m", "vlmsft.train", "experiment=demo", "id=benchmark", *overrides]
        output = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - started
        with open(Path(folder, "runs/demo/benchmark/metrics.csv"), encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    if not overrides:
        draw(rows, REPOSITORY / "docs" / "demo_loss.svg")
    training = float(rows[-1]["elapsed_seconds"])
    checked = next(line for line in output.splitlines() if line.startswith("training loss"))
    ran_on = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    times = (f"{seconds:.0f} s", f"{training:.0f} s")
    cells = (date.today(), " ".join(overrides), ran_on, versions(PACKAGES), *times, checked)
    print("|", " | ".join(map(str, cells)), "|")


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Training loss of each step and validation loss, on a log scale."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([int(r["step"]) for r in rows], [float(r["reduced_train_loss"]) for r in rows], lw=1, label="training")
    validated = [row for row in rows if row["val_loss"]]
    axes.plot([int(r["step"]) for r in validated], [float(r["val_loss"]) for r in validated], "o", label="validation")
    axes.axhline(0.3, color="gray", lw=0.8, ls="--")
    axes.annotate("the demo fails above this", (1, 0.3), xytext=(2, 2), textcoords="offset points", fontsize=8)
    axes.set(xlabel="step", ylabel="loss per answer token", yscale="log")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
