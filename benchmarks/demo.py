"""How long the demo takes and how its loss falls: python benchmarks/demo.py

Runs `python -m vlmsft.train experiment=demo` as `make demo` does, in a folder of its own; prints a row for
benchmarks/RESULTS.md and draws docs/demo_loss.svg. Fails when the demo does.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("nemo_toolkit", "megatron-core", "torch")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-m", "vlmsft.train", "experiment=demo", "id=benchmark"]
        output = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - started
        with open(Path(folder, "runs/demo/benchmark/metrics.csv"), encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    draw(rows, REPOSITORY / "docs" / "demo_loss.svg")
    training = float(rows[-1]["elapsed_seconds"])
    checked = next(line for line in output.splitlines() if line.startswith("training loss"))
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"| {date.today()} | {cpu()} | {packages} | {seconds:.0f} s | {training:.0f} s | {checked} |")


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


def cpu() -> str:
    """Model and number of cores."""
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if "model name" in line]
    return f"{models[0] if models else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
