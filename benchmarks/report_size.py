"""Size of the HTML report of 200 runs, and the time until a browser has it ready.

The runs are synthetic: curves of 20,000 rows drawn from a formula with noise, no training behind them. Ready = table,
filter, differences and plots answer and nothing waits on the main thread; plots draw as they are scrolled to. Beside
the clock stands the CPU time of the page's main thread, which other work on the machine doesn't lengthen.

    python benchmarks/report_size.py [num_runs] [num_rows]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from playwright.sync_api import sync_playwright

from vlmsft.report.curves import CURVES
from vlmsft.report.html import write_report
from vlmsft.report.record import RunRecord, SampleAnswer
from vlmsft.report.summary import summarize

CHROMIUM = "/usr/bin/chromium"
REPEATS = 3
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4)


def synthetic_run(number: int, num_rows: int) -> RunRecord:
    random = np.random.default_rng(number)
    rate, tensor_parallel = RATES[number % 5], 2 ** (number // 5 % 4)
    config = {
        "optim.max_lr": rate,
        "strategy.tensor_model_parallel_size": tensor_parallel,
        "optim.weight_decay": (0.0, 0.1)[number // 20 % 2],
        "seed": number // 40,
        **{f"group{key // 20}.key{key}": key for key in range(150)},
    }
    frame = curves(random, num_rows, rate, tensor_parallel)
    few = frame.iloc[:: max(1, num_rows // 200)].to_dict("records")
    rows = [{str(name): value for name, value in row.items() if value == value} for row in few]
    answers = tuple(
        SampleAnswer(num_rows, place, f"question {place}", f"reference {place}", f"answer {number % 7} " * 20)
        for place in range(8)
    )
    command = f"python -m vlmsft.train optim.max_lr={rate} strategy.tensor_model_parallel_size={tensor_parallel}"
    return RunRecord(
        name="synthetic",
        id=f"{number:03d}",
        location=f"runs/synthetic/{number:03d}",
        state="done",
        config=config,
        metrics=summarize(rows, num_gpus=8),
        curves=lambda: frame,
        command=command,
        answers=answers,
    )


def curves(random: np.random.Generator, num_rows: int, rate: float, tensor_parallel: int) -> pd.DataFrame:
    """All of CURVES, each with noise in every row."""
    steps = np.arange(1, num_rows + 1)
    noise = {curve.column: random.normal(size=num_rows) for curve in CURVES}
    speed = 400 / tensor_parallel**0.3 * (1 + 0.03 * noise["samples_per_second"])
    loss = 1.2 + 3 * np.exp(-steps * rate * 30) + 0.05 * noise["reduced_train_loss"]
    frame = {
        "step": steps,
        "consumed_samples": steps * 128,
        "elapsed_seconds": np.cumsum(128 / speed),
        "reduced_train_loss": loss,
        "val_loss": np.where(steps % 500 == 0, loss + 0.1 + 0.02 * noise["val_loss"], np.nan),
        "lr": rate * (1 + np.cos(np.pi * steps / num_rows)) / 2,
        "grad_norm": np.exp(0.3 * noise["grad_norm"]),
        "samples_per_second": speed,
        "tokens_per_second": speed * 450 * (1 + 0.02 * noise["tokens_per_second"]),
        "tflops_per_second_per_gpu": 350 + 9 * noise["tflops_per_second_per_gpu"],
        "mfu": 0.35 + 0.009 * noise["mfu"],
        "data_wait_fraction": np.abs(0.01 * noise["data_wait_fraction"]),
        "peak_memory_gib": 60 + np.abs(noise["peak_memory_gib"]),
    }
    return pd.DataFrame(frame)


def seconds_in_browser(path: Path) -> tuple[float, float, float]:
    """(until ready, CPU time of the main thread until then, CPU time to draw the first curve plot)"""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        started = time.monotonic()
        page.goto(path.as_uri(), wait_until="commit")
        page.wait_for_selector("html[data-ready=true]", state="attached")
        page.evaluate("new Promise((idle) => requestIdleCallback(idle))")
        ready, cpu = time.monotonic() - started, cpu_seconds(session)
        page.locator("#curves").scroll_into_view_if_needed()
        page.locator("#curve-0 .main-svg").first.wait_for()
        drawn = cpu_seconds(session) - cpu
        browser.close()
    return ready, cpu, drawn


def cpu_seconds(session) -> float:
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def main(num_runs: int = 200, num_rows: int = 20_000) -> None:
    started = time.monotonic()
    runs = [synthetic_run(number, num_rows) for number in range(num_runs)]
    made = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        started = time.process_time()
        write_report(runs, path, title=f"{num_runs} synthetic runs")
        written = time.process_time() - started
        size = path.stat().st_size / 1e6
        times = [seconds_in_browser(path) for _ in range(REPEATS)]
    ready, cpu, drawn = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{num_runs} synthetic runs of {num_rows:,} rows, made in {made:.0f} s")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {REPEATS}")
    print("| size | CPU to write it | ready in Chromium | of it CPU | CPU of the first curve plot |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    print(f"| {size:.1f} MB | {written:.1f} s | {ready:.1f} s | {cpu:.1f} s | {drawn:.1f} s |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
